"""Compute a score for every unit of a measured cell, so that two policies can be compared unit by unit.

A cell is one combination of an ablation's settings, measured by one instrument. A *unit* is the smallest part of a
measurement that has a score of its own. For recall, a unit is one fact; for a task, one sample in one epoch. For
fidelity, a unit is a block of at most 32 neighbouring positions, and its score is their mean KL. Single positions are
not used as units, because bootstrap intervals assume that units are independent, and neighbouring positions are not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from agentmem.evaluation import fidelity, recall
from agentmem.evaluation.ablation.rows import Row
from agentmem.evaluation.fidelity import Measurement
from agentmem.evaluation.recall import FULL, Recalled
from agentmem.evaluation.tasks.attempt import Attempt

BLOCK = 32
"""The most positions in one unit of fidelity."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A description of the main score of an instrument (fidelity, recall or a task) for the tables."""

    name: str
    unit: str
    lower_is_better: bool
    digits: int
    columns: tuple[str, ...]
    """Names of further numbers that tables show, in the order of the columns."""


MEASURES: dict[str, Measure] = {
    "fidelity": Measure("KL", "nats", True, 4, ("KL p95", "top-1", "ΔNLL")),  # noqa: FBT003  # a field
    "recall": Measure("log-probability", "nats", False, 2, ("exact", "recovered")),  # noqa: FBT003  # a field
}

TASK = Measure("score", "share", False, 3, ("tokens generated", "forced"))  # noqa: FBT003  # a field


def measure_of(instrument: str) -> Measure:
    """Return the description of an instrument's main score; all tasks share one description."""
    return MEASURES.get(instrument, TASK)


@dataclass(frozen=True)
class Scored:
    """The scores of one measurement of an ablation; ``row`` is the result of the measurement.

    ``units`` has a score for each unit, which is the smallest part of a measurement that has a score of its own. For
    recall, a unit is one fact; for a task, one sample in one epoch; for fidelity, a block of at most 32 positions.
    Measurements that differ only in their policy have the same keys in ``units``, so they can be compared unit by unit.
    ``figures`` has the further numbers that tables show, by name.
    """

    row: Row
    units: dict[Hashable, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def scored(rows: Sequence[Row]) -> tuple[Scored, ...]:
    """Compute the scores of all rows, in the order of the rows; rows without measurements are left out.

    A row is the result of one combination of an ablation's settings, or the reason why it could not be measured.

    Rows that differ only in their policy form a group. All fidelity rows of a group are scored on the same positions.
    All recall rows of a group are compared with the same two results: that of the policy ``window``, and that of full
    memory.
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        if row.runs:
            groups.setdefault(_same(row), []).append(row)
    full = {_place(row): row for row in rows if row.runs and row.cell.policy == FULL}
    found: list[Scored] = []
    for group in groups.values():
        if group[0].cell.instrument == "fidelity":
            found += _fidelity(group)
        elif group[0].cell.instrument != "recall":
            found += (_task(row) for row in group)
        else:
            found += _recall(group, full.get(_place(group[0])))
    order = {row.key: place for place, row in enumerate(rows)}
    return tuple(sorted(found, key=lambda each: order[each.row.key]))


def _place(row: Row) -> Hashable:
    cell = row.cell
    return cell.instrument, cell.model, cell.text, cell.seed


def _same(row: Row) -> Hashable:
    cell = row.cell
    return _place(row), cell.slots, cell.cap_bytes, cell.keep_first, cell.keep_recent, cell.target, cell.slot_dtype


def _fidelity(group: Sequence[Row]) -> Iterable[Scored]:
    runs = [run for row in group for run in row.runs if isinstance(run, Measurement)]
    for row, run, line in zip(group, runs, fidelity.rows(runs), strict=True):
        judged = np.array(run.kl[len(run.kl) - line.positions :])
        blocks = np.array_split(judged, max(1, -(-len(judged) // BLOCK)))
        units: dict[Hashable, float] = {
            (row.cell.source, row.cell.seed, index): float(block.mean()) for index, block in enumerate(blocks)
        }
        yield Scored(row, units, {"KL p95": line.kl_p95, "top-1": line.top1, "ΔNLL": line.delta_nll})


def _recall(group: Sequence[Row], full: Row | None) -> Iterable[Scored]:
    rows = group if full is None or full in group else [full, *group]
    found = [run for row in rows for run in row.runs if isinstance(run, Recalled)]
    lines = {line.policy: line for line in recall.rows(found, group[0].cell.terms.equal, len(group[0].runs))}
    for row in group:
        answers = [answer for run in row.runs if isinstance(run, Recalled) for answer in run.answers]
        units: dict[Hashable, float] = {
            (row.cell.source, row.cell.seed, index): answer.log_prob for index, answer in enumerate(answers)
        }
        figures = {"exact": sum(answer.exact for answer in answers) / len(answers)}
        line = lines.get(row.cell.policy)
        if line is not None and line.recovered is not None:
            figures["recovered"] = line.recovered
        elif row.cell.policy == FULL:
            figures["recovered"] = 1.0
        yield Scored(row, units, figures)


def _task(row: Row) -> Scored:
    runs = [run for run in row.runs if isinstance(run, Attempt)]
    units: dict[Hashable, float] = {(row.cell.seed, run.sample, run.epoch): run.score for run in runs}
    written, forced = (sum(getattr(run, name) for run in runs) / len(runs) for name in ("tokens_generated", "forced"))
    return Scored(row, units, {"tokens generated": written, "forced": forced})
