"""Spill folders: each runtime has a private folder for its idle memories on disk.

The private folders of several processes may be in one shared folder. A runtime holds a lock on a file in its private
folder until it is closed. If its process dies, the system frees the lock, and the next runtime deletes all private
folders whose lock is free. A forked process makes a private folder of its own and does not delete its parent's folder.
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
    """The private folder of one runtime below a shared folder.

    The folder is made when it is first needed. It is deleted by :meth:`close`, or at the latest when this object is
    garbage-collected.
    """

    def __init__(self, above: Path | None = None) -> None:
        """Delete the folders that dead runtimes have left in the shared folder ``above``; make no folder yet.

        The default for ``above`` is a folder of this user in the system's temporary folder. Nothing is deleted if the
        shared folder does not exist.
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
        """Return the private folder, which only this user can read; make it first if necessary.

        Raises:
            OSError: the folder cannot be made.

        """
        if self._process != os.getpid():
            self._forget()
        if self._path is None:
            self._above.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check()
            with self._alone():  # so that no other runtime deletes the new folder before its lock is held
                _sweep(self._above)
                path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._above))
                self._end = finalize(self, _delete, path, self._process)  # in case nobody closes the runtime
                owner = FileLock(path / _OWNER, mode=0o600)
                owner.acquire(timeout=0)
                self._path, self._owner = path, owner
        return self._path

    def close(self) -> None:
        """Delete the private folder and its content."""
        end, owner, self._path, self._owner, self._end = self._end, self._owner, None, None, None
        if end is not None:
            end()
        if owner is not None and self._process == os.getpid():
            owner.release()

    def _forget(self) -> None:
        """In a forked process, forget the folder without deleting it, since it belongs to the parent process."""
        self._path = self._owner = self._end = None
        self._process = os.getpid()

    def _check(self) -> None:
        """Check that the shared folder belongs to this user alone, if it is the default shared folder.

        Raises:
            OSError: the folder does not belong to this user alone.

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
    """Delete those private folders in ``above`` whose lock is free, since their runtimes are gone."""
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
