"""Measure the errors of a compaction on held-out reference queries, by layer and by span of the transcript.

A compactor that fits its result to reference queries does not see the held-out queries. Two errors are measured on
each head. The first is the error of the *local output*: the attention output over the segment alone. The second is the
error of the *log-mass*: the log of the sum of ``exp(logit)`` over the segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from agentmem.attention.ragged import local
from agentmem.contracts import Curve, Reference, blocks
from agentmem.planning.pricing import HELD_OUT, checked_tokens
from agentmem.reporting.report import SpanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.contracts import Compaction, Compactor, HeadCompaction, HeadSegment, Segment

Errors = tuple[float | None, float | None]
"""The error of the attention output over the segment alone, and the error of the log-mass.

The log-mass is the log of the sum of ``exp(logit)`` over the segment. Both errors are ``None`` if not measured.
"""
WORST_SPANS = 3
CURVE_FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""Budgets at which error curves are measured, as fractions of the largest budget of a head."""


def split_references(references: Sequence[Reference]) -> tuple[tuple[Reference, ...], tuple[Reference, ...]]:
    """Split every reference into a first eighth, which is held out, and a rest; return views of both parts.

    The held-out parts come first in the result. A reference of fewer than 8 tokens has no held-out part.
    """
    held = tuple(_cut(each, 0, each.tokens // HELD_OUT) for each in references if each.tokens >= HELD_OUT)
    return held, tuple(_cut(each, each.tokens // HELD_OUT, each.tokens) for each in references)


def _cut(reference: Reference, start: int, stop: int) -> Reference:
    first = 0 if reference.span is None else reference.span[0]
    span = None if reference.span is None else (first + start, first + stop)
    return Reference(reference.queries[:, start:stop], reference.weight, reference.source, span)


Rounded = Callable[[torch.Tensor, Literal["keys", "values"]], torch.Tensor]
"""A function from fitted keys or values ``[n, d]`` to the numbers that the store will return for them."""


def _as_fitted(rows: torch.Tensor, _: str) -> torch.Tensor:
    """Return fitted keys or values unchanged, as a store without quantisation returns them."""
    return rows


@dataclass
class _Tally:
    """Sums over heads, from which the errors are computed.

    A local output is an attention output over the segment alone. The log-mass is the log of the sum of ``exp(logit)``
    over the segment. ``missed`` sums the squared errors of the local outputs, and ``total`` sums the squared local
    outputs before the compaction. ``mass`` sums the mean absolute errors of the log-mass; each mean is over the queries
    of one head. ``count`` is the number of these means.
    """

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
        """Return the relative L2 error of the attention output, and the mean absolute error of the log-mass.

        Both errors compare attention over the segment alone, before and after the compaction. The log-mass is the log
        of the sum of ``exp(logit)`` over the segment.
        """
        return (self.missed / self.total) ** 0.5 if self.total else 0.0, self.mass / max(1, self.count)


@dataclass
class HeldOut:
    """Collect the held-out errors of one compaction, layer by layer."""

    spans: dict[tuple[int, int], _Tally] = field(default_factory=dict)

    def measure(
        self, segment: Segment, compaction: Compaction, held: Sequence[Reference], rounded: Rounded = _as_fitted
    ) -> Errors:
        """Return the two errors that ``compaction`` causes in a layer: of the attention output, and of the log-mass.

        Both errors compare attention over the segment alone, before and after the compaction. The log-mass is the log
        of the sum of ``exp(logit)`` over the segment. The queries are ``held``, the held-out reference queries. If
        ``held`` is empty, both errors are ``None``.

        ``rounded`` maps fitted keys or values ``[n, d]`` to the numbers that the store will return for them.
        """
        layer = _Tally()
        for part in held:
            tally = _part_errors(segment, compaction, part, rounded)
            layer.add(tally)
            if part.span is not None:
                self.spans.setdefault(part.span, _Tally()).add(tally)
        return layer.errors if layer.count else (None, None)

    def worst_spans(self) -> tuple[SpanError, ...]:
        """Return the 3 spans with the largest output errors, worst first; empty if fewer than 2 were measured."""
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
    """Compare one KV head's attention before and after its compaction ``fit``, and return the sums of its errors.

    ``place`` is the index of the head and the number of KV heads. ``queries [Hq, n, d]`` has the queries of all heads.
    """
    group, tokens = queries.shape[0] // place[1], queries.shape[1]
    asked = queries[place[0] * group : (place[0] + 1) * group]
    old = (head.keys, head.values, head.bias)
    keys = old[0][fit.kept] if fit.keys is None else rounded(fit.keys, "keys").to(head.dtype)
    values = old[1][fit.kept] if fit.values is None else rounded(fit.values, "values").to(head.dtype)
    new = (keys, values, head.bias[fit.kept] if fit.bias is None else fit.bias)
    tally = _Tally(count=1)
    for block in blocks(tokens, checked_tokens(group, tokens)):
        output, log_mass = local(asked[:, block], *old, scale)
        fitted, fitted_mass = local(asked[:, block], *new, scale)
        tally.total += float(output.square().sum())
        tally.missed += float(fitted.sub_(output).square_().sum())
        tally.mass += float(fitted_mass.sub_(log_mass).abs_().sum()) / (group * tokens)
        del output, log_mass, fitted, fitted_mass  # before those of the next block are made
    return tally


def error_curves(compactor: Compactor, segment: Segment, held: Sequence[Reference], most: int) -> tuple[Curve, ...]:
    """Return one error curve per head: the head's errors at several numbers of kept slots, up to ``most``.

    The layer is compacted once for each number of slots; the memory is not changed. The errors are measured on the
    held-out reference queries ``held``.
    """
    sizes = [max(1, int(most * fraction)) for fraction in CURVE_FRACTIONS]
    rows: list[list[tuple[int, float, float]]] = [[] for _ in segment.heads]
    for size in dict.fromkeys(sizes):
        for row, point in zip(rows, _points(compactor, segment, held, size), strict=True):
            row.append(point)
    return tuple(_curve(points, head.slots) for points, head in zip(rows, segment.heads, strict=True))


def _points(
    compactor: Compactor, segment: Segment, held: Sequence[Reference], size: int
) -> list[tuple[int, float, float]]:
    """Compact a layer to ``size`` slots per head, and return ``(slots, output error, log-mass error)`` for each head.

    ``slots`` is ``size``, or fewer if the head has fewer. Both errors compare attention over the segment alone, before
    and after the compaction. The log-mass is the log of the sum of ``exp(logit)`` over the segment. The queries are
    ``held``, the held-out reference queries. If ``held`` is empty, both errors are infinite.

    This is a separate function so that the result of one compaction is freed before the next compaction.
    """
    slots = [min(size, head.slots) for head in segment.heads]
    compaction = compactor.compact(segment, slots)
    points = []
    for index, (head, fit) in enumerate(zip(segment.heads, compaction.heads, strict=True)):
        tally = _Tally()
        for part in held:
            tally.add(_head_errors(part.queries, (index, len(segment.heads)), head, fit, segment.scale))
        errors = tally.errors if tally.count else (math.inf, math.inf)  # unmeasured counts as worst
        points.append((slots[index], *errors))
    return points


def _curve(points: Sequence[tuple[int, float, float]], held: int) -> Curve:
    """Return one head's curve: its errors at each number of kept slots, in ascending order of this number.

    Each of ``points`` has a number of kept slots, the error of the attention output and the error of the log-mass.
    ``held`` is the number of slots that the head has. A point with this number and errors of 0 is added.
    """
    by_size = {size: (output, mass) for size, output, mass in points} | {held: (0.0, 0.0)}
    sizes = sorted(by_size)
    return Curve(tuple(sizes), tuple(by_size[size][0] for size in sizes), tuple(by_size[size][1] for size in sizes))
