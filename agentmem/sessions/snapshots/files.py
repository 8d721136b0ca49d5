"""Writing and reading the files of a snapshot: tensors and a JSON state in one folder, verified when they are read.

A snapshot has three files: ``state-*.json``, ``tensors-*.safetensors`` and ``manifest.json``. The manifest has the
names, sizes and SHA-256 of the other two. A save writes two new data files beside the old ones, then renames the new
manifest over the old one, then deletes the files that the new manifest does not name. If a save is cut short at any
point, ``manifest.json`` therefore names complete files, either the old or the new ones. The next save deletes the files
left behind.

- Local folders: every step is flushed to the disk (data, manifest, names in the folder) before the next one begins. A
  lock makes concurrent saves wait for one another, and the last save wins. Windows cannot flush the names in a folder.
- URLs (fsspec): the steps come in the same order, but the store decides when to flush. A rename may be a copy; in
  object stores the copy appears as a whole, in other stores it may not. There is no lock. Of two concurrent saves the
  one that renames last wins, and its snapshot is complete. Files of the other save may stay; the first save that comes
  more than a day (:data:`LEFTOVER_SECONDS`) later deletes them.

The tensors are read only once: they are hashed while they are read into their final places, and returned only if the
hash is right. A library that opens files by path would read them a second time, and they could have changed since the
check. Checksums find damage but not forgery: anyone who can write to the folder can write a whole forged snapshot.
Therefore :func:`read_snapshot` has the argument ``check``.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any, BinaryIO, Final

import torch
from pydantic import ValidationError

from agentmem.errors import AgentmemError, SnapshotRefused
from agentmem.sessions.snapshots.folder import Folder, open_folder
from agentmem.sessions.snapshots.manifest import (
    DATA_NAME,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_STATE_BYTES,
    FileSpec,
    Manifest,
    TensorSpec,
    header,
    in_file_order,
    spelled,
)
from agentmem.untrusted.json_text import parsed
from agentmem.untrusted.texts import faults

__all__ = ["Manifest", "TensorSpec", "read_manifest", "read_snapshot", "write_snapshot"]

LEFTOVER_SECONDS: Final = 24 * 3600
"""Age in seconds at which a save deletes a file in a store that no manifest names. A younger file could belong to
another save that is still running."""

Check = Callable[[dict[str, Any], Mapping[str, TensorSpec]], None]

_VERSION: Final = version("agentmem-runtime")
_BLOCK: Final = 1 << 20
_SHOWN: Final = 300
_UNCHANGED = "What was there before is there still, or else all of the new snapshot is. Mend the cause and save again."
_UNUSED = "Nothing of it was used: load another snapshot, or begin a new session."


def write_snapshot(
    url: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    identity: Mapping[str, str],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Save tensors and a state under a path or an fsspec URL; the folder should hold nothing else.

    Args:
        url: the folder; it is made if missing.
        tensors: tensors by their names, which are printable ASCII. They may have any dtype that safetensors has
            (except 4-bit ones), any device and any strides.
        state: a JSON value of dicts with string keys, lists, strings, integers, finite floats, booleans and None.
        identity: fingerprints of the model, the tokenizer and so on. :func:`read_snapshot` must be given equal ones.
        settings: a further JSON value, which is stored in the manifest and can be read without the data files.

    Raises:
        AgentmemError: a value cannot be saved, or the files cannot be written. In both cases the folder has either the
            old snapshot or the new one, complete.

    Memory needed: the state's JSON. Also, for one tensor at a time, one copy if the tensor is not on the CPU or is not
    contiguous, and two copies if both are true.
    """
    with _told(AgentmemError, url, _UNCHANGED):
        folder = open_folder(url)
        text = _state_text(state)
        specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        with folder.saving():
            outdated = _named(folder)
            token = f"{int(time.time()):010x}-{secrets.token_hex(8)}"
            contents = _contents(tensors, specs)
            about = {
                "agentmem": _VERSION,
                "identity": dict(identity),
                "settings": dict(settings or {}),
            }
            manifest = _save(folder, token, text, contents, {**about, "tensors": specs})
            _sweep(folder, manifest.file_names, outdated)


def read_manifest(url: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of the snapshot under ``url`` without opening the data files.

    Raises:
        SnapshotRefused: there is no snapshot, or its manifest is damaged or has an unknown format version.

    """
    with _told(SnapshotRefused, url, _UNUSED):
        return _manifest(open_folder(url))


def read_snapshot(
    url: str | os.PathLike[str],
    *,
    identity: Mapping[str, str],
    max_bytes: int,
    check: Check | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read and verify the snapshot under ``url`` and return its tensors (on the CPU) and its state.

    Args:
        url: the folder, as a path or an fsspec URL.
        identity: the fingerprints that the snapshot must have been saved with, exactly.
        max_bytes: most bytes of all tensors together. The state has a limit of its own, 64 MiB of JSON.
        check: called with the state and the tensors' dtypes and shapes, before any tensor is allocated; it raises
            ValueError to refuse the snapshot.

    Raises:
        SnapshotRefused: the snapshot is missing, of another model, damaged, too large or hostile; the message names
            the reason.

    Memory needed: the tensors, 2 MiB, the state and, while the state is parsed, up to three copies of its JSON.
    """
    with _told(SnapshotRefused, url, _UNUSED):
        folder = open_folder(url)
        manifest = _manifest(folder)
        while True:
            try:
                return _load(folder, manifest, identity, max_bytes, check)
            except FileNotFoundError:  # perhaps a save has replaced the snapshot meanwhile
                newer = _manifest(folder)
                if newer == manifest:
                    raise
                manifest = newer


def _save(
    folder: Folder, token: str, text: bytes, contents: Iterable[bytes | memoryview], about: Mapping[str, Any]
) -> Manifest:
    """Write the files of a snapshot and return its manifest.

    The data files and the manifest are written under new names. Then the manifest is renamed to ``manifest.json``. If
    the save fails before this rename, the new files are deleted.
    """
    state_name, tensor_name, scratch = (
        f"state-{token}.json",
        f"tensors-{token}.safetensors",
        f"manifest-{token}.scratch",
    )
    published = False
    try:
        state_file = _put(folder, state_name, [text])
        tensor_file = _put(folder, tensor_name, contents)
        manifest = Manifest(**about, state_file=state_file, tensor_file=tensor_file)
        raw = manifest.to_bytes()
        if Manifest.from_bytes(raw) != manifest:
            raise ValueError("settings hold a value that JSON gives back as another")
        folder.write(scratch, [raw])
        published = True  # from here on an error leaves it unknown which manifest is there, so all files stay
        folder.publish(scratch, MANIFEST)
    finally:
        if not published:
            for name in (state_name, tensor_name, scratch):
                with suppress(OSError):
                    folder.remove(name)
    return manifest


def _put(folder: Folder, name: str, blocks: Iterable[bytes | memoryview]) -> FileSpec:
    digest, size = hashlib.sha256(), 0

    def watched() -> Iterator[bytes | memoryview]:
        nonlocal size
        for block in blocks:
            digest.update(block)
            size += len(block)
            yield block

    folder.write(name, watched())
    return FileSpec(name=name, size=size, sha256=digest.hexdigest())


def _contents(tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, tensor by tensor."""
    yield header(specs)
    for name, _ in in_file_order(specs):
        yield from _octets(tensors[name])
        yield b""  # the consumer drops its last block, and so this tensor, before the next tensor is copied


def _octets(tensor: torch.Tensor) -> Iterator[memoryview]:
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    flat = plain.as_strided((plain.numel(),), (1,))  # flatten() keeps the stride of a single element, whatever it is
    octets = flat.view(torch.uint8).numpy().data
    for start in range(0, len(octets), _BLOCK):
        yield octets[start : start + _BLOCK]


def _state_text(state: Mapping[str, Any]) -> bytes:
    """Return the state as JSON.

    Raises:
        ValueError: JSON cannot represent the state exactly.

    """
    text = spelled(dict(state), sort_keys=False)
    if parsed(text, MAX_STATE_BYTES) != dict(state):
        raise ValueError(
            "the state holds a value that JSON gives back as another (a tuple, or a key that is no string)"
        )
    return text


def _sweep(folder: Folder, kept: frozenset[str], outdated: frozenset[str]) -> None:
    """Delete the outdated files and those that unfinished saves have left, except the files in ``kept``.

    A file that cannot be deleted now is tried again by the next save.
    """
    with suppress(OSError):
        for name in folder.names():
            if name not in kept and DATA_NAME.fullmatch(name) and (name in outdated or _left_over(folder, name)):
                with suppress(OSError):
                    folder.remove(name)


def _left_over(folder: Folder, name: str) -> bool:
    age = time.time() - int(name.partition("-")[2].partition("-")[0], 16)
    return folder.exclusive or age > LEFTOVER_SECONDS


def _named(folder: Folder) -> frozenset[str]:
    """Return the names of the data files of the present snapshot; the set is empty if no manifest can be read."""
    try:
        return _manifest(folder).file_names
    except (OSError, ValueError):
        return frozenset()


def _manifest(folder: Folder) -> Manifest:
    try:
        with folder.read(MANIFEST) as (stream, size):
            if size > MAX_MANIFEST_BYTES:
                raise ValueError(f"{MANIFEST} has {size} bytes; the limit is {MAX_MANIFEST_BYTES}")
            raw = _Reader(stream, MANIFEST, size).take(size)
    except (FileNotFoundError, NotADirectoryError):
        raise SnapshotRefused(
            f"there is no snapshot in {folder.shown}: it has no {MANIFEST}. Check the path, or save a session there."
        ) from None
    with _said_of(MANIFEST):
        return Manifest.from_bytes(raw)


def _load(
    folder: Folder, manifest: Manifest, identity: Mapping[str, str], max_bytes: int, check: Check | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    check_identity(folder.shown, manifest, identity)
    if manifest.tensor_bytes > max_bytes:
        raise SnapshotRefused(
            f"the tensors of the snapshot in {folder.shown} need {manifest.tensor_bytes} bytes; the limit is "
            f"{max_bytes}. Raise the limit, or load another snapshot."
        )
    with _verified(folder, manifest.state_file, MAX_STATE_BYTES) as reader:
        text = reader.take(manifest.state_file.size)
    with _said_of(manifest.state_file.name):
        state = parsed(text, MAX_STATE_BYTES)
    del text
    if check is not None:
        check(state, manifest.tensors)
    return _read_tensors(folder, manifest), state


def check_identity(where: str, manifest: Manifest, identity: Mapping[str, str]) -> None:
    """Check that the fingerprints in a manifest are those in ``identity``; ``where`` is the snapshot's place.

    Raises:
        SnapshotRefused: a fingerprint differs or exists on one side only; the message names its part (such as the
            tokenizer) and both fingerprints.

    """
    if (name := differing(identity, manifest.identity)) is not None:
        found, expected = manifest.identity.get(name, "not named"), identity.get(name, "not named")
        raise SnapshotRefused(
            f"the snapshot in {where} is of another {name[:80]}: {found} there, and {expected} here. Load it with the "
            f"{name[:80]} that it was saved with, or begin a new session."
        )


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """Return the name of the first part that differs between two identities, or ``None`` if they are equal."""
    return next((name for name in [*one, *other] if one.get(name) != other.get(name)), None)


def _read_tensors(folder: Folder, manifest: Manifest) -> dict[str, torch.Tensor]:
    expected = header(manifest.tensors)
    with _verified(folder, manifest.tensor_file, manifest.tensor_file.size) as reader:
        if reader.take(len(expected)) != expected:
            raise ValueError(f"the header of {manifest.tensor_file.name} is not that of the manifest's tensors")
        return {name: _read_tensor(reader, name, spec) for name, spec in in_file_order(manifest.tensors)}


def _read_tensor(reader: _Reader, name: str, spec: TensorSpec) -> torch.Tensor:
    try:
        octets = torch.empty(spec.nbytes, dtype=torch.uint8, device="cpu")
    except (RuntimeError, MemoryError) as error:
        raise OSError(f"tensor {name} needs {spec.nbytes} bytes, which this machine does not give: {error}") from error
    reader.fill(octets.numpy().data)
    if spec.torch_dtype is torch.bool and octets.numel() and int(octets.max()) > 1:
        raise ValueError(f"tensor {name} is of booleans and has a byte {int(octets.max())}; 0 and 1 are allowed")
    return octets.view(spec.torch_dtype).reshape(spec.shape)


class _Reader:
    """A reader of a stream of ``size`` bytes, which hashes all bytes that it reads."""

    def __init__(self, stream: BinaryIO, name: str, size: int) -> None:
        self._stream, self.name, self.size, self.digest = stream, name, size, hashlib.sha256()

    def fill(self, room: memoryview) -> None:
        """Fill ``room`` with the next bytes of the stream; raise ValueError if the stream ends before."""
        done = 0
        while done < len(room):
            block = self._stream.read(min(_BLOCK, len(room) - done))
            if not block:
                raise ValueError(f"{self.name} ends before its {self.size} bytes")
            room[done : done + len(block)] = block
            self.digest.update(block)
            done += len(block)

    def take(self, size: int) -> bytes:
        """Read and return the next ``size`` bytes."""
        room = bytearray(size)
        self.fill(memoryview(room))
        return bytes(room)


@contextmanager
def _verified(folder: Folder, spec: FileSpec, limit: int) -> Iterator[_Reader]:
    """Return a context manager that opens a data file and gives its reader; the block must read the whole file.

    A ValueError is raised before the block if the file has a wrong size, and after the block if it has a wrong SHA-256.
    """
    with folder.read(spec.name) as (stream, size):
        if size != spec.size or size > limit:
            raise ValueError(f"{spec.name} has {size} bytes; the manifest says {spec.size}, and the limit is {limit}")
        reader = _Reader(stream, spec.name, size)
        yield reader
        if reader.digest.hexdigest() != spec.sha256:
            raise ValueError(f"{spec.name} has SHA-256 {reader.digest.hexdigest()}; the manifest says {spec.sha256}")


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    """Return a context manager that puts the name of a file before the message of a ValueError of the block."""
    try:
        yield
    except ValidationError as error:
        raise ValueError(f"{name}: {faults(error)}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@contextmanager
def _told(kind: type[AgentmemError], where: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Return a context manager that turns errors of files or of their content into an error of the type ``kind``.

    The message has the place of the snapshot and the remedy. An AgentmemError passes unchanged.
    """
    try:
        yield
    except AgentmemError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise kind(f"snapshot in {shown(where)}: {_reason(error)}. {remedy}") from error


def shown(url: str | os.PathLike[str]) -> str:
    """Return a path or URL as error messages show it: without a password, and with at most 300 characters."""
    text = re.sub("//[^/@]*@", "//", os.fspath(url)[:2000])
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) or type(error).__name__
