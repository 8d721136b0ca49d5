"""What a running process holds, measured from outside: the files of its folder, removed files, threads.

While it is measured its process group stands still (``SIGSTOP``, which no process can ignore), so that code which keeps
moving its files about cannot keep them from being counted. Removed files and threads are counted where there is /proc.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 512  # bytes, the unit of st_blocks everywhere
_PROC = Path("/proc")
_PATIENCE = 0.1  # seconds until a group stands still, on a busy machine


@dataclass(frozen=True)
class Holdings:
    """Bytes and entries of the folder, bytes of removed files that are still open or mapped, and threads."""

    size: int
    entries: int
    threads: int


def measure(pid: int, folder: Path, file: int, entries: int) -> Holdings:
    """Measure the leader of a process group that has not been waited for.

    Args:
        pid: the process, a child of this one.
        folder: what it may write to.
        file: the most bytes of one file: what a removed file counts for when its size cannot be known.
        entries: the look through the folder ends when it has found more.

    Raises OSError for a folder that cannot be looked through, which must count as too large.
    """
    with _standing_still(pid):
        size, found = _in_folder(folder, entries)
        try:
            return Holdings(size + _removed(pid, folder, file), found, _threads(pid))
        except (FileNotFoundError, ProcessLookupError):  # it ended, or there is no /proc
            return Holdings(size, found, 1)


@contextlib.contextmanager
def _standing_still(pid: int) -> Iterator[None]:
    """Stop the group and wait until it stands; let it go on afterwards. Systems without waitid measure it moving.

    So is a process that does not stand soon: in the middle of a ``vfork`` it cannot stop before its child goes on, and
    the child is stopped with it.
    """
    if sys.platform == "win32" or not hasattr(os, "waitid"):
        yield
        return
    try:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
            os.killpg(pid, signal.SIGSTOP)
            until = time.monotonic() + _PATIENCE
            while not _stands(pid) and time.monotonic() < until:
                time.sleep(0.001)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGCONT)


def _stands(pid: int) -> bool:
    """Whether a child has stopped or ended."""
    return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _in_folder(folder: Path, most: int) -> tuple[int, int]:
    """Bytes and number of what is below the folder. A name that vanishes meanwhile is passed over, the rest counts."""
    waiting, size, entries = [str(folder)], 0, 0
    while waiting and entries <= most:
        with contextlib.suppress(FileNotFoundError), os.scandir(waiting.pop()) as found:
            for entry in found:
                entries += 1
                with contextlib.suppress(FileNotFoundError):
                    size += _bytes(entry.stat(follow_symlinks=False))
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
    return size, entries


def _bytes(status: os.stat_result) -> int:
    """The larger of a file's length and its space on disk, which may lie beyond its end."""
    return max(status.st_size, getattr(status, "st_blocks", 0) * _BLOCK)


def _removed(pid: int, folder: Path, file: int) -> int:
    """Bytes of files without a name that the process still has open, or mapped into its memory."""
    held = {}
    for descriptor in (_PROC / str(pid) / "fd").iterdir():
        status = descriptor.stat()
        if stat.S_ISREG(status.st_mode) and not status.st_nlink:
            held[status.st_ino] = _bytes(status)
    maps = (_PROC / str(pid) / "maps").read_text(encoding="utf-8", errors="replace")
    for _, _, _, _, inode, *path in (line.split(maxsplit=5) for line in maps.splitlines()):
        if path and path[0].startswith(f"{folder}{os.sep}") and path[0].endswith(" (deleted)"):
            held.setdefault(int(inode), file)
    return sum(held.values())


def _threads(pid: int) -> int:
    return len([*(_PROC / str(pid) / "task").iterdir()])
