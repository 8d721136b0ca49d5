"""Where the idle memories of one runtime go: a private folder that has an owner, and none outlives its owner for long.

Several processes may share the folder above. A runtime holds a lock on its own folder's lock file while it lives; the
system frees it when the process dies, and the next runtime that comes deletes what has no owner any more. A forked
process owns nothing of its parent's: it makes a folder of its own and deletes no other.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final
from weakref import finalize

from filelock import FileLock, Timeout

_SHARED: Final = "spill.lock"
_OWNER: Final = "owner.lock"
_PREFIX: Final = "agentmem-runtime-"
_SECONDS: Final = 60.0
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


class Spill:
    """One runtime's folder below a shared one; made when first needed, deleted with this at the latest."""

    def __init__(self, above: Path | None = None) -> None:
        """Touch nothing yet but what runtimes that are gone have left below ``above``, if it is there.

        Without ``above`` it is this user's folder among the system's temporary ones.
        """
        self._private = above is None
        self._above = _of_this_user() if above is None else above
        self._path: Path | None = None
        self._owner: FileLock | None = None
        self._end: finalize[..., Spill] | None = None
        self._process = os.getpid()
        if self._above.is_dir():
            with suppress(OSError):
                self._check()
                with self._alone():
                    _sweep(self._above)

    def folder(self) -> Path:
        """The folder, which only this user can read.

        Raises:
            OSError: it cannot be made.

        """
        if self._process != os.getpid():
            self._forget()
        if self._path is None:
            self._above.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check()
            with self._alone():  # nobody sweeps before it has its owner
                _sweep(self._above)
                path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._above))
                self._end = finalize(self, _delete, path, self._process)  # a runtime that nobody closes, too
                owner = FileLock(path / _OWNER, mode=0o600)
                owner.acquire(timeout=0)
                self._path, self._owner = path, owner
        return self._path

    def close(self) -> None:
        """Delete the folder and what is in it."""
        end, owner, self._path, self._owner, self._end = self._end, self._owner, None, None, None
        if end is not None:
            end()
        if owner is not None and self._process == os.getpid():
            owner.release()

    def _forget(self) -> None:
        """Own nothing: what there is, is the process's that this one was forked from."""
        self._path = self._owner = self._end = None
        self._process = os.getpid()

    def _check(self) -> None:
        """Refuse a folder of the usual name that somebody else has made or can read.

        Raises:
            OSError: it is not this user's alone.

        """
        if not self._private or not hasattr(os, "getuid"):
            return
        about = self._above.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & _OTHERS:
            raise OSError(f"{self._above} is not a folder of this user alone; name another one (spill=...)")

    def _alone(self) -> FileLock:
        return FileLock(self._above / _SHARED, timeout=_SECONDS, mode=0o600)


def _of_this_user() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "spill"  # Windows has temporary folders for each user
    return Path(tempfile.gettempdir()) / f"agentmem-{user}"


def _delete(path: Path, process: int) -> None:
    if process == os.getpid():
        shutil.rmtree(path, ignore_errors=True)


def _sweep(above: Path) -> None:
    """Delete the folders whose owner is gone."""
    for path in above.glob(f"{_PREFIX}*"):
        if path.is_symlink() or not path.is_dir():
            continue
        owner = FileLock(path / _OWNER, mode=0o600)
        try:
            owner.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        try:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            owner.release()
