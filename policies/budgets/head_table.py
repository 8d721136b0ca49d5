"""Read tables of head shares and error curves, as ``agentmem calibrate`` writes them, and find a model's table.

A head's *share* is its number of slots divided by the mean number of slots per head. Its *error curve* has the errors
that arise if only a fraction of the head's slots is kept, for several fractions. The package's own tables are in
``tables/``; a user names another table by its path.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from agentmem.contracts import ModelIdentity, check_file
from agentmem.untrusted.files import read_plain
from agentmem.untrusted.json_text import parsed
from agentmem.untrusted.texts import bounded, shown

VERSION = 1
MAX_BYTES = 16 << 20
"""Largest size in bytes of a table's file, checked before the file is read."""
_MAKE = (
    "make one with `agentmem calibrate --model MODEL --out FILE` and give it as budgets='calibrated[table=FILE]' (for "
    "a fine-tune 'calibrated[table=FILE,any_weights=true]'), or use budgets=global, which needs none"
)

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class HeadTable:
    """The head shares of one model, and its error curves if the calibration method measures errors.

    ``shares`` and ``errors`` are indexed by layer and KV head; layers that are never compacted are left out. The mean
    of the shares is 1. ``errors[layer][head][i]`` is the KL divergence between the model's predictions with all slots
    and those with only the fraction ``fractions[i]`` of this head's slots, in nats per token. Without error curves,
    ``fractions`` and ``errors`` are empty.
    """

    source: str
    model: ModelIdentity
    method: str
    shares: Rows
    fractions: tuple[float, ...] = ()
    errors: tuple[Rows, ...] = ()

    @property
    def head_ceiling(self) -> float:
        """The largest share in the table; a share is a head's number of slots divided by the mean number per head."""
        return max(map(max, self.shares))

    @property
    def layer_ceiling(self) -> float:
        """The largest mean share of a layer's heads in the table.

        A share is a head's number of slots divided by the mean number of slots per head in all layers.
        """
        return max(sum(layer) / len(layer) for layer in self.shares)


def read_table(path: str | Path) -> HeadTable:
    """Read a table that ``agentmem calibrate`` wrote.

    Raises:
        ValueError: the file does not exist or is not a table.

    """
    check_file(path)
    try:
        raw = read_plain(Path(path).expanduser(), MAX_BYTES)
    except OSError as error:
        raise ValueError(f"table {str(path)[:200]!r} cannot be read: {error}; {_MAKE}") from error
    return _parsed(raw, str(path))


def shipped_tables() -> tuple[HeadTable, ...]:
    """Return the tables that are part of the package, sorted by file name."""
    folder = resources.files("agentmem.policies").joinpath("tables")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return tuple(_parsed(file.read_bytes(), file.name) for file in files)


def fitting(tables: Iterable[HeadTable], model: ModelIdentity, *, any_weights: bool = False) -> HeadTable:
    """Return the first of ``tables`` that fits ``model``.

    A table fits if its KV heads and its fingerprint of the weights equal the model's. The fingerprint is ignored in two
    cases: if the model has none because its weights are not loaded, and with ``any_weights``, which lets a fine-tuned
    model use the table of its base model.

    Raises:
        ValueError: no table fits; the message names the model, the tables and the remedy.

    """
    tables = tuple(tables)
    for table in tables:
        if table.model.kv_heads != model.kv_heads:
            continue
        if any_weights or model.fingerprint is None or model.fingerprint == table.model.fingerprint:
            return table
    found = ", ".join(f"{table.source} for {_named(table.model)}" for table in tables) or "none at all"
    raise ValueError(f"no table of head shares for {_named(model)}: there is {found}; {_MAKE}")


def _named(model: ModelIdentity) -> str:
    heads = sorted(set(model.kv_heads))
    weights = f"weights {model.fingerprint[:12]}" if model.fingerprint else "weights unknown"
    many = " or ".join(map(str, heads)) or "0"
    return f"{model.name} ({len(model.kv_heads)} layers of {many} KV heads, {weights})"


def _parsed(raw: bytes, source: str) -> HeadTable:
    try:
        table = _table(parsed(raw, MAX_BYTES), source)
        _check(table)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(bounded(f"table {source[:200]!r} is no table of head shares: {reason}; {_MAKE}")) from error
    return table


def _table(found: Mapping[str, Any], source: str) -> HeadTable:
    if found["version"] != VERSION:
        raise ValueError(f"its version is {shown(found['version'])}, not {VERSION}")
    model, curves = found["model"], found.get("curves") or {}
    return HeadTable(
        source=source,
        model=ModelIdentity(str(model["name"]), model["fingerprint"], tuple(map(int, model["kv_heads"]))),
        method=str(found["method"]),
        shares=_rows(found["shares"]),
        fractions=tuple(map(float, curves.get("fractions", ()))),
        errors=tuple(_rows(layer) for layer in curves.get("errors", ())),
    )


def _rows(found: Iterable[Iterable[float]]) -> Rows:
    return tuple(tuple(map(float, row)) for row in found)


def _check(table: HeadTable) -> None:
    heads = table.model.kv_heads
    if not heads or tuple(map(len, table.shares)) != heads:
        raise ValueError(f"shares of {shown(tuple(map(len, table.shares)))} heads for {shown(heads)}")
    if not all(0 <= share < math.inf for layer in table.shares for share in layer) or not table.head_ceiling:
        raise ValueError("a share is negative or not finite, or all are 0")
    if not table.errors:
        return
    if tuple(map(len, table.errors)) != heads:
        raise ValueError(f"curves of {shown(tuple(map(len, table.errors)))} heads for {shown(heads)}")
    rising = all(low < high for low, high in zip(table.fractions, table.fractions[1:], strict=False))
    if not table.fractions or not rising or table.fractions[0] <= 0 or table.fractions[-1] > 1:
        raise ValueError(f"fractions {shown(table.fractions)} do not rise within 0 .. 1")
    for curve in (curve for layer in table.errors for curve in layer):
        if len(curve) != len(table.fractions) or not all(0 <= error < math.inf for error in curve):
            raise ValueError(f"a curve has {len(curve)} errors for {len(table.fractions)} fractions, or a negative one")
