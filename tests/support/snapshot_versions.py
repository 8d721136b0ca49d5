"""Small snapshots that tell their version, for the tests of snapshot files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from agentmem.sessions.snapshots.files import read_snapshot, write_snapshot

IDENTITY = {"model": "5f" * 32, "tokenizer": "a0" * 32}
LIMIT = 1 << 20


def tensors_of(version: int) -> dict[str, torch.Tensor]:
    """A few tensors that tell their version."""
    return {
        "keys": torch.arange(12.0).reshape(3, 4) + version,
        "values": torch.full((2, 5), version, dtype=torch.bfloat16),
        "ids": torch.full((7,), version),
        "ended": torch.tensor([True, False]),
    }


def save(url: str | Path, version: int) -> None:
    """Save version ``version``."""
    write_snapshot(url, tensors_of(version), {"version": version}, identity=IDENTITY)


def load(url: str | Path, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Load what is there with the identity of this file."""
    return read_snapshot(url, **{"identity": IDENTITY, "max_bytes": LIMIT} | settings)


def loaded_version(url: str | Path) -> int:
    """The version that is there; every tensor of it must be right."""
    tensors, state = load(url)
    version = int(state["version"])
    expected = tensors_of(version)
    assert state == {"version": version}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    return version


def data_files(folder: Path) -> set[str]:
    """Names in the folder, apart from the manifest and the lock."""
    return {path.name for path in folder.iterdir()} - {"manifest.json", "snapshot.lock"}
