"""Run Python code that nobody has read: in a process of its own, in a folder of its own, under limits.

    outcome = run("print(6 * 7)")                                   # passed: 42
    outcome = check("def f(x): return x", "assert f(2) == 4")       # failed: AssertionError: 2 == 4 does not hold

What stops what (``Outcome.guards`` names what was in force; each is optional, none needs root):

- always: the wall clock, a bound on output, on the folder and (Linux) on threads; the whole process group is killed; no
  stdin, no environment, no site-packages, a folder that is removed afterwards;
- ``limits``: memory, CPU time, size of a file, open files; no capabilities (POSIX; memory is enforced on Linux only);
- ``landlock``: no file is written outside the folder, and none read but the interpreter's own (Linux ≥ 5.13);
- ``seccomp``: only the system calls that Python needs: no sockets, processes, signals or priorities of others, changes
  of modes or owners (Linux on x86_64 and aarch64);
- ``watchdog``: a thread that measures memory, where ``limits`` cannot bound it;
- ``audit``: Python's audit hook refuses the same, everywhere. It is a guard rail, **not a security boundary**.

With ``landlock`` and ``seccomp`` the kernel itself refuses, native code included; what is left is to learn whether a
path exists, and to use one's seconds. Without them, on macOS and Windows, code that is bent on getting out gets out:
use a container or a virtual machine there. Every 20 ms the process is stopped for as long as it takes to count its
threads and its files, removed ones that are still open too: it can pass a bound by as much as it does in between.
``check`` is not fooled by code that exits early or prints what a passing test prints. A solution runs in the process
of its tests, though: one that is bent on it can replace what the tests call, or find the harness in its memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from support.holdings import measure

Status = Literal["passed", "failed", "timeout", "memory", "output", "disk", "threads", "refused"]

MIB = 1 << 20
GUARDS = ("limits", "landlock", "seccomp", "watchdog", "audit")
_JAIL = Path(__file__).with_name("jail.py")
_MIN_MEMORY = 64 * MIB
_DISK = 16 * MIB  # of the folder, and of each file
_ENTRIES = 1000  # files and folders in the folder
_THREADS = 64  # that run at a time
_FLOOD = 16  # output is read up to this many times what is kept
_POLL = 0.02  # seconds
_START = 60.0  # seconds that the interpreter may take to start, on a busy machine


class SandboxBroken(RuntimeError):
    """The process died before it ran any of the code."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    ``exit_code`` is negative for a signal. ``text`` is stdout and stderr, with a note where its middle was left out and
    a last line that says why the run was stopped. ``seconds`` are those of the code, without the interpreter's start.
    """

    status: Status
    exit_code: int
    text: str
    seconds: float
    guards: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether it ran to its end, and its tests, if it had any, passed."""
        return self.status == "passed"


def run(
    code: str,
    *,
    files: Mapping[str, str] | None = None,
    seconds: float = 5,
    memory: int = 512 * MIB,
    output: int = 64 << 10,
    guards: Collection[str] = GUARDS,
) -> Outcome:
    """Run a program as ``python main.py`` would. An exit code of 0 passes, ``sys.exit(0)`` included.

    Args:
        code: the program; what it imports is the standard library and ``files``.
        files: relative name → text, put into its folder beforehand.
        seconds: wall-clock limit; its CPU time has the next whole second but one.
        memory: bytes of address space, the interpreter's own 30 MiB included; at least 64 MiB.
        output: bytes of output that are kept, the first and the last half; 16 times as much stops the run.
        guards: those of ``GUARDS`` to use where this machine has them.

    Raises ValueError for a file outside the folder, too little memory or an unknown guard; SandboxBroken.
    """
    return _run([("main.py", code)], files or {}, _Limits(seconds, memory, output), guards, tested=False)


def check(
    solution: str,
    tests: str,
    *,
    entry_point: str | None = None,
    files: Mapping[str, str] | None = None,
    seconds: float = 5,
    memory: int = 512 * MIB,
    lines: int = 20,
    guards: Collection[str] = GUARDS,
) -> Outcome:
    """Run a solution against its tests: plain asserts, or with ``entry_point`` a ``check(candidate)`` as in HumanEval.

    Passed is what reached the end of the tests; the process says so with words that the solution cannot know. A failed
    ``assert a == b`` without a message gets both values. Of the text only the last ``lines`` are given. The rest as
    in ``run``.
    """
    call = f"\n\ncheck({entry_point})\n" if entry_point else ""
    parts = [("solution.py", solution), ("tests.py", tests + call)]
    outcome = _run(parts, files or {}, _Limits(seconds, memory, 16 << 10), guards, tested=True)
    last = outcome.text.splitlines()[-lines:]
    return Outcome(outcome.status, outcome.exit_code, "\n".join(last), outcome.seconds, outcome.guards)


@dataclass(frozen=True)
class _Limits:
    seconds: float
    memory: int
    output: int

    def __post_init__(self) -> None:
        if self.memory < _MIN_MEMORY:
            raise ValueError(
                f"memory {self.memory} bytes is too little for the interpreter; give {_MIN_MEMORY} or more"
            )


def _run(
    parts: Sequence[tuple[str, str]],
    files: Mapping[str, str],
    limits: _Limits,
    guards: Collection[str],
    *,
    tested: bool,
) -> Outcome:
    if unknown := set(guards) - set(GUARDS):
        raise ValueError(f"unknown guard {min(unknown)!r}; there are {', '.join(GUARDS)}")
    opening, closing = secrets.token_hex(16), secrets.token_hex(16)
    orders = {"parts": parts, "explain": tested, "module": "solution" if tested else "__main__", "file": _DISK}
    orders |= {"opening": opening, "closing": closing, "guards": list(guards)}
    orders |= {"memory": limits.memory, "cpu": math.ceil(limits.seconds) + 1}
    with _folder(files) as folder, _started(folder, orders) as process:
        output = _Output(process, limits.output)
        stopped = _watch(process, output, folder, limits)
        _kill(process)
        output.join(timeout=1)
        seconds = time.monotonic() - (output.opened or time.monotonic())
    said = output.said(opening, closing)
    if said.guards is None:
        raise SandboxBroken(
            f"{_JAIL.name} ended with exit code {process.returncode} before the code: {said.text[-500:]}"
        )
    if output.flooded:  # it may have ended before the watch saw that
        stopped = stopped or "output"
    status = stopped or _status(said.verdict, process.returncode, tested=tested)
    text = said.text
    if reason := _reason(status, said.verdict, process.returncode, limits):
        text += ("" if not text or text.endswith("\n") else "\n") + f"[{reason}]\n"
    return Outcome(status, process.returncode, text, seconds, said.guards)


def _status(verdict: str | None, exit_code: int, *, tested: bool) -> Status:
    """The status of a run that ended by itself."""
    if sys.platform != "win32" and exit_code == -signal.SIGXCPU:
        return "timeout"
    by_verdict: dict[str | None, Status] = {"memory": "memory", "refused": "refused"}
    if verdict in by_verdict:
        return by_verdict[verdict]
    done = verdict == "passed" or not tested
    return "passed" if done and exit_code == 0 else "failed"


def _reason(status: Status, verdict: str | None, exit_code: int, limits: _Limits) -> str | None:
    """The last line of the text, for what the code itself did not say."""
    reasons: dict[str, str] = {
        "timeout": f"stopped: still running after {limits.seconds:g} s",
        "output": f"stopped: it printed more than {_FLOOD * limits.output} bytes",
        "disk": f"stopped: more than {_DISK // MIB} MiB or {_ENTRIES} files in its folder",
        "threads": f"stopped: more than {_THREADS} threads at a time",
        "memory": f"out of memory: the limit is {limits.memory // MIB} MiB",
        "refused": "refused by the sandbox: it may only use its own folder, no network and no other process",
    }
    if status == "failed" and exit_code < 0:
        reasons["failed"] = f"killed by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    elif status == "failed" and exit_code == 0:
        reasons["failed"] = f"ended with exit code 0 before its tests had passed ({verdict or 'no word from it'})"
    return reasons.get(status)


# ------------------------------------------------------------------------------------------------ the process


@contextlib.contextmanager
def _started(folder: Path, orders: Mapping[str, object]) -> Iterator[subprocess.Popen[bytes]]:
    """The interpreter with its orders on stdin; killed with its group when the block ends, however it ends."""
    command = [sys.executable, "-I", "-S", "-B", "-u", "-X", "utf8", str(_JAIL.resolve())]
    environment = {"SYSTEMROOT": os.environ["SYSTEMROOT"]} if sys.platform == "win32" else {}
    with tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(orders).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all of its group."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: the group holds only the dead
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _watch(process: subprocess.Popen[bytes], output: _Output, folder: Path, limits: _Limits) -> Status | None:
    """Wait for the end, or for a limit to be crossed."""
    start = time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL)
            return None
        deadline = output.opened + limits.seconds if output.opened else start + _START
        if time.monotonic() >= deadline:
            return "timeout"
        if output.flooded:
            return "output"
        if crossed := _crossed(process.pid, folder):
            return crossed


def _crossed(pid: int, folder: Path) -> Status | None:
    """Which bound on what the process holds is crossed; a folder that cannot be looked through is too large."""
    try:
        held = measure(pid, folder, _DISK, _ENTRIES)
    except OSError:
        return "disk"
    if held.threads > _THREADS:
        return "threads"
    return "disk" if held.size > _DISK or held.entries > _ENTRIES else None


@dataclass(frozen=True)
class _Said:
    guards: tuple[str, ...] | None
    verdict: str | None
    text: str


class _Output(threading.Thread):
    """Reads what a process prints, keeps the first and the last of it, and stops reading when it is a flood."""

    _LINES = 512  # bytes of the first and the last line, which are not the code's

    def __init__(self, process: subprocess.Popen[bytes], keep: int) -> None:
        super().__init__(daemon=True)
        assert process.stdout is not None  # noqa: S101 (opened as a pipe)
        self._pipe = process.stdout
        self._half = keep // 2 + self._LINES
        self._head, self._tail = bytearray(), bytearray()
        self._total, self._most = 0, _FLOOD * keep
        self.opened: float | None = None
        self.flooded = False
        self.start()

    def run(self) -> None:
        """Read to the end, or to the limit; close the pipe, which nobody else may while a read waits."""
        with self._pipe:
            while chunk := os.read(self._pipe.fileno(), 1 << 16):
                self._take(chunk)
                if self._total > self._most:
                    self.flooded = True
                    return

    def _take(self, chunk: bytes) -> None:
        self._total += len(chunk)
        room = self._half - len(self._head)
        self._head += chunk[:room]
        self._tail += chunk[room:]
        del self._tail[: -self._half]
        if self.opened is None and b"\n" in self._head:
            self.opened = time.monotonic()

    def said(self, opening: str, closing: str) -> _Said:
        """Take apart what was read: the guards, the verdict, and the code's own output."""
        left_out = self._total - len(self._head) - len(self._tail)
        note = f"\n[… {left_out} bytes left out …]\n" if left_out else ""
        text = self._head.decode("utf-8", "replace") + note + self._tail.decode("utf-8", "replace")
        first = re.match(rf"{opening} (.*)\n", text)
        if not first:
            return _Said(None, None, text)
        text = text[first.end() :]
        verdict = None
        if last := re.search(rf"\n{closing} (.*)\n", text):
            verdict = json.loads(last[1])["status"]
            text = text[: last.start()] + text[last.end() :]
        return _Said(tuple(json.loads(first[1])), verdict, text)


# ------------------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def _folder(files: Mapping[str, str]) -> Iterator[Path]:
    """A new folder with these files, removed with all that was put there since."""
    for name in files:
        pure = PurePosixPath(name.replace("\\", "/"))
        if pure.is_absolute() or ".." in pure.parts or ":" in name or not pure.parts:
            raise ValueError(f"file {name!r} lies outside the folder; give a relative name without '..'")
    folder = Path(tempfile.mkdtemp(prefix="sandbox-")).resolve()
    try:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a folder however deep it is, whatever modes are in it; nothing that a link points to."""
    if folder.is_symlink():  # it was replaced
        folder.unlink()
    elif sys.platform == "win32":
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.chmod(0o700)
        _empty(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
        folder.rmdir()


def _empty(here: int) -> None:
    """Delete all below an open folder, one descriptor at a time: names of any length, no recursion. It gets closed."""
    waiting = [_without_files(here)]  # from the top down to here: the folders that each still holds
    while waiting:
        inward = bool(waiting[-1])
        name = waiting[-1][-1] if inward else ".."
        if inward:
            os.chmod(name, 0o700, dir_fd=here)
        elif len(waiting) == 1:
            break
        there = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
        os.close(here)
        here = there
        if inward:
            waiting.append(_without_files(here))
        else:
            waiting.pop()
            os.rmdir(waiting[-1].pop(), dir_fd=here)
    os.close(here)


def _without_files(here: int) -> list[str]:
    """Delete what is no folder in an open folder; the names of the folders."""
    with os.scandir(here) as found:
        kinds = {entry.name: entry.is_dir(follow_symlinks=False) for entry in found}
    for name, is_folder in kinds.items():
        if not is_folder:
            os.unlink(name, dir_fd=here)
    return [name for name, is_folder in kinds.items() if is_folder]
