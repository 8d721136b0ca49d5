"""Where the idle memories of one runtime go: a private folder that has an owner, and none outlives its owner for long.

Several processes may share the folder above. A runtime holds a lock on its own folder's lock file while it lives; the
system frees it when the process dies, and the next runtime that comes deletes what has no owner any more.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

_SHARED: Final = "spill.lock"
_OWNER: Final = "owner.lock"
_PREFIX: Final = "agentmem-runtime-"
_SECONDS: Final = 60.0


class Spill:
    """One runtime's folder below a shared one; made when first needed."""

    def __init__(self, above: Path) -> None:
        """Touch nothing yet but what runtimes that are gone have left below ``above``, if it is there."""
        self._above = above
        self._path: Path | None = None
        self._owner: FileLock | None = None
        if above.is_dir():
            with suppress(OSError), self._alone():
                _sweep(above)

    def folder(self) -> Path:
        """The folder, which only this user can read.

        Raises:
            OSError: it cannot be made.

        """
        if self._path is None:
            self._above.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._alone():  # nobody sweeps before it has its owner
                _sweep(self._above)
                path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._above))
                owner = FileLock(path / _OWNER, mode=0o600)
                owner.acquire(timeout=0)
                self._path, self._owner = path, owner
        return self._path

    def close(self) -> None:
        """Delete the folder and what is in it."""
        path, owner, self._path, self._owner = self._path, self._owner, None, None
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        if owner is not None:
            owner.release()

    def _alone(self) -> FileLock:
        return FileLock(self._above / _SHARED, timeout=_SECONDS, mode=0o600)


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
