"""What ``sandbox.py`` starts: restricts this process, then runs foreign code in it. Not for use by hand.

It reads its orders as JSON from stdin, writes the guards that are in force as its first line, runs the parts in one
namespace, and writes a verdict as it exits. Both lines open with words that the code cannot know beforehand.

The audit hook works wherever Python does, and is a guard rail, not a wall: it sees what Python itself does, code that
is bent on getting round it can, and it cannot tell what native code does. The walls are in ``kernel_guards.py``.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import errno
import json
import linecache
import os
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

_HERE = os.path.abspath(__file__)  # noqa: PTH100 (pathlib costs a third of the start)
_FOLDER = os.path.realpath(os.getcwd())  # noqa: PTH109 (the same)
_LIBRARY = os.path.dirname(os.__file__) + os.sep  # noqa: PTH120 (the same)
_FRAMES = 8  # of a traceback, the last ones
_REPR = 200  # characters of a value in a failed assertion
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# What stays readable: the interpreter with its libraries, what its C library looks up, time zones, randomness.
READABLE = (
    *(path for path in (sys.base_prefix, sys.base_exec_prefix, *sys.path) if path),
    *("/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/lib", "/lib64", "/System/Library"),
    *("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero"),
)


class Refused(PermissionError):
    """The audit hook refused something."""


def main() -> None:
    """Follow the orders on stdin."""
    orders = json.loads(sys.stdin.buffer.read())
    os.environ.clear()  # Python itself puts LC_CTYPE into an empty one
    _close_stdin()
    answers = os.dup(1)  # the code may do with stdout what it likes
    verdict = {"status": "ended"}  # neither its end nor an exception was seen

    def report() -> None:
        with contextlib.suppress(OSError):  # the code may have closed it
            os.write(answers, f"\n{orders['closing']} {json.dumps(verdict)}\n".encode())

    def out_of_memory() -> None:
        verdict["status"] = "memory"
        report()
        os._exit(1)

    module = sys.modules[orders["module"]] = types.ModuleType(orders["module"])
    atexit.register(report)  # the first to be registered is the last to be called
    guards = restrict(orders, out_of_memory)
    os.write(answers, f"{orders['opening']} {json.dumps(guards)}\n".encode())
    execute(orders["parts"], module.__dict__, verdict, explain=orders["explain"])


def _close_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def restrict(orders: dict[str, Any], out_of_memory: Callable[[], None]) -> list[str]:
    """Put the guards that were asked for on this process; the names of those that are in force."""
    sys.path.insert(0, os.path.dirname(_HERE))  # noqa: PTH120 (see above)
    import kernel_guards as kernel

    sys.path[0] = _FOLDER
    kernel.die_with_parent()
    wanted, force = orders["guards"], []
    if "limits" in wanted and kernel.limit(orders["memory"], orders["cpu"], orders["file"]):
        force.append("limits")
    if "landlock" in wanted and kernel.landlock(_FOLDER, READABLE):
        force.append("landlock")
    if "seccomp" in wanted and kernel.seccomp():
        force.append("seccomp")
    elif "limits" in force:
        kernel.forbid_processes()
    counted = sys.platform == "linux" and "limits" in force  # by the kernel
    if "watchdog" in wanted and not counted and watch_memory(orders["memory"], out_of_memory):
        force.append("watchdog")
    if "audit" in wanted:
        sys.addaudithook(_Audit(_FOLDER))
        force.append("audit")
    for name in [name for name in sys.modules if name.partition(".")[0] in {"ctypes", "_ctypes", "kernel_guards"}]:
        del sys.modules[name]  # a new import asks the audit hook
    return force


def execute(
    parts: Iterable[tuple[str, str]], namespace: dict[str, Any], verdict: dict[str, str], *, explain: bool
) -> None:
    """Run the parts one after the other in one namespace; what ends them goes to stderr and into the verdict."""
    reserve = bytearray(1 << 20)
    namespace["__explain__"] = _explain
    try:
        for name, source in parts:
            linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
            tree: Any = compile(source, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
            if explain:
                tree = ast.fix_missing_locations(_Explained().visit(tree))
            exec(compile(tree, name, "exec", dont_inherit=True), namespace)  # noqa: S102 (what a sandbox is for)
    except SystemExit:
        verdict["status"] = "exit"
        raise
    except MemoryError as error:
        error.__traceback__ = None  # its frames hold what filled the memory
        namespace.clear()
        reserve.clear()
        verdict["status"] = "memory"
    except BaseException as error:  # noqa: BLE001 (whatever it is, the code ends with it)
        verdict["status"] = "refused" if _was_refused(error) else "failed"
        _show(error)
    else:
        verdict["status"] = "passed"
        return
    sys.exit(1)


def _was_refused(error: BaseException | None) -> bool:
    """Whether a guard's refusal is behind an exception."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, PermissionError) and error.errno in {errno.EPERM, errno.EACCES}:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _show(error: BaseException) -> None:
    """Write the traceback to stderr: the code's own frames, the last of the library, no absolute names of files."""
    try:
        told = traceback.TracebackException(type(error), error, error.__traceback__)
        behind: traceback.TracebackException | None = told
        while behind is not None:
            behind.stack = traceback.StackSummary.from_list(_telling(list(behind.stack)))
            behind = behind.__cause__ or behind.__context__
        text = "".join(told.format())
    except Exception as trouble:  # noqa: BLE001 (the exception's own code may fail)
        text = f"{type(error).__name__}, which could not be shown: {type(trouble).__name__}\n"
    text = text.replace(_FOLDER + os.sep, "").replace(_LIBRARY, "")
    os.write(2, text.encode("utf-8", "replace"))


def _telling(stack: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    stack = [frame for frame in stack if frame.filename != _HERE]
    own = [frame for frame in stack[:-1] if not frame.filename.startswith((_LIBRARY, "<frozen"))]
    return [*own, *stack[-1:]][-_FRAMES:]


# ------------------------------------------------------------------------------------------------- assertions

_SIGNS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_SIGNS |= {ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in"}


class _Explained(ast.NodeTransformer):
    """``assert f(2) == 4`` gets a message that has both values."""

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        test = node.test
        if node.msg is None and isinstance(test, ast.Compare) and len(test.ops) == 1:
            names = ("__left__", "__right__")
            sides = [
                ast.NamedExpr(ast.Name(name, ast.Store()), value)
                for name, value in zip(names, (test.left, test.comparators[0]), strict=True)
            ]
            node.test = ast.copy_location(ast.Compare(sides[0], test.ops, [sides[1]]), test)
            values = [*(ast.Name(name, ast.Load()) for name in names), ast.Constant(_SIGNS[type(test.ops[0])])]
            node.msg = ast.copy_location(ast.Call(ast.Name("__explain__", ast.Load()), values, []), test)
        return node


def _explain(left: object, right: object, sign: str) -> str:
    return f"{_shortened(left)} {sign} {_shortened(right)} does not hold"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _REPR else text[: _REPR // 2] + " … " + text[-_REPR // 2 :]


# ------------------------------------------------------------------------------------------------ memory, audit


def watch_memory(limit: int, out_of_memory: Callable[[], None]) -> bool:
    """End the process soon after it has held ``limit`` bytes: for systems that do not bound its addresses."""
    held = _memory_held()
    if held is None or held() > limit:
        return False

    def watch() -> None:
        while held() <= limit:
            time.sleep(0.02)
        out_of_memory()

    threading.Thread(target=watch, daemon=True).start()
    return True


def _memory_held() -> Callable[[], int] | None:
    """What measures the bytes that this process holds, or held at most; None where nothing does."""
    if sys.platform == "win32":
        return None
    import resource

    if sys.platform != "linux":  # bytes on macOS; elsewhere KiB, which makes the limit too kind
        return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(OSError):  # under Landlock it cannot be opened; ru_maxrss would count the parent's
        statm, page = os.open("/proc/self/statm", os.O_RDONLY), resource.getpagesize()
        return lambda: int(os.pread(statm, 64, 0).split()[1]) * page
    return None


_AF_UNIX = 1
_REFUSED_FAMILIES = {"socket", "ctypes", "winreg", "syslog"}
_REFUSED = {
    *("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"),
    *("os.startfile", "os.startfile/2", "os.kill", "os.killpg", "pty.spawn", "webbrowser.open"),
    *("gc.get_objects", "gc.get_referrers", "gc.get_referents", "resource.setrlimit", "resource.prlimit"),
    *("sqlite3.enable_load_extension", "sqlite3.load_extension"),
}
_LOOKS = {"os.listdir", "os.scandir", "os.chdir"}  # their path stands first
_CHANGES: dict[
    str, tuple[tuple[int, ...], tuple[int, ...]]
] = {  # which arguments are paths, and descriptors to start from
    "os.remove": ((0,), (1,)),
    "os.rmdir": ((0,), (1,)),
    "os.mkdir": ((0,), (2,)),
    "os.chmod": ((0,), (2,)),
    "os.chown": ((0,), (3,)),
    "os.utime": ((0,), (3,)),
    "os.symlink": ((1,), (2,)),
    "os.rename": ((0, 1), (2, 3)),
    "os.link": ((0, 1), (2, 3)),
    "os.truncate": ((0,), ()),
    "os.setxattr": ((0,), ()),
    "os.removexattr": ((0,), ()),
    "os.chflags": ((0,), ()),
    "sqlite3.connect": ((0,), ()),
}
_OF_THE_LINK = {"os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink"}  # they follow no last link
_NO_FILE = ("", b"", ":memory:", b":memory:")  # for sqlite3


class _Audit:
    """The hook. What it needs is bound beforehand, so that replacing ``os.path.realpath`` does not blind it."""

    def __init__(self, folder: str) -> None:
        self._path, self._sep = (os.path.realpath, os.path.normcase, os.path.split, os.path.isdir), os.sep
        self._writable = tuple(os.path.normcase(os.path.realpath(path)) for path in (folder, os.devnull))
        self._readable = self._writable + tuple(os.path.normcase(os.path.realpath(path)) for path in READABLE)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._open(*arguments)
        elif event in _CHANGES:
            self._change(event, arguments)
        elif event in _LOOKS:
            if not isinstance(arguments[0], int) and not self._below(arguments[0] or ".", self._readable):
                self._refuse(event, arguments[0])
        elif event == "socket.__new__":
            if arguments[1] != _AF_UNIX:  # asyncio wakes its loop through a pair of these
                self._refuse(event)
        elif event in _REFUSED or event.partition(".")[0] in _REFUSED_FAMILIES:
            self._refuse(event)

    def _open(self, path: Any, _: object, flags: int) -> None:
        if isinstance(path, int) or path is None:
            return
        is_folder = self._path[3](path)  # what is opened relative to a folder would go unseen
        if not self._below(path, self._writable if flags & _WRITES or is_folder else self._readable):
            self._refuse("open", path)

    def _change(self, event: str, arguments: tuple[Any, ...]) -> None:
        paths, starts = _CHANGES[event]
        if event == "sqlite3.connect" and arguments[0] in _NO_FILE:
            return
        links = event in _OF_THE_LINK
        path: Any
        for path, start in zip_longest((arguments[i] for i in paths), (arguments[i] for i in starts), fillvalue=-1):
            if start not in {-1, None}:  # an open folder, which lies inside: see _open; plain names stay in it
                if not links or os.fsdecode(path) in {".", ".."} or self._sep in os.fsdecode(path):
                    self._refuse(event, path)
            elif not isinstance(path, int) and not self._below(path, self._writable, links):
                self._refuse(event, path)

    def _below(self, path: Any, roots: tuple[str, ...], of_the_link: bool = False) -> bool:  # noqa: FBT001, FBT002 (hot)
        real, normal, split, _ = self._path
        path = os.fsdecode(path)
        if of_the_link:
            parent, name = split(path.rstrip(self._sep))
            path = normal(real(parent or ".") + self._sep + name)
            return any(path.startswith(root + self._sep) for root in roots)  # the folder itself stays where it is
        path = normal(real(path))
        return any(path == root or path.startswith(root + self._sep) for root in roots)

    @staticmethod
    def _refuse(event: str, what: object = None) -> None:
        raise Refused(errno.EPERM, f"the sandbox refuses {event}", *([what] if isinstance(what, (str, bytes)) else []))


if __name__ == "__main__":
    main()
