"""Snapshots as files: what comes back, what cannot be saved, and whose snapshot is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem

from agentmem.errors import AgentmemError, SnapshotRefused
from agentmem.sessions.snapshots import manifest
from agentmem.sessions.snapshots.files import TensorSpec, read_manifest, read_snapshot, write_snapshot
from agentmem.testing import peak_allocated
from support.snapshot_versions import IDENTITY, data_files, load, loaded_version, save, tensors_of

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
    *(torch.int64, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
)


def octets(tensor: torch.Tensor) -> list[int]:
    """The bytes of a tensor's values, in order: equal for equal bits, NaN or not."""
    return tensor.resolve_conj().contiguous().flatten().view(torch.uint8).tolist()


@pytest.fixture(params=["path", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place of each kind."""
    yield {"path": str(tmp_path / "a" / "b"), "file": f"file://{tmp_path}/c", "memory": "memory://d/e"}[request.param]
    MemoryFileSystem.store.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with version 1 in it."""
    save(tmp_path / "snapshot", 1)
    return tmp_path / "snapshot"


def test_every_dtype_comes_back_bit_for_bit(url: str) -> None:
    """Random bits of every dtype that safetensors knows, NaNs included, survive, as do scalars and empty tensors."""
    saved = {str(dtype): torch.randint(0, 2, (3, 8), dtype=torch.uint8).view(dtype) for dtype in DTYPES[:1]}
    saved |= {str(dtype): torch.randint(0, 256, (3, 16), dtype=torch.uint8).view(dtype) for dtype in DTYPES[1:]}
    saved |= {f"scalar.{dtype}": tensor.flatten()[0] for dtype, tensor in list(saved.items())}
    saved |= {f"empty.{dtype}": torch.empty((0, 3, 2), dtype=dtype) for dtype in DTYPES}

    write_snapshot(url, saved, {}, identity=IDENTITY)
    back, _ = load(url)

    assert back.keys() == saved.keys()
    for name, tensor in saved.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert octets(back[name]) == octets(tensor)


def test_views_come_back_as_what_they_show(url: str) -> None:
    """Transposed, strided, expanded, conjugated and gradient-carrying tensors are saved by value."""
    whole = torch.arange(24.0).reshape(4, 6)
    views = {
        "transposed": whole.T,
        "strided": whole[1::2, ::3],
        "expanded": whole[:1].expand(5, 6),
        "conjugated": torch.complex(whole, whole + 1).conj(),
        "imaginary": torch.complex(whole, whole).conj().imag,
        "one_of_many": whole[:1, :1].T[0, ::2],
        "one_in_the_middle": whole[2:3, 3:4],
        "one_negated": torch.complex(torch.ones(1), torch.ones(1)).conj().imag,
        "learned": whole.clone().requires_grad_(),
    }

    write_snapshot(url, views, {}, identity=IDENTITY)
    back, _ = load(url)

    assert all(back[name].tolist() == view.tolist() for name, view in views.items())
    assert not any(tensor.requires_grad for tensor in back.values())


def test_a_state_comes_back_as_it_was(url: str) -> None:
    """Nested values, integers beyond 64 bits, all floats, odd strings and the order of keys survive."""
    state = {
        "z": [1, -(2**70), 0.1, -0.0, 5e-324, 1.7976931348623157e308, True, None, [], {}],
        "a": {'é\u2028\x00"\\]}[{': "x\ud800", "": [[[{"deep": [False]}]]]},
    }

    write_snapshot(url, {}, state, identity=IDENTITY)
    tensors, back = load(url)

    assert tensors == {}
    assert repr(back) == repr(state)


def test_the_file_is_a_safetensors_file(folder: Path) -> None:
    """The safetensors library reads the tensors of a snapshot, aligned as it wants them."""
    (path,) = folder.glob("*.safetensors")

    with safetensors.safe_open(path, framework="pt") as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118  # no mapping
            name: tensor.tolist() for name, tensor in tensors_of(1).items()
        }
    raw = path.read_bytes()
    assert safetensors.torch.load(raw).keys() == tensors_of(1).keys()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    known = {code: dtype for code, dtype in safetensors.torch._TYPES.items() if dtype is not None}
    assert known == manifest.DTYPES


def test_the_manifest_says_what_is_there(folder: Path) -> None:
    """Sizes and SHA-256 are those of the files; identity, settings, dtypes and shapes can be read without the rest."""
    write_snapshot(folder, tensors_of(2), {}, identity=IDENTITY, settings={"cap": 5, "policy": {"name": "window"}})
    manifest = read_manifest(folder)

    for spec in (manifest.state_file, manifest.tensor_file):
        raw = (folder / spec.name).read_bytes()
        assert (spec.size, spec.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert data_files(folder) == manifest.file_names
    assert manifest.identity == IDENTITY
    assert manifest.settings == {"cap": 5, "policy": {"name": "window"}}
    assert manifest.tensors["values"] == TensorSpec(dtype="BF16", shape=(2, 5))
    assert manifest.tensor_bytes == 12 * 4 + 10 * 2 + 7 * 8 + 2


def test_reading_allocates_the_tensors_and_writing_nothing(tmp_path: Path) -> None:
    """Torch's peak: nothing to write what is contiguous, one tensor to write a view, all tensors once to read."""
    size, tile = 1 << 20, 60 * 60 * 4  # torch transposes by way of a tile of 60 × 60
    whole = {"one": torch.zeros(size // 4), "two": torch.ones(size // 8, dtype=torch.int64)}
    turned = {"one": torch.zeros(512, size // 2048).T, "two": torch.zeros(512, size // 2048).T}

    assert peak_allocated(lambda: write_snapshot(tmp_path / "a", whole, {}, identity={})) < 64
    assert size <= peak_allocated(lambda: write_snapshot(tmp_path / "b", turned, {}, identity={})) < size + 2 * tile
    peak = peak_allocated(lambda: read_snapshot(tmp_path / "a", identity={}, max_bytes=2 * size))
    assert 2 * size <= peak < 2 * size + 64


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"x": float("nan")}, "not JSON compliant"),
        ({"x": [float("inf")]}, "not JSON compliant"),
        ({"x": (1, 2)}, "a tuple"),
        ({"x": {1: 2}}, "key that is no string"),
        ({"x": object()}, "not JSON serializable"),
        ({"x": "a" * (64 << 20)}, "the limit is 67108864"),
        ({"x": eval("[" * 64 + "]" * 64)}, "nested 65 deep; the limit is 64"),  # noqa: S307  # sixty-four brackets
    ],
)
def test_a_state_that_would_change_is_not_saved(folder: Path, state: dict[str, Any], said: str) -> None:
    """What JSON cannot hold, or no reader would take, is named before anything is written."""
    before = data_files(folder)

    with pytest.raises(AgentmemError, match=said) as raised:
        write_snapshot(folder, {}, state, identity=IDENTITY)
    assert not isinstance(raised.value, SnapshotRefused)
    assert data_files(folder) == before
    assert loaded_version(folder) == 1


@pytest.mark.parametrize(
    ("tensors", "settings", "said"),
    [
        ({"x": torch.zeros(2, 2).to_sparse()}, {}, "dense tensors of BOOL"),
        ({"x": torch.zeros(2, device="meta")}, {}, "on meta"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, {}, "complex128"),
        ({"x": torch.zeros([1] * 17)}, {}, "at most 16 items"),
        ({"": torch.zeros(2)}, {}, "String should match"),
        ({"two words": torch.zeros(2)}, {}, "String should match"),
        ({"__metadata__": torch.zeros(2)}, {}, "__metadata__"),
        ({}, {"x": (1,)}, "settings"),
        ({}, {"x": "y" * (8 << 20)}, "the limit is 8388608"),
        ({}, {"x": float("nan")}, "not JSON compliant"),
    ],
)
def test_what_has_no_place_in_a_snapshot_is_named(
    folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any], said: str
) -> None:
    """A tensor or setting that cannot be saved leaves the old snapshot and nothing else."""
    before = data_files(folder)

    with pytest.raises(AgentmemError, match=said):
        write_snapshot(folder, tensors, {}, identity=IDENTITY, settings=settings)
    assert data_files(folder) == before
    assert loaded_version(folder) == 1


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        (IDENTITY | {"model": "77" * 32}, "another model: 5f5f.* there, and 7777.* here"),
        (IDENTITY | {"tokenizer": "77" * 32}, "another tokenizer: a0a0"),
        ({"model": IDENTITY["model"]}, "another tokenizer.*and not named here"),
        (IDENTITY | {"adapter": "9"}, "another adapter: not named there, and 9 here"),
    ],
)
def test_another_identity_is_refused_by_name(folder: Path, identity: dict[str, str], said: str) -> None:
    """The message says what differs, both values and the remedy, and nothing but the manifest is read."""
    for path in folder.glob("*-*"):
        path.unlink()

    with pytest.raises(SnapshotRefused, match=said) as raised:
        load(folder, identity=identity)
    assert "Load it with the" in str(raised.value)


def test_more_than_the_limit_is_refused_before_it_is_allocated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte too many is refused with both numbers, and no tensor is made; the exact size is loaded."""
    size = read_manifest(folder).tensor_bytes
    load(folder, max_bytes=size)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("a tensor was allocated"))

    with pytest.raises(SnapshotRefused, match=f"need {size} bytes; the limit is {size - 1}"):
        load(folder, max_bytes=size - 1)


def test_the_callers_check_comes_before_the_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the state and all dtypes and shapes; its ValueError refuses the snapshot, and nothing was allocated."""
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("a tensor was allocated"))
    seen: list[Any] = []

    def check(state: dict[str, Any], specs: Any) -> None:
        seen.append((state, {name: (spec.dtype, spec.shape) for name, spec in specs.items()}))
        raise ValueError("3 layers; this model has 4")

    with pytest.raises(SnapshotRefused, match="3 layers; this model has 4"):
        load(folder, check=check)
    shapes = {"ended": ("BOOL", (2,)), "ids": ("I64", (7,)), "keys": ("F32", (3, 4)), "values": ("BF16", (2, 5))}
    assert seen == [({"version": 1}, shapes)]


def test_memory_that_the_machine_does_not_give_is_a_refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's allocation error becomes SnapshotRefused with the tensor's name and bytes."""

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(SnapshotRefused, match="tensor ids needs 56 bytes"):
        load(folder)
