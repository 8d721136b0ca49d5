"""Where a snapshot lies: a local folder, written through to the disk, or a store that fsspec reaches."""

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
"""How long a save waits for another save into the same local folder."""

_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Never through a symbolic link, and never waiting for the other end of a pipe."""


def _private(name: str, flags: int) -> int:
    """Open a file that only this user can read: it holds a conversation."""
    return os.open(name, flags, 0o600)


class Folder(ABC):
    """Files that appear under new names, and one rename that makes them count.

    Methods raise OSError, or ValueError for something that is no file.
    """

    def __init__(self, shown: str, *, exclusive: bool) -> None:
        """``shown`` names the folder in messages; ``exclusive``: no other saver is at work within :meth:`saving`."""
        self.shown, self.exclusive = shown, exclusive

    @abstractmethod
    def saving(self) -> AbstractContextManager[None]:
        """Around a save: the folder exists and, if ``exclusive``, belongs to this saver."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of what lies in the folder."""

    @abstractmethod
    def read(self, name: str) -> AbstractContextManager[tuple[BinaryIO, int]]:
        """A stream over the file ``name``, and its bytes."""

    @abstractmethod
    def write(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        """Make the file ``name`` of these blocks; it is on the disk when this returns."""

    @abstractmethod
    def publish(self, scratch: str, name: str) -> None:
        """Rename ``scratch`` over ``name``, after all that was written before."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete the file ``name``."""


class LocalFolder(Folder):
    """A folder of this machine. One saver at a time, and every step is on the disk before the next begins."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), exclusive=True)
        self.path = path.absolute()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Wait for the lock; the system frees the lock of a process that died."""
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
        """Names of what lies in the folder."""
        return [path.name for path in self.path.iterdir()]

    @contextmanager
    def read(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """A stream over a regular file that is no link, and its bytes."""
        path = self.path / name
        if path.is_symlink():
            raise ValueError(f"{name} is a symbolic link; a snapshot holds plain files only")
        with open(path, "rb", buffering=0, opener=lambda name, _: os.open(name, _OPEN)) as stream:
            about = os.fstat(stream.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ValueError(f"{name} is no plain file")
            yield stream, about.st_size

    def write(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        """Make a file that is not there yet, and flush it to the disk."""
        with open(self.path / name, "xb", opener=_private) as file:
            for block in blocks:  # noqa: FURB122  # one call a block: a fault may come between two
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def publish(self, scratch: str, name: str) -> None:
        """Rename; the folder goes to the disk before (the new names in it) and after (the rename)."""
        _sync(self.path)
        os.replace(self.path / scratch, self.path / name)  # noqa: PTH105  # one system call, whatever pathlib does
        _sync(self.path)

    def remove(self, name: str) -> None:
        """Delete the file ``name``."""
        (self.path / name).unlink()


class StoreFolder(Folder):
    """A prefix of a store that fsspec reaches: no lock, no flush but the store's own, and a rename may be a copy."""

    def __init__(self, store: AbstractFileSystem, root: str) -> None:
        super().__init__(store.unstrip_protocol(root), exclusive=False)
        self.store, self.root = store, root.rstrip("/")

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Make the folder, where the store knows folders."""
        with _store_faults():
            self.store.makedirs(self.root, exist_ok=True)
        yield

    def names(self) -> list[str]:
        """Names of what lies in the folder, asked afresh."""
        with _store_faults():
            self.store.invalidate_cache(self.root)
            return [path.rstrip("/").rpartition("/")[2] for path in self.store.ls(self.root, detail=False)]

    @contextmanager
    def read(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """A stream over an object, and its bytes as the store tells them."""
        path = f"{self.root}/{name}"
        with _store_faults():
            self.store.invalidate_cache(self.root)
            about = self.store.info(path)
            if about.get("type") != "file" or not isinstance(about.get("size"), int):
                raise ValueError(f"{name} is no file whose size the store tells")
            with self.store.open(path, "rb") as stream:
                yield stream, about["size"]

    def write(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        """Make the object ``name``; it is complete when the store's file has closed."""
        with _store_faults(), self.store.open(f"{self.root}/{name}", "wb") as file:
            for block in blocks:
                file.write(block)

    def publish(self, scratch: str, name: str) -> None:
        """Move; for most object stores a copy on their side, which appears whole, and a deletion."""
        with _store_faults():
            self.store.mv(f"{self.root}/{scratch}", f"{self.root}/{name}")

    def remove(self, name: str) -> None:
        """Delete the object ``name``."""
        with _store_faults():
            self.store.rm_file(f"{self.root}/{name}")


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path in which ``~`` is the user's folder; that of a user whom the system does not know stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser fails where there is no such user


def open_folder(url: str | os.PathLike[str]) -> Folder:
    """The folder at a path (``~`` is the user's) or at a URL; ``file://`` is a path, and nothing is touched yet.

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
    """Flush the names in a folder to the disk, where the system can."""
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
    """Any fault of a store as an OSError: each store has exceptions of its own."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
