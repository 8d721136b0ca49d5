"""Attention Matching: choose the slots that stay, fit their β to the attention mass, then their values to the output.

A query's attention *mass* is the sum of ``exp(logit)`` over the segment's slots. A slot's *importance* is a statistic
of its attention weights over all reference queries.

Source: "Fast KV Compaction via Attention Matching", arXiv:2602.16284. This module adds three things: both fits are
pulled towards the kept slots' own β and values; β is carried from one compaction to the next; a slot's importance is
carried, too, if ``carry`` is above 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from agentmem.contracts import (
    Compaction,
    Compactor,
    HeadCompaction,
    HeadSegment,
    Numerics,
    Segment,
    SegmentShape,
    Survey,
)
from agentmem.policies.compactors.selectors import Highest, Selection, Selector
from agentmem.policies.solvers.anchored import STRIP, upper_bytes
from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.mass import fit_mass
from agentmem.policies.solvers.nonnegative import pivoting_bytes
from agentmem.policies.solvers.refine import refine, refine_bytes
from agentmem.policies.solvers.selection import Importance, Score, importance
from agentmem.policies.solvers.solution import Outcome, Solution
from agentmem.policies.solvers.values import fit_values

Mass = Literal["projected", "exact", "none"]
Values = Literal["fitted", "own"]

_FLOAT = 4
_INDEX = 8
_LEAST_ROWS = 32
_SMALL = 1024


@dataclass(frozen=True)
class AttentionMatching(Compactor):
    """Keeps selected slots of each head's segment, with β and values fitted to the reference queries.

    Let a head have T slots, of which t are kept, and N reference queries. A call needs memory for one block of queries
    (``block_bytes``), half of a t x t matrix, the keys and values in float32, and a few numbers per slot and per query.
    No N x T matrix is made. A pursuit selector needs a T x T matrix, too. Arithmetic is float32 whatever the model's
    dtype: on real segments, a float64 Gram matrix left the first four digits of every error unchanged.
    """

    needs_queries = True

    selector: Selector = field(default_factory=Highest)
    """Chooses the slots that stay."""
    score: Score = "rms"
    """Statistic of a slot's attention weights over all queries ("rms", "max", "mean") that measures its importance."""
    mass: Mass = "projected"
    """Method of the β fit: "projected" takes projected-gradient steps from a clamped start, "exact" finds the minimum,
    and "none" leaves β as it is. A pursuit selector fits β itself, so this setting has no effect with it."""
    ridge_mass: float = 1e-2
    """Strength of the pull of β towards its old value, relative to the mean diagonal of the fit's Gram matrix."""
    ridge_values: float = 3e-3
    """Strength of the pull of the values towards the kept slots' own, relative to the mean diagonal of the Gram
    matrix."""
    beta_bound: float = 3.0
    """Largest change of a slot's β in one compaction; the change over several compactions is not bounded."""
    steps: int = 2
    """Number of projected-gradient steps after the clamped least-squares start."""
    value_bound: float = 2.0
    """Largest distance between a slot's fitted and own value, as a multiple of the segment's longest value."""
    values: Values = "fitted"
    """Treatment of the kept slots' values: "fitted" fits them, "own" leaves them as they are. The setting "own" with
    ``mass="none"`` is plain eviction."""
    refine: int = 0
    """Number of gradient steps on keys, β and values after the fits; 0 leaves the keys as they are."""
    carry: float = 0.0
    """Fraction of a slot's score that is carried to the next compaction. The score is the larger of the slot's present
    importance and ``carry`` times its previous score. 0 carries nothing; above 0, the memory stores every slot's
    score."""
    block_bytes: int = 2**19
    """Size in bytes of one block of queries with its weights; a block has at least 32 rows, even if that is larger."""

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is unknown or out of range."""
        for name, kind in (("score", Score), ("mass", Mass), ("values", Values)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; choose one of {known}")
        for name in ("ridge_mass", "ridge_values", "beta_bound", "value_bound", "block_bytes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a positive number; give one above 0")
        if not 0 <= self.carry <= 1:
            raise ValueError(f"carry: {self.carry} is no fraction; give 0 (forget) to 1 (keep all)")
        object.__setattr__(self, "scores", "carried" if self.carry else "none")
        for name in ("steps", "refine"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)!r} is negative or no whole number; give 0, 1, 2, …")

    def workspace(self, shape: SegmentShape) -> int:
        """Return the bytes of one head's largest phase (scoring, sorting or fitting) plus the other heads' results."""
        slots, kept, queries = shape.slots, shape.budget, shape.group * shape.queries
        row = _row_bytes(slots, shape.key_dim, shape.value_dim)
        rows = self._rows(row, shape.queries)
        block = row * rows
        widths = shape.key_dim + shape.value_dim
        casts = slots * widths * _FLOAT if shape.itemsize < _FLOAT else 0
        held = casts + (2 * queries + 2 * slots) * _FLOAT
        select = self.selector.workspace(shape, rows)
        exact = kept * kept * _FLOAT + pivoting_bytes(kept, kept) if self.mass == "exact" else 0
        slots_kept = kept * (widths + 4) * _FLOAT
        pull = kept * shape.value_dim * _FLOAT
        solve = pull + 4 * min(kept, STRIP) * shape.value_dim * _FLOAT
        fit = slots_kept + max(upper_bytes(kept) + pull + max(block, solve), exact)
        refined = 0
        if self.refine:
            refined = 2 * slots_kept + refine_bytes(slots, kept, queries, rows, shape.key_dim, shape.value_dim)
        moved = shape.value_dim + (shape.key_dim if self.refine else 0)
        indices = kept * (_INDEX + 2 * _FLOAT)
        result = max(indices + kept * moved * shape.itemsize, slots * _FLOAT)
        last = held + max(block, select, fit, refined) + indices + (shape.heads - 1) * result
        return max(last, shape.heads * result) + _SMALL

    def survey(self, segment: Segment) -> Survey:
        """Return the importance of all slots, as :meth:`compact` would compute it."""
        return Survey(
            segment.layer, tuple(self._importance(segment, index).scores for index in range(len(segment.heads)))
        )

    def _importance(self, segment: Segment, index: int) -> Importance:
        if not segment.heads[index].slots:
            return Importance(segment.heads[index].bias.clone(), segment.heads[index].bias[:0])
        found, old = importance(self._attention(segment, index), self.score), segment.heads[index].scores
        if old is not None:
            torch.maximum(found.scores, old * self.carry, out=found.scores)
        return found

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """Compact one head after the other; a head whose budget covers all its slots is left as it is."""
        heads = [self._compact_head(segment, index, count) for index, count in enumerate(slots)]
        fallbacks = tuple(
            f"head {index}: {note}" for index, (_, numerics) in enumerate(heads) for note in numerics.fallbacks
        )
        condition = max((numerics.condition for _, numerics in heads), default=1.0)
        return Compaction(tuple(compaction for compaction, _ in heads), Numerics(condition, fallbacks))

    def _compact_head(self, segment: Segment, index: int, count: int) -> tuple[HeadCompaction, Numerics]:
        """Compact one head; a method of its own so that nothing of one head exists while the next is compacted."""
        head = segment.heads[index]
        if count >= head.slots or count == 0:
            kept = torch.arange(count, device=head.bias.device)
            scores = self._importance(segment, index).scores[:count].clone() if self.carry else None
            return HeadCompaction(kept, scores=scores), Numerics()
        found, attention = self._importance(segment, index), self._attention(segment, index)
        seed = hash((segment.generator.initial_seed(), segment.layer))
        selection = self.selector.select(attention, found, count, seed, self.beta_bound)
        compaction, mass, values = self._fit(head, attention, found, selection)
        condition = max(1.0, mass.condition, values.condition if values else 1.0)
        return compaction, Numerics(condition, tuple(_notes(mass, values)))

    def _fit(
        self, head: HeadSegment, attention: LocalAttention, found: Importance, selection: Selection
    ) -> tuple[HeadCompaction, Solution[torch.Tensor], Solution[torch.Tensor] | None]:
        """Fit the selected slots' β, then their values; with ``refine`` above 0, refine keys, β and values.

        The two fits take two passes over the queries. Return the head's compaction, the solution of the β fit, and that
        of the value fit (``None`` without a value fit).
        """
        kept = selection.kept
        plain = attention.over(attention.keys[kept], head.bias[kept])
        mass = self._fit_mass(plain, found, selection)
        bias = plain.bias + mass.value
        scores = found.scores[kept] if self.carry else None
        fitted, better = None, None
        values = head.values.float()
        start = values[kept]
        if self.values == "fitted":
            fitted = fit_values(
                attention,
                plain.over(plain.keys, bias),
                values,
                start,
                ridge=self.ridge_values,
                bound=self.value_bound,
            )
            start = fitted.value
        if self.refine:
            better = refine(attention, plain.over(plain.keys, bias), values, start, steps=self.refine)
        if better is not None and better.accepted:
            keys, bias, values = better.value
            moved = values.to(head.dtype)
            return HeadCompaction(kept, bias, moved, keys.to(head.dtype), scores), mass, fitted
        new = None if fitted is None else start.to(head.dtype)
        return HeadCompaction(kept, bias, new, scores=scores), mass, fitted

    def _fit_mass(self, plain: LocalAttention, found: Importance, selection: Selection) -> Solution[torch.Tensor]:
        if selection.mass is not None:
            return selection.mass
        if self.mass == "none":
            return Solution(torch.zeros_like(plain.bias))
        steps = None if self.mass == "exact" else self.steps
        return fit_mass(plain, found.log_mass, ridge=self.ridge_mass, bound=self.beta_bound, steps=steps)

    def _attention(self, segment: Segment, index: int) -> LocalAttention:
        head, queries = segment.heads[index], segment.queries(index)
        tokens = sum(part.shape[1] for part in queries)
        if tokens == 0:
            raise ValueError("0 reference queries: Attention Matching needs at least 1; give the probe a token")
        rows = self._rows(_row_bytes(head.slots, head.key_dim, head.value_dim), tokens)
        return LocalAttention(queries, head.keys.float(), head.bias, segment.scale, rows).weighted(segment.weights)

    def _rows(self, row_bytes: int, queries: int) -> int:
        """Return the number of queries per block, if one query takes ``row_bytes`` bytes."""
        return min(queries, max(_LEAST_ROWS, self.block_bytes // row_bytes))


def _row_bytes(slots: int, key_dim: int, value_dim: int) -> int:
    """Return the bytes that each query of a block takes.

    These are the query in float32, its weights over the slots, its output and a few numbers. The queries are counted
    twice, since those of the previous block are freed only after the new block is made.
    """
    return _FLOAT * (slots + 2 * key_dim + value_dim + 4)


def _notes(mass: Solution[torch.Tensor], values: Solution[torch.Tensor] | None) -> list[str]:
    notes = []
    if mass.outcome is not Outcome.SOLVED:
        notes.append(f"{'β fitted' if mass.accepted else 'plain β kept'}, {mass.outcome.value}")
    if values is not None and not values.accepted:
        notes.append(f"own values kept, {values.outcome.value}")
    if values is not None and values.stats["bounded"]:
        notes.append(f"{values.stats['bounded']} values cut to the bound")
    return notes
