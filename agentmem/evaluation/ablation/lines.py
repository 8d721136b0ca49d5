"""Make the lines of the tables; each line pools the results of cells that differ only in text and seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from pydantic import Field

from agentmem.evaluation.ablation.intervals import Interval, of_difference, of_mean
from agentmem.evaluation.ablation.scores import Scored, scored
from agentmem.evaluation.recall import FULL
from agentmem.evaluation.terms import Equal, Frozen
from agentmem.settings import SlotDtype

if TYPE_CHECKING:
    from agentmem.evaluation.ablation.config import Ablation
    from agentmem.evaluation.ablation.grid import Cell
    from agentmem.evaluation.ablation.rows import Row


class Line(Frozen):
    """One line of a table: the results of one policy at one limit and setting, pooled over all texts and seeds."""

    instrument: str
    model: str
    policy: str
    limit: str | None
    """Limit of the memory as tables show it, such as ``512 slots``; ``None`` for full memory."""
    equal: Equal
    """Unit of the limit: slots or bytes."""
    limit_value: int
    """Limit in slots or bytes; 0 for full memory."""
    keep_first: int
    keep_recent: int
    target: int | float | str
    slot_dtype: SlotDtype
    cells: int
    """Number of cells that were measured, one per text and seed."""
    refused: tuple[str, ...] = ()
    """Reasons why further cells of this line could not be measured, each listed once."""
    score: Interval | None = None
    difference: Interval | None = None
    """Mean over the units of the score minus the baseline's score; ``None`` for the baseline itself and full memory."""
    figures: dict[str, float] = Field(default={})
    """Further figures by name, such as ``KL p95``, each a mean over the cells."""
    peak_bytes: int = 0
    """The greatest peak of the cells, resident and temporary bytes together."""
    compactions: float = 0.0
    """Mean number of compactions per memory."""
    seconds_each: float = 0.0
    """Seconds per compaction."""
    share: float = 0.0
    """Share of ``seconds`` that was spent compacting, from 0 to 1."""
    seconds: float = 0.0
    tokens: int = 0
    """Tokens read and generated; like ``seconds``, a sum over the cells."""


def lines(ablation: Ablation, rows: Sequence[Row]) -> tuple[Line, ...]:
    """Make the lines of all tables from ``rows``, the results of cells: one line per policy and setting.

    Two cells have the same setting if they differ only in policy, text and seed.
    """
    scores = {each.row.key: each for each in scored(rows)}
    groups: dict[tuple[Hashable, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((_setting(row.cell), row.cell.policy), []).append(row)
    pooled = {key: [scores[row.key] for row in group if row.key in scores] for key, group in groups.items()}
    found = []
    for (setting, policy), group in groups.items():
        other = pooled.get((setting, ablation.compared_with), [])
        theirs = other if policy not in {ablation.compared_with, FULL} else []
        found.append(_line(ablation, group, pooled[setting, policy], theirs))
    return tuple(found)


def _setting(cell: Cell) -> Hashable:
    return (
        cell.instrument,
        cell.model,
        cell.slots,
        cell.cap_bytes,
        cell.keep_first,
        cell.keep_recent,
        cell.target,
        cell.slot_dtype,
    )


def _line(ablation: Ablation, group: Sequence[Row], ours: Sequence[Scored], theirs: Sequence[Scored]) -> Line:
    cell = group[0].cell
    line = Line(
        **{name: getattr(cell, name) for name in ("instrument", "model", "policy", "limit", "keep_first")},
        keep_recent=cell.keep_recent,
        target=cell.target,
        slot_dtype=cell.slot_dtype,
        equal=cell.terms.equal,
        limit_value=cell.cap_bytes or cell.slots or 0,
        cells=len(ours),
        refused=tuple(dict.fromkeys(row.refused for row in group if row.refused)),
    )
    return line.model_copy(update=_measured(ablation, ours, theirs)) if ours else line


def _measured(ablation: Ablation, ours: Sequence[Scored], theirs: Sequence[Scored]) -> dict[str, object]:
    how = {"confidence": ablation.confidence, "resamples": ablation.resamples}
    units, others = _units(ours), _units(theirs)
    shared = [key for key in units if key in others]
    rows = [each.row for each in ours]
    compactions, seconds = sum(row.compactions for row in rows), sum(row.seconds for row in rows)
    compacting = sum(row.compact_seconds for row in rows)
    paired = [units[key] for key in shared], [others[key] for key in shared]
    return {
        "score": of_mean(list(units.values()), **how),  # type: ignore[arg-type]  # a mixed dict
        "difference": of_difference(*paired, **how) if shared else None,  # type: ignore[arg-type]  # a mixed dict
        "figures": _means([each.figures for each in ours]),
        "peak_bytes": max(row.peak_bytes for row in rows),
        "compactions": compactions / sum(row.memories for row in rows),
        "seconds_each": compacting / max(1, compactions),
        "share": compacting / seconds if seconds else 0.0,
        "seconds": seconds,
        "tokens": sum(row.tokens for row in rows),
    }


def _units(found: Sequence[Scored]) -> dict[Hashable, float]:
    return {key: value for each in found for key, value in each.units.items()}


def _means(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in figures for name in each)
    return {name: mean(each[name] for each in figures if name in each) for name in names}
