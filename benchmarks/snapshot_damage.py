"""Ways to damage or forge a snapshot, by name. Forgeries have all their checksums mended.

Made for the layout of ``agentmem.sessions.snapshots.files`` and the tensors of ``benchmarks.snapshot_kills``.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from agentmem.sessions.snapshots.files import write_snapshot

Corruption = Callable[[Path, random.Random], None]


def _file(folder: Path, prefix: str) -> Path:
    return next(path for path in folder.iterdir() if path.name.startswith(prefix) and path.suffix != ".lock")


def _flip(prefix: str) -> Corruption:
    def corrupt(folder: Path, dice: random.Random) -> None:
        path = _file(folder, prefix)
        octets = bytearray(path.read_bytes())
        octets[dice.randrange(len(octets))] ^= 1 << dice.randrange(8)
        path.write_bytes(octets)

    return corrupt


def _truncate(prefix: str) -> Corruption:
    def corrupt(folder: Path, dice: random.Random) -> None:
        path = _file(folder, prefix)
        os.truncate(path, dice.randrange(path.stat().st_size))

    return corrupt


def _append(folder: Path, dice: random.Random) -> None:
    with _file(folder, dice.choice(["manifest", "state", "tensors"])).open("ab") as file:
        file.write(dice.randbytes(dice.randint(1, 50)))


def _overwrite(folder: Path, dice: random.Random) -> None:
    path = _file(folder, dice.choice(["manifest", "state", "tensors"]))
    path.write_bytes(dice.randbytes(path.stat().st_size))


def _of_another_save(folder: Path, dice: random.Random) -> None:
    prefix, other = dice.choice(["state", "tensors"]), folder / "other"
    write_snapshot(other, {"ids": torch.zeros(9)}, {"number": 77}, identity={"model": "another"})
    shutil.copyfile(_file(other, prefix), _file(folder, prefix))


def _swap(folder: Path, dice: random.Random) -> None:
    one, two = _file(folder, "state"), _file(folder, dice.choice(["tensors", "manifest"]))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def _no_plain_file(folder: Path, dice: random.Random) -> None:
    path = _file(folder, dice.choice(["manifest", "state", "tensors"]))
    kept = path.rename(folder / "kept")
    kind = dice.choice(["absent", "folder", "link", "dangling", "pipe"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe" and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    elif kind in {"link", "dangling"}:
        path.symlink_to(kept if kind == "link" else folder / "nowhere")


def seal(folder: Path, body: dict[str, Any]) -> None:
    """Write a manifest of this content, whatever it says, with the right checksum."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    seal_text(folder, text)


def seal_text(folder: Path, text: str) -> None:
    """The same of a text that may be no JSON."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(f'{{"manifest":{text},"sha256":"{digest}"}}\n', encoding="utf-8")


def body_of(folder: Path) -> dict[str, Any]:
    """What the manifest says."""
    body: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())["manifest"]
    return body


def reseal_file(folder: Path, prefix: str, octets: bytes) -> None:
    """Put other bytes into a data file and mend size, SHA-256 and seal."""
    body, key = body_of(folder), {"state": "state_file", "tensors": "tensor_file"}[prefix]
    (folder / body[key]["name"]).write_bytes(octets)
    body[key] |= {"size": len(octets), "sha256": hashlib.sha256(octets).hexdigest()}
    seal(folder, body)


def _forged(edit: Callable[[dict[str, Any], random.Random], object]) -> Corruption:
    def corrupt(folder: Path, dice: random.Random) -> None:
        body = body_of(folder)
        edit(body, dice)
        seal(folder, body)

    return corrupt


SHAPES: list[Any] = [
    *([-1, 4], [2**62, 4], [2**63], [10**30], [0, 2**62, 2**62], [1] * 17, [3, 5], [10**9, 10**9]),
    *([True], [4.0], ["4"], [None], [[4]], "44", None, {}),
]
PATHS = [
    *("../x", "/etc/passwd", "a/b", "a\\b", "C:x", "..", "", "CON", "NUL.json"),
    *("manifest.json", "snapshot.lock", "state-\n.json", "state-../../../../etc/passwd.json"),
]


def _shape(body: dict[str, Any], dice: random.Random) -> None:
    body["tensors"][dice.choice(sorted(body["tensors"]))]["shape"] = dice.choice(SHAPES)


def _path(body: dict[str, Any], dice: random.Random) -> None:
    body[dice.choice(["state_file", "tensor_file"])]["name"] = dice.choice(PATHS)


def _size(body: dict[str, Any], dice: random.Random) -> None:
    entry = body[dice.choice(["state_file", "tensor_file"])]
    entry["size"] = dice.choice([-1, 0, 2**62, 2**64, 1.5, "9", None, entry["size"] + 1, entry["size"] - 1])


def _sha(body: dict[str, Any], dice: random.Random) -> None:
    body[dice.choice(["state_file", "tensor_file"])]["sha256"] = dice.choice(["0" * 64, "", None, "A" * 64, 5])


def _fields(body: dict[str, Any], dice: random.Random) -> None:
    key = dice.choice(sorted(body.keys() - {"agentmem", "settings"}))
    kind = dice.choice(["gone", "null", "one more"])
    if kind == "one more":
        body["extra"] = 1
    elif kind == "null" or key in {"format", "version"}:
        body[key] = None
    else:
        del body[key]


def _version(body: dict[str, Any], dice: random.Random) -> None:
    body["version"] = dice.choice([0, 2, -1, 10**50, "1", None, True, 1.0, [1]])


def _identity(body: dict[str, Any], dice: random.Random) -> None:
    changes: list[dict[str, str]] = [{"model": "ee" * 32}, {"tokenizer": "ee" * 32}, {"third": "x"}]
    body["identity"] |= dice.choice(changes)


def _tensors(body: dict[str, Any], dice: random.Random) -> None:
    tensors = body["tensors"]
    name = dice.choice(["layer.0.keys", "layer.0.values", "ids", "ended"])
    spec = tensors.pop(name)
    kind = dice.choice(["gone", "renamed", "dtype", "reserved"])
    if kind == "renamed":
        tensors[name + "x"] = spec
    elif kind == "dtype":
        tensors[name] = spec | {"dtype": dice.choice(["I32", "U8", "F4", "object", "", None, 4])}
    elif kind == "reserved":
        tensors["__metadata__"] = spec


def _header_length(folder: Path, dice: random.Random) -> None:
    octets = _file(folder, "tensors").read_bytes()
    length = dice.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(octets), int.from_bytes(octets[:8], "little") - 8])
    reseal_file(folder, "tensors", length.to_bytes(8, "little") + octets[8:])


def _header_text(folder: Path, dice: random.Random) -> None:
    octets = _file(folder, "tensors").read_bytes()
    old, new = dice.choice([(b'"I64"', b'"F64"'), (b"[0,", b"[1,"), (b'"ids"', b'"idx"'), (b'"BOOL"', b'"BOOX"')])
    reseal_file(folder, "tensors", octets.replace(old, new, 1))


def _no_boolean(folder: Path, dice: random.Random) -> None:
    octets = bytearray(_file(folder, "tensors").read_bytes())
    octets[-1 - dice.randrange(2)] = dice.randint(2, 255)  # booleans lie last: the narrowest dtype
    reseal_file(folder, "tensors", bytes(octets))


HOSTILE_JSON = [
    *(b"", b"{", b"[]", b"null", b'"x"', b'{"a":1}{"b":1}', b'{"a":"\xff"}'),
    *(b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e999}', b'{"a":' + b"9" * 5000 + b"}"),
    *(b'{"a":1,"a":1}', b'{"a":{"b":1,"b":2}}', b'\xef\xbb\xbf{"a":1}', '{"a":1}'.encode("utf-16")),
    *(b"[" * 100_000, b'{"a":' * 100 + b"1" + b"}" * 100, b'{"a":[' + b"[]," * 1_100_000 + b"[]]}"),
    b'{"a":"' + b'\\"' * 100_000,
]
"""Bytes that are no JSON object, or one that no reader should build."""


def _state(folder: Path, dice: random.Random) -> None:
    reseal_file(folder, "state", dice.choice(HOSTILE_JSON))


def _manifest(folder: Path, dice: random.Random) -> None:
    text = dice.choice(HOSTILE_JSON)
    if dice.randrange(2):
        (folder / "manifest.json").write_bytes(text)
    else:
        seal_text(folder, text.decode("latin-1"))


CORRUPTIONS: dict[str, Corruption] = {
    "a bit of the manifest flipped": _flip("manifest"),
    "a bit of the state flipped": _flip("state"),
    "a bit of the tensors flipped": _flip("tensors"),
    "manifest truncated": _truncate("manifest"),
    "state truncated": _truncate("state"),
    "tensors truncated": _truncate("tensors"),
    "bytes appended": _append,
    "bytes at random": _overwrite,
    "a file of another save": _of_another_save,
    "files swapped": _swap,
    "file gone, link, folder or pipe": _no_plain_file,
    "forged: another model or tokenizer": _forged(_identity),
    "forged: shapes": _forged(_shape),
    "forged: file names": _forged(_path),
    "forged: sizes": _forged(_size),
    "forged: SHA-256": _forged(_sha),
    "forged: fields": _forged(_fields),
    "forged: version": _forged(_version),
    "forged: tensors": _forged(_tensors),
    "forged: header length": _header_length,
    "forged: header": _header_text,
    "forged: booleans": _no_boolean,
    "forged: hostile JSON as state": _state,
    "forged: hostile JSON as manifest": _manifest,
}
