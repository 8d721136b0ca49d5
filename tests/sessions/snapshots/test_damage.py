"""Snapshots that are damaged, forged, hostile or not there: each is refused with the reason."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from agentmem.errors import AgentmemError, SnapshotRefused
from agentmem.sessions.snapshots.files import Manifest, read_manifest, write_snapshot
from support.snapshot_versions import IDENTITY, load, loaded_version, save
from support.waiting import LIMIT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with version 1 in it."""
    save(tmp_path / "snapshot", 1)
    return tmp_path / "snapshot"


def sealed(body: str) -> bytes:
    """A manifest file of this text with the right checksum."""
    return f'{{"manifest":{body},"sha256":"{hashlib.sha256(body.encode()).hexdigest()}"}}\n'.encode()


def forge(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit what the manifest says and mend its checksum."""
    body = json.loads((folder / "manifest.json").read_bytes())["manifest"]
    edit(body)
    (folder / "manifest.json").write_bytes(sealed(json.dumps(body, sort_keys=True, separators=(",", ":"))))


def replace_file(folder: Path, key: str, raw: bytes) -> None:
    """Put other bytes into a data file and mend all checksums."""

    def edit(body: dict[str, Any]) -> None:
        body[key] |= {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        (folder / body[key]["name"]).write_bytes(raw)

    forge(folder, edit)


def test_a_forged_manifest_that_says_the_truth_is_read(folder: Path) -> None:
    """The forging of these tests is right: mending without an edit leaves a snapshot that loads."""
    forge(folder, lambda body: None)
    replace_file(folder, "state_file", b'{"version": 1}')

    assert loaded_version(folder) == 1


def test_every_flipped_bit_of_a_manifest_is_refused(folder: Path) -> None:
    """There is no bit whose flip goes unseen."""
    write_snapshot(folder, {}, {}, identity={"model": "m"})
    raw = (folder / "manifest.json").read_bytes()
    assert Manifest.from_bytes(raw) == read_manifest(folder)

    for place in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"."):
            Manifest.from_bytes(bytes(flipped))


@pytest.mark.parametrize("kind", ["manifest", "state", "tensors"])
def test_flips_and_truncations_are_refused(folder: Path, kind: str) -> None:
    """Every third byte with a bit flipped, every third shorter length, and a longer file are refused."""
    (path,) = folder.glob(f"{kind}*")
    raw = path.read_bytes()

    for place in range(0, len(raw), 3):
        for damaged in (raw[:place], raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(SnapshotRefused):
                load(folder)
    path.write_bytes(raw + b"\n")
    with pytest.raises(SnapshotRefused):
        load(folder)
    path.write_bytes(raw)
    assert loaded_version(folder) == 1


def test_two_flips_that_cancel_in_a_checksum_field_are_refused(folder: Path) -> None:
    """Data and its SHA-256 changed alike are refused by the manifest's own checksum."""
    (path,) = folder.glob("state*")
    old, new = path.read_bytes(), b'{"version":2}'
    path.write_bytes(new)
    text = (folder / "manifest.json").read_text()
    digests = [hashlib.sha256(raw).hexdigest() for raw in (old, new)]
    (folder / "manifest.json").write_text(text.replace(*digests))

    with pytest.raises(SnapshotRefused, match="does not match its checksum"):
        load(folder)


def entry(where: str, /, **changes: Any) -> Callable[[dict[str, Any]], object]:
    """An edit of one object in the manifest."""
    return lambda body: body[where].update(changes)


def shape(*dims: Any) -> Callable[[dict[str, Any]], object]:
    """An edit of one tensor's shape."""
    return lambda body: body["tensors"]["keys"].update(shape=list(dims))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda body: body.update(format="other"), "no manifest of a snapshot"),
        (lambda body: body.update(version=2), "format version 2 is unknown; this agentmem reads version 1"),
        (lambda body: body.update(version=True), "does not match its checksum"),
        (lambda body: body.update(more=1), "more: Extra inputs are not permitted"),
        (lambda body: body.pop("tensor_file"), "tensor_file: Field required"),
        (lambda body: body.update(identity={"model": 5}), "identity.model: Input should be a valid string"),
        (lambda body: body.update(identity={"model": "x" * 300}), "at most 200 characters"),
        (entry("state_file", name="../manifest.json"), "state_file.name: String should match"),
        (entry("state_file", name="/etc/passwd"), "state_file.name: String should match"),
        (entry("state_file", name="state-" + "0" * 10 + "-" + "0" * 16 + ".json\n"), "String should match"),
        (entry("tensor_file", name="CON"), "tensor_file.name: String should match"),
        (lambda body: body.update(tensor_file=body["state_file"]), "mixed up"),
        (entry("state_file", size=-1), "greater than or equal to 0"),
        (entry("state_file", size=1e1), "valid integer"),
        (entry("state_file", size=2**40), "the manifest says 1099511627776"),
        (entry("tensor_file", size=2**40), "the tensors need exactly"),
        (entry("state_file", sha256="0" * 64), "the manifest says 0000"),
        (entry("tensor_file", sha256="0" * 64), "the manifest says 0000"),
        (entry("tensor_file", sha256="0" * 63), "String should match"),
        (shape(-3, -4), "greater than or equal to 0"),
        (shape(2**63), "less than 9223372036854775808"),
        (shape(2**62, 2), "beyond what 63 bits address"),
        (shape(0, 2**40, 2**40), "beyond what 63 bits address"),
        (shape(*[1] * 17), "at most 16 items"),
        (shape(True, 12), "valid integer"),
        (shape(3.0, 4), "valid integer"),
        (shape(3, 5), "the tensors need exactly"),
        (shape(4, 3), "the header of tensors-.* is not that of the manifest"),
        (lambda body: body["tensors"].update(keys={"dtype": "I32", "shape": [3, 4]}), "is not that of the manifest"),
        (lambda body: body["tensors"].update(keys={"dtype": "object", "shape": []}), "'object' is none of BOOL"),
        (lambda body: body["tensors"].update(__metadata__={"dtype": "U8", "shape": [0]}), "reserves"),
        (lambda body: body["tensors"].update({"a/\x00": {"dtype": "U8", "shape": [0]}}), "String should match"),
        (
            lambda body: body.update(settings={"x": "y" * (8 << 20)}),
            r"manifest\.json has \d+ bytes; the limit is 8388608",
        ),
    ],
)
def test_a_forged_manifest_is_refused(folder: Path, edit: Callable[[dict[str, Any]], object], said: str) -> None:
    """Whatever it says, with all checksums right, the refusal says what is wrong."""
    forge(folder, edit)

    with pytest.raises(SnapshotRefused, match=said):
        load(folder)


def test_too_many_tensors_are_refused(folder: Path) -> None:
    """More tensors than the limit are refused although they hold no byte."""
    forge(folder, entry("tensors", **{f"t{index}": {"dtype": "U8", "shape": [0]} for index in range(1 << 14)}))

    with pytest.raises(SnapshotRefused, match="the limit is 16384"):
        read_manifest(folder)


HOSTILE = {
    b"": "Expecting value",
    b"[1]": "JSON of type list",
    b'{"a":NaN}': "the number 'NaN'",
    b'{"a":-Infinity}': "the number '-Infinity'",
    b'{"a":1e999}': "the number '1e999'",
    b'{"a":1,"b":2,"a":1}': "the key 'a' twice",
    b'{"a":"\xff"}': "can't decode byte",
    b"\xef\xbb\xbf{}": "BOM",
    "{}".encode("utf-16"): "can't decode byte",
    b'{"a":' + b"9" * 5000 + b"}": "4300",
    b"[" * 200_000: "nested 200000 deep",
    b'{"a":' * 65 + b"1" + b"}" * 65: "nested 65 deep",
    b'{"a":[' + b"[]," * (1 << 20) + b"[]]}": "1048579 lists and objects",
    b'{"a":"' + b'\\"' * 500_000: "Unterminated string",
    b'{"a":"[[[[' * 20: "Expecting",
}


@pytest.mark.parametrize("raw", HOSTILE, ids=[f"{raw[:20]!r}" for raw in HOSTILE])
def test_hostile_json_is_refused(folder: Path, raw: bytes) -> None:
    """Bytes that are no JSON object, or one that costs too much, are refused as a state and as a manifest, soon."""
    started = time.thread_time()
    replace_file(folder, "state_file", raw)
    with pytest.raises(SnapshotRefused, match=rf"state-.*\.json: .*{HOSTILE[raw]}"):
        load(folder)
    (folder / "manifest.json").write_bytes(raw)
    with pytest.raises(SnapshotRefused, match=rf"manifest\.json: .*{HOSTILE[raw]}"):
        load(folder)
    assert time.thread_time() - started < LIMIT  # a quadratic scan takes many minutes


def test_brackets_in_strings_are_no_nesting(folder: Path) -> None:
    """A state may talk of brackets and quotes as much as it likes."""
    state = {"text": '[{"\\' * 200_000, "more": ['\\"[' * 1000, "]]"]}
    write_snapshot(folder, {}, state, identity=IDENTITY)

    assert load(folder)[1] == state


@pytest.mark.parametrize("change", [lambda n: n + 8, lambda n: 2**63, lambda n: 2**64 - 1, lambda n: 0])
def test_a_forged_header_length_is_refused(folder: Path, change: Callable[[int], int]) -> None:
    """The header's length is part of the header that the manifest's tensors must have."""
    (path,) = folder.glob("tensors*")
    raw = path.read_bytes()
    length = change(int.from_bytes(raw[:8], "little"))
    replace_file(folder, "tensor_file", length.to_bytes(8, "little") + raw[8:])

    with pytest.raises(SnapshotRefused, match="is not that of the manifest's tensors"):
        load(folder)


def test_a_byte_that_is_no_boolean_is_refused(folder: Path) -> None:
    """Torch's operations are undefined on booleans other than 0 and 1, so none gets in."""
    (path,) = folder.glob("tensors*")
    replace_file(folder, "tensor_file", path.read_bytes()[:-1] + b"\x02")

    with pytest.raises(SnapshotRefused, match="tensor ended is of booleans and has a byte 2"):
        load(folder)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows, and pipes live elsewhere")
@pytest.mark.parametrize("kind", ["manifest", "state", "tensors"])
def test_only_plain_files_are_read(folder: Path, kind: str) -> None:
    """A link, even to the right bytes, a folder, a pipe or a gap in a file's place is refused without waiting."""
    (path,) = folder.glob(f"{kind}*")
    kept = path.rename(folder / "kept")
    with pytest.raises(SnapshotRefused, match=r"No such file|no snapshot"):
        load(folder)
    path.symlink_to(kept)
    with pytest.raises(SnapshotRefused, match="is a symbolic link"):
        load(folder)
    path.unlink()
    for make in (path.mkdir, lambda: os.mkfifo(path)):
        make()
        with pytest.raises(SnapshotRefused, match=r"is no plain file|Is a directory"):
            load(folder)
        path.rmdir() if path.is_dir() else path.unlink()
    kept.rename(path)
    assert loaded_version(folder) == 1


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere", "there is no snapshot in .*nowhere: it has no manifest.json"),
        ("a.file", "there is no snapshot in .*a.file"),
        ("unheard-of://x", "Protocol not known: unheard-of"),
        ("unheard-of://me:secret@x", "snapshot in unheard-of://x: "),
        ("memory://nowhere", "there is no snapshot in memory:///nowhere"),
        ("memory://a.file/x", "there is no snapshot in"),
    ],
)
def test_a_place_without_a_snapshot_is_refused(tmp_path: Path, place: str, said: str) -> None:
    """A missing folder, a file or an unknown protocol is told with its name, and passwords are not."""
    (tmp_path / "a.file").write_text("x")
    fsspec.filesystem("memory").pipe_file("/a.file", b"x")

    for read in (read_manifest, load):
        with pytest.raises(SnapshotRefused, match=said) as raised:
            read(place if "://" in place else tmp_path / place)
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize("place", ["a.file", "a.file/x", "unheard-of://x", "memory://a.file/x"])
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, place: str) -> None:
    """A save to where no folder can be is an AgentmemError that names the place."""
    (tmp_path / "a.file").write_text("x")
    fsspec.filesystem("memory").pipe_file("/a.file", b"x")

    with pytest.raises(AgentmemError, match=r"snapshot in .*(a\.file|unheard-of).*save again"):
        save(place if "://" in place else tmp_path / place, 1)
