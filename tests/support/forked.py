"""Python commands without a new interpreter, which would take seconds to import torch and transformers.

Before a test runs, a process is forked off that has imported them and has done nothing else; it forks itself again for
every command. What a command sees is what an interpreter gives it: its arguments, environment, folder, streams,
signals and warnings, and an end of its own. Only what was imported already is there. Elsewhere than on Linux, and for
other programs than this interpreter, processes are started as usual.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from weakref import finalize

_orders: socket.socket | None = None
_server = 0
_NUMBER = 8  # bytes of a process's number, or of its exit status


class Popen(subprocess.Popen[Any]):
    """A process; for ``-c``, ``-m`` or a file of this interpreter, a fork."""

    _ended: socket.socket | None = None
    """Tells the exit status, once."""

    def _execute_child(self, *given: Any) -> None:
        start = super()._execute_child  # type: ignore[misc]  # typeshed does not know it
        how = inspect.signature(start).bind(*given).arguments
        if _orders is None or not _can_be(how["args"]):
            start(*given)
            return
        streams = [how[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        streams = [usual if number == -1 else number for usual, number in enumerate(streams)]
        self._ended, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(_orders, [_order(how)], [theirs.fileno(), *streams])
        self.pid = int.from_bytes(self._ended.recv(_NUMBER, socket.MSG_WAITALL))
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(how[name] for name in pipes))  # type: ignore[attr-defined]  # the same

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """Number and exit status of the process if it has ended, else two zeros; without flags, wait for its end."""
        if self._ended is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc, no-any-return]  # the same
        try:
            said = self._ended.recv(_NUMBER, socket.MSG_DONTWAIT if wait_flags else socket.MSG_WAITALL)
        except BlockingIOError:
            return 0, 0
        self._ended.close()
        assert said, "nobody tells how the process ended"
        return self.pid, int.from_bytes(said)

    def _internal_poll(self, *given: Any, **more: Any) -> int | None:
        if self._ended is None:
            return super()._internal_poll(*given, **more)  # type: ignore[misc, no-any-return]  # the same
        if self.returncode is None:
            number, status = self._try_wait(os.WNOHANG)
            if number:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]  # the same
        return self.returncode


def run(command: Sequence[str | bytes], **options: Any) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run``, with what the command printed."""
    with Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        printed, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, printed, errors)


def _can_be(command: Any) -> bool:
    """Whether it is a command of this interpreter, without options of its own."""
    if not isinstance(command, list) or command[0] != sys.executable or len(command) == 1:
        return False
    return command[1] in {"-c", "-m"} or not str(command[1]).startswith("-")


def _order(how: Mapping[str, Any]) -> bytes:
    """What the forked process is to be; texts may hold bytes that are no UTF-8, as lone surrogates."""
    environment = os.environ if how["env"] is None else how["env"]
    order = {
        "words": [os.fsdecode(word) for word in how["args"][1:]],
        "folder": os.fsdecode(how["cwd"] or Path.cwd()),
        "environment": {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()},
        "session": how["start_new_session"],
    }
    return json.dumps(order).encode()


# ---- the process that is forked


def start() -> None:
    """Fork it off. No thread but this one may have been started: OpenMP would wait for those it had, for ever."""
    global _orders, _server  # noqa: PLW0603  # one for each process that runs tests
    if sys.platform != "linux" or _orders is not None:
        return
    _orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the thread that talks to pytest-xdist
        _server = os.fork()
        if _server == 0:
            _orders.close()
            _serve(theirs)


def stop() -> None:
    """End it; what it has forked goes on to its own end."""
    global _orders  # noqa: PLW0603  # the same
    if _orders is not None:
        _orders.close()
        _orders = None
        os.waitpid(_server, 0)


def _serve(orders: socket.socket) -> NoReturn:
    """Fork for every order, until nobody is there to give one."""
    running = set[int]()
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True:
            order, files, _, _ = socket.recv_fds(orders, 1 << 18, 4)
            if not order:
                break
            _import_for_all()
            number = os.fork()
            if number == 0:
                orders.close()
                _tell(json.loads(order), *files)
            running = {each for each in running | {number} if os.waitpid(each, os.WNOHANG)[0] == 0}
            for each in files:
                os.close(each)
    finally:
        os._exit(0)


@cache
def _import_for_all() -> None:
    """Import what most commands need, but not the command line itself: its consoles look at the streams they find."""
    import agentmem.cli.app  # noqa: F401

    for name in [name for name in sys.modules if name.startswith("agentmem.cli")]:
        del sys.modules[name]
    gc.freeze()


def _tell(order: Mapping[str, Any], to: int, *streams: int) -> NoReturn:
    """Fork once more, and tell that process's number and its exit status."""
    try:
        number = os.fork()
        if number == 0:
            os.close(to)
            _become(order, streams)
        for stream in streams:
            os.close(stream)
        os.write(to, number.to_bytes(_NUMBER))
        os.write(to, os.waitpid(number, 0)[1].to_bytes(_NUMBER))
    finally:
        os._exit(0)


def _become(order: Mapping[str, Any], streams: Sequence[int]) -> NoReturn:
    """Be the command, to its end."""
    code = 1
    try:
        _settle(order, streams)
        try:
            _execute(order["words"])
            code = 0
        except SystemExit as end:
            code = _code(end.code)
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001  # a second pytest must not go on here
        traceback.print_exc()
    finally:
        os._exit(code)


def _settle(order: Mapping[str, Any], streams: Sequence[int]) -> None:
    """Streams, folder, environment, signals and warnings of a new interpreter."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if order["session"]:
        os.setsid()
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", errors=errors, closefd=False, buffering=1)  # noqa: SIM115
        for number, mode, errors in ((0, "r", "strict"), (1, "w", "strict"), (2, "w", "backslashreplace"))
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None  # it may be another one in this environment
    gc.enable()  # tests/conftest.py has disabled it until tests are collected
    warnings.resetwarnings()
    warnings.simplefilter("ignore", DeprecationWarning)
    atexit._clear()
    finalize._registry.clear()  # type: ignore[attr-defined]  # what others want to be done at their end
    finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    if threads := order["environment"].get("OMP_NUM_THREADS"):
        sys.modules["torch"].set_num_threads(int(threads))


def _execute(words: Sequence[str]) -> None:
    """Run ``-c code``, ``-m module`` or a file, with its arguments."""
    first, *rest = words
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102  # a test's own code
    elif first == "-m":
        sys.argv = rest
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def _code(said: object) -> int:
    """The exit code that ``sys.exit`` means."""
    if said is None or isinstance(said, int):
        return said or 0
    print(said, file=sys.stderr)  # noqa: T201  # as the interpreter does
    return 1
