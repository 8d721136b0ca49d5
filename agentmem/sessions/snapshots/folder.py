"""The places of snapshots: local folders, whose files are flushed to the disk, and stores that fsspec can reach."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

LOCK = "snapshot.lock"
LOCK_SECONDS = 60.0
"""Seconds that a save waits for another save into the same local folder."""

_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Flags for opening a file to read: follow no symbolic link, and do not wait for the other end of a pipe."""


def _private(name: str, flags: int) -> int:
    """Open a file with permissions for this user only, since snapshots contain conversations."""
    return os.open(name, flags, 0o600)


class Folder(ABC):
    """A folder for snapshots. A save writes files under new names and makes them valid by one rename.

    Methods raise OSError, or ValueError if a name belongs to something that is not a regular file.
    """

    def __init__(self, shown: str, *, exclusive: bool) -> None:
        """Store the folder's name for error messages (``shown``), and whether :meth:`saving` keeps other savers out."""
        self.shown, self.exclusive = shown, exclusive

    @abstractmethod
    def saving(self) -> AbstractContextManager[None]:
        """Return a context manager for a save, which makes the folder and, if ``exclusive``, keeps other savers out."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all files in the folder."""

    @abstractmethod
    def read(self, name: str) -> AbstractContextManager[tuple[BinaryIO, int]]:
        """Return a context manager that opens the file ``name`` and gives its stream and its size in bytes."""

    @abstractmethod
    def write(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        """Write the blocks to a new file ``name`` and store the file durably."""

    @abstractmethod
    def publish(self, scratch: str, name: str) -> None:
        """Rename the file ``scratch`` to ``name``; an older file of this name is replaced.

        Before the rename, everything written to the folder so far is stored durably, if the folder can ensure this.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete the file ``name``."""


class LocalFolder(Folder):
    """A folder on this machine. Only one save runs at a time, and each step is on the disk before the next begins."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), exclusive=True)
        self.path = path.absolute()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Return a context manager that makes the folder and holds the folder's lock during the ``with`` block.

        If the process dies, the system frees the lock.
        """
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _sync(folder.parent)
        lock = FileLock(self.path / LOCK, timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            raise TimeoutError(f"another save into it has held {LOCK} for {LOCK_SECONDS:g} s") from None
        try:
            yield
        finally:
            lock.release()

    def names(self) -> list[str]:
        """Return the names of all files in the folder."""
        return [path.name for path in self.path.iterdir()]

    @contextmanager
    def read(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """Return a context manager that opens a file and gives its stream and its size in bytes.

        Symbolic links and everything else that is not a regular file are refused.
        """
        path = self.path / name
        if path.is_symlink():
            raise ValueError(f"{name} is a symbolic link; a snapshot holds plain files only")
        with open(path, "rb", buffering=0, opener=lambda name, _: os.open(name, _OPEN)) as stream:
            about = os.fstat(stream.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ValueError(f"{name} is no plain file")
            yield stream, about.st_size

    def write(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        """Write the blocks to a new file and flush it to the disk."""
        with open(self.path / name, "xb", opener=_private) as file:
            for block in blocks:  # noqa: FURB122  # one call for each block: a fault may come between two calls
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def publish(self, scratch: str, name: str) -> None:
        """Rename the file, and flush the folder's names to the disk both before and after the rename."""
        _sync(self.path)
        os.replace(self.path / scratch, self.path / name)  # noqa: PTH105  # one system call, whatever pathlib does
        _sync(self.path)

    def remove(self, name: str) -> None:
        """Delete the file ``name``."""
        (self.path / name).unlink()


class StoreFolder(Folder):
    """A folder in a store that fsspec can reach.

    The folder has no lock, the store decides when to flush, and a rename may be carried out as a copy.
    """

    def __init__(self, store: AbstractFileSystem, root: str) -> None:
        super().__init__(store.unstrip_protocol(root), exclusive=False)
        self.store, self.root = store, root.rstrip("/")

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Return a context manager that creates the folder; other savers are not kept out.

        In stores without real folders, such as most object stores, creating the folder does nothing.
        """
        with _store_faults():
            self.store.makedirs(self.root, exist_ok=True)
        yield

    def names(self) -> list[str]:
        """Return the names of all files in the folder, read anew from the store."""
        with _store_faults():
            self.store.invalidate_cache(self.root)
            return [path.rstrip("/").rpartition("/")[2] for path in self.store.ls(self.root, detail=False)]

    @contextmanager
    def read(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """Return a context manager that opens an object and gives its stream and the size that the store reports."""
        path = f"{self.root}/{name}"
        with _store_faults():
            self.store.invalidate_cache(self.root)
            about = self.store.info(path)
            if about.get("type") != "file" or not isinstance(about.get("size"), int):
                raise ValueError(f"{name} is no file whose size the store tells")
            with self.store.open(path, "rb") as stream:
                yield stream, about["size"]

    def write(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        """Write the blocks to an object ``name``, which is complete once the store has closed its file."""
        with _store_faults(), self.store.open(f"{self.root}/{name}", "wb") as file:
            for block in blocks:
                file.write(block)

    def publish(self, scratch: str, name: str) -> None:
        """Rename the object ``scratch`` to ``name``.

        Most object stores copy the object, which appears as a whole under its new name, and then delete the old one.
        """
        with _store_faults():
            self.store.mv(f"{self.root}/{scratch}", f"{self.root}/{name}")

    def remove(self, name: str) -> None:
        """Delete the object ``name``."""
        with _store_faults():
            self.store.rm_file(f"{self.root}/{name}")


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return the path with a leading ``~`` or ``~user`` expanded; ``~user`` is not expanded for an unknown user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser fails where there is no such user


def open_folder(url: str | os.PathLike[str]) -> Folder:
    """Return the folder at a path (``~`` is the user's home) or at a URL, without reading or making anything.

    A ``file://`` URL gives a local folder.

    Raises:
        ValueError: fsspec does not know the protocol.
        OSError: the protocol needs a package that is not installed, or the store cannot be reached.

    """
    text = os.fspath(url)
    if "://" not in text:
        return LocalFolder(local_path(text))
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    with _store_faults():
        store, root = url_to_fs(text)
        return LocalFolder(Path(root)) if isinstance(store, LocalFileSystem) else StoreFolder(store, root)


def _sync(folder: Path) -> None:
    """Flush the file names in a folder to the disk, if the system can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the answer of network file systems that flush names by themselves
            raise
    finally:
        with suppress(OSError):
            os.close(descriptor)


@contextmanager
def _store_faults() -> Iterator[None]:
    """Return a context manager that turns exceptions specific to a store into OSError.

    OSError and ValueError pass unchanged.
    """
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
