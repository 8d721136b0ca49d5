"""Make the tables of an ablation.

An *instrument* is a kind of measurement: fidelity, recall or a task. A *cell* is one combination of the ablation's
settings, measured by one instrument. The CSV table has one line per cell. The tables for Markdown and HTML pool cells
that differ only in text and seed.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentmem.evaluation.ablation.scores import MEASURES, TASK, measure_of, scored

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from agentmem.evaluation.ablation.config import Ablation
    from agentmem.evaluation.ablation.intervals import Interval
    from agentmem.evaluation.ablation.lines import Line
    from agentmem.evaluation.ablation.rows import Row

_MISSING = "–"
_CELL = (
    "instrument",
    "model",
    "policy",
    "slots",
    "cap_bytes",
    "keep_first",
    "keep_recent",
    "target",
    "slot_dtype",
    "chunk",
    "seed",
)
_ROW = ("refused", "peak_bytes", "compactions", "seconds", "compact_seconds", "tokens", "key")


def as_csv(rows: Sequence[Row]) -> str:
    """Return all results as CSV, one line per cell with its settings, scores, bytes, seconds and provenance."""
    found = {each.row.key: each for each in scored(rows)}
    measures = [name for measure in (*MEASURES.values(), TASK) for name in (measure.name, *measure.columns)]
    provenance = list(type(rows[0].provenance).model_fields) if rows else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["text", *_CELL, *measures, *_ROW, *provenance])
    for row in rows:
        values: dict[str, float] = {}
        if row.key in found:
            units = found[row.key].units.values()
            values = {measure_of(row.cell.instrument).name: sum(units) / len(units), **found[row.key].figures}
        writer.writerow(
            [
                row.cell.source,
                *(getattr(row.cell, name) for name in _CELL),
                *(values.get(name, "") for name in measures),
                *(getattr(row, name) for name in _ROW),
                *(getattr(row.provenance, name) for name in provenance),
            ]
        )
    return text.getvalue()


@dataclass(frozen=True)
class Table:
    """One table of formatted cells; the first ``texts`` columns contain texts, all others numbers."""

    title: str
    note: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    texts: int
    best: frozenset[int]
    """Indices of the lines with the best score at their limit and setting."""


def tables(ablation: Ablation, lines: Sequence[Line]) -> tuple[Table, ...]:
    """Return the tables that show ``lines``: one table per instrument and model.

    An instrument is a kind of measurement: fidelity, recall or a task.
    """
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.instrument, line.model), []).append(line)
    several = len({line.model for line in lines}) > 1
    return tuple(
        _table(ablation, f"{name}, {model}" if several else name, group) for (name, model), group in groups.items()
    )


def _table(ablation: Ablation, title: str, lines: Sequence[Line]) -> Table:
    measure = measure_of(lines[0].instrument)
    varying = [
        name for name in ("keep_first", "keep_recent", "target", "slot_dtype") if len(getattr(ablation, name)) > 1
    ]
    percent = f"{ablation.confidence:.0%}"
    columns = ("policy", "limit", *varying, f"{measure.name} [{percent}]", f"to {ablation.compared_with} [{percent}]")
    costs = ("peak MiB", "compactions", "s each", "compacting")
    better = "lower" if measure.lower_is_better else "higher"
    return Table(
        title=title,
        note=f"{measure.name} in {measure.unit}, {better} is better; intervals by a paired bootstrap over "
        f"{max((line.score.units for line in lines if line.score), default=0)} units.",
        columns=(*columns, *measure.columns, *costs),
        lines=tuple(_cells(line, varying) for line in lines),
        texts=2 + len(varying),
        best=_best(lines, lower=measure.lower_is_better),
    )


def _cells(line: Line, varying: Iterable[str]) -> tuple[str, ...]:
    measure = measure_of(line.instrument)
    named = (line.policy, line.limit or _MISSING, *(str(getattr(line, name)) for name in varying))
    if line.score is None:
        return (*named, "refused", *([_MISSING] * (5 + len(measure.columns))))
    figures = (f"{line.figures[name]:.3f}" if name in line.figures else _MISSING for name in measure.columns)
    return (
        *named,
        interval(line.score, measure.digits),
        _MISSING if line.difference is None else interval(line.difference, measure.digits, sign="+"),
        *figures,
        f"{line.peak_bytes / 2**20:.2f}",
        f"{line.compactions:.3g}",
        f"{line.seconds_each:.2f}",
        f"{line.share:.0%}",
    )


def interval(found: Interval, digits: int, *, sign: str = "") -> str:
    """Format a mean with its interval, such as ``0.0123 [0.0101, 0.0160]``."""
    value = f"{found.mean:{sign}.{digits}f}"
    if found.low is None or found.high is None:
        return value
    return f"{value} [{found.low:{sign}.{digits}f}, {found.high:{sign}.{digits}f}]"


def _best(lines: Sequence[Line], *, lower: bool) -> frozenset[int]:
    best: dict[object, tuple[float, int]] = {}
    for place, line in enumerate(lines):
        if line.limit is None or line.score is None:
            continue
        setting = (line.limit, line.keep_first, line.keep_recent, line.target)
        value = line.score.mean if lower else -line.score.mean
        best[setting] = min(best.get(setting, (value, place)), (value, place))
    return frozenset(place for _, place in best.values())


def refusals(lines: Sequence[Line]) -> tuple[str, ...]:
    """Return the reasons why measurements could not be made, one text per reason.

    Each text begins with the kind of measurement (fidelity, recall or the name of a task), the policy, and the limit of
    the memory in slots or bytes.
    """
    return tuple(
        f"{line.instrument}, {line.policy}, {line.limit}: {reason}" for line in lines for reason in line.refused
    )


def as_markdown(ablation: Ablation, lines: Sequence[Line]) -> str:
    """Return all tables as one Markdown text, with the best score at every limit in bold.

    The reasons why cells could not be measured follow the tables.
    """
    parts = [f"# {ablation.title}\n"]
    for table in tables(ablation, lines):
        rule = ["---"] * table.texts + ["---:"] * (len(table.columns) - table.texts)
        body = [
            [
                f"**{cell}**" if place in table.best and column == table.texts else cell
                for column, cell in enumerate(one)
            ]
            for place, one in enumerate(table.lines)
        ]
        text = "\n".join("| " + " | ".join(map(_escaped, one)) + " |" for one in (table.columns, rule, *body))
        parts.append(f"## {table.title}\n\n{text}\n\n{table.note}\n")
    reasons = refusals(lines)
    if reasons:
        parts.append("## Refused\n\n" + "\n".join(f"- {_escaped(reason)}" for reason in reasons) + "\n")
    return "\n".join(parts)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
