"""Errors on reference queries that were held out from the fit: by layer, and by span of the transcript."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from agentmem.attention.ragged import local
from agentmem.contracts import Curve, Reference
from agentmem.planning.pricing import HELD_OUT
from agentmem.reporting.report import SpanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.contracts import Compaction, Compactor, HeadCompaction, HeadSegment, Segment

Errors = tuple[float | None, float | None]
"""Of the output and of the log-mass, on held-out queries."""
WORST_SPANS = 3
CURVE_FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""Sizes at which error curves are measured, of the most that a head can get."""


def split_references(references: Sequence[Reference]) -> tuple[tuple[Reference, ...], tuple[Reference, ...]]:
    """Held-out and fitting queries, all of them views: the oldest eighth of every part is held out."""
    held = tuple(_cut(each, 0, each.tokens // HELD_OUT) for each in references if each.tokens >= HELD_OUT)
    return held, tuple(_cut(each, each.tokens // HELD_OUT, each.tokens) for each in references)


def _cut(reference: Reference, start: int, stop: int) -> Reference:
    first = 0 if reference.span is None else reference.span[0]
    span = None if reference.span is None else (first + start, first + stop)
    return Reference(reference.queries[:, start:stop], reference.weight, reference.source, span)


Rounded = Callable[[torch.Tensor], torch.Tensor]
"""How fitted keys or values ``[n, d]`` will be read once they are stored."""


def _as_fitted(rows: torch.Tensor) -> torch.Tensor:
    """As they are."""
    return rows


@dataclass
class _Tally:
    """Sums over heads: squared output error and squared output, absolute log-mass errors and their number."""

    missed: float = 0.0
    total: float = 0.0
    mass: float = 0.0
    count: int = 0

    def add(self, other: _Tally) -> None:
        self.missed += other.missed
        self.total += other.total
        self.mass += other.mass
        self.count += other.count

    @property
    def errors(self) -> tuple[float, float]:
        """Relative L2 error of the local output, mean absolute log-mass error."""
        return (self.missed / self.total) ** 0.5 if self.total else 0.0, self.mass / max(1, self.count)


@dataclass
class HeldOut:
    """Collects errors over the layers of one compaction."""

    spans: dict[tuple[int, int], _Tally] = field(default_factory=dict)

    def measure(
        self, segment: Segment, compaction: Compaction, held: Sequence[Reference], rounded: Rounded = _as_fitted
    ) -> Errors:
        """The errors of one layer's compaction; ``(None, None)`` without held-out queries.

        ``rounded`` says how fitted keys or values ``[n, d]`` will be read once they are stored.
        """
        layer = _Tally()
        for part in held:
            tally = _part_errors(segment, compaction, part, rounded)
            layer.add(tally)
            if part.span is not None:
                self.spans.setdefault(part.span, _Tally()).add(tally)
        return layer.errors if layer.count else (None, None)

    def worst_spans(self) -> tuple[SpanError, ...]:
        """The spans with the largest output errors, worst first; none when there is only one to choose from."""
        if len(self.spans) < 2:  # noqa: PLR2004  # one span has nothing to be compared with
            return ()
        ranked = sorted(self.spans.items(), key=lambda item: -item[1].errors[0])
        return tuple(
            SpanError(start=start, stop=stop, output_error=tally.errors[0], log_mass_error=tally.errors[1])
            for (start, stop), tally in ranked[:WORST_SPANS]
        )


def _part_errors(segment: Segment, compaction: Compaction, part: Reference, rounded: Rounded = _as_fitted) -> _Tally:
    tally = _Tally()
    for index, (head, fit) in enumerate(zip(segment.heads, compaction.heads, strict=True)):
        tally.add(_head_errors(part.queries, (index, len(segment.heads)), head, fit, segment.scale, rounded))
    return tally


def _head_errors(
    queries: torch.Tensor,
    place: tuple[int, int],
    head: HeadSegment,
    fit: HeadCompaction,
    scale: float,
    rounded: Rounded = _as_fitted,
) -> _Tally:
    """One head's errors: its queries are the ``place[0]``-th of ``place[1]`` groups of ``queries [Hq, n, d]``."""
    group = queries.shape[0] // place[1]
    asked = queries[place[0] * group : (place[0] + 1) * group]
    output, log_mass = local(asked, head.keys, head.values, head.bias, scale)
    keys = head.keys[fit.kept] if fit.keys is None else rounded(fit.keys).to(head.keys.dtype)
    values = head.values[fit.kept] if fit.values is None else rounded(fit.values).to(head.values.dtype)
    bias = head.bias[fit.kept] if fit.bias is None else fit.bias
    fitted, fitted_mass = local(asked, keys, values, bias, scale)
    return _Tally(
        missed=float((fitted - output).square().sum()),
        total=float(output.square().sum()),
        mass=float((fitted_mass - log_mass).abs().mean()),
        count=1,
    )


def error_curves(compactor: Compactor, segment: Segment, held: Sequence[Reference], most: int) -> tuple[Curve, ...]:
    """One curve per head: the layer is compacted to several sizes up to ``most`` slots, and nothing is committed."""
    sizes = [max(1, int(most * fraction)) for fraction in CURVE_FRACTIONS]
    rows: list[list[tuple[int, float, float]]] = [[] for _ in segment.heads]
    for size in dict.fromkeys(sizes):
        for row, point in zip(rows, _points(compactor, segment, held, size), strict=True):
            row.append(point)
    return tuple(_curve(points, head.slots) for points, head in zip(rows, segment.heads, strict=True))


def _points(
    compactor: Compactor, segment: Segment, held: Sequence[Reference], size: int
) -> list[tuple[int, float, float]]:
    """Slots and errors of every head. A function of its own, so that no compaction lives beside the next one."""
    slots = [min(size, head.slots) for head in segment.heads]
    compaction = compactor.compact(segment, slots)
    points = []
    for index, (head, fit) in enumerate(zip(segment.heads, compaction.heads, strict=True)):
        tally = _Tally()
        for part in held:
            tally.add(_head_errors(part.queries, (index, len(segment.heads)), head, fit, segment.scale))
        errors = tally.errors if tally.count else (math.inf, math.inf)  # what was not measured is not good
        points.append((slots[index], *errors))
    return points


def _curve(points: Sequence[tuple[int, float, float]], held: int) -> Curve:
    """Ascending, each size once; all slots kept is no error."""
    by_size = {size: (output, mass) for size, output, mass in points} | {held: (0.0, 0.0)}
    sizes = sorted(by_size)
    return Curve(tuple(sizes), tuple(by_size[size][0] for size in sizes), tuple(by_size[size][1] for size in sizes))
