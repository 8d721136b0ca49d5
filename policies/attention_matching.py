"""Attention Matching: keep the most attended keys, then fit β to the mass and the values to the output.

Source: "Fast KV Compaction via Attention Matching", arXiv:2602.16284. Added here: both fits are anchored at the kept
slots themselves, and β is carried from one compaction to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

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
from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.mass import MassFit, fit_mass
from agentmem.policies.solvers.selection import Score, importance, top
from agentmem.policies.solvers.values import ValueFit, fit_values

_FLOAT = 4
_INDEX = 8
_LEAST_ROWS = 32
_SMALL = 1024


@dataclass(frozen=True)
class AttentionMatching(Compactor):
    """Replaces each head's segment by its most attended keys with fitted β and values.

    Working memory per call, for T slots, t of them kept, N queries: one block of queries (``block_bytes``), one t x t
    matrix and a few rows per slot; never N x T. Arithmetic is float32 whatever the model's dtype: on real segments
    a float64 Gram changed no error in its fourth digit.
    """

    score: Score = "rms"
    """How a slot's attention weights are summed over the queries."""
    ridge_mass: float = 1e-2
    """Pull of β towards plain β, relative to the mean diagonal of its Gram."""
    ridge_values: float = 3e-3
    """Pull of the values towards the kept slots' own, likewise."""
    beta_bound: float = 3.0
    """One compaction changes β by at most this much; the total is not bounded."""
    steps: int = 2
    """Projected-gradient steps after the clamped least-squares start."""
    value_bound: float = 2.0
    """No value moves further from its own than this many times the longest value of the segment."""
    block_bytes: int = 2**19
    """Bytes of one block of queries with its weights; a block has at least 32 rows."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if self.score not in get_args(Score):
            raise ValueError(f"score: {self.score!r} is unknown; choose one of {', '.join(get_args(Score))}")
        for name in ("ridge_mass", "ridge_values", "beta_bound", "value_bound", "block_bytes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a positive number; give one above 0")
        if self.steps < 0:
            raise ValueError(f"steps: {self.steps} is negative; give 0 or more")

    def workspace(self, shape: SegmentShape) -> int:
        """Bytes of one head's largest phase (scoring, sorting, fitting) and of all heads' results or survey."""
        slots, kept, queries = shape.slots, shape.budget, shape.group * shape.queries
        row = _row_bytes(slots, shape.key_dim, shape.value_dim)
        block = row * self._rows(row, shape.queries)
        widths = shape.key_dim + shape.value_dim
        casts = slots * widths * _FLOAT if shape.itemsize < _FLOAT else 0
        held = casts + (queries + 2 * slots) * _FLOAT
        sort = slots * 2 * (_FLOAT + _INDEX)
        rows = kept * (widths + 4) * _FLOAT
        pull = kept * shape.value_dim * _FLOAT
        fit = rows + kept * kept * _FLOAT + pull + max(block, 2 * pull)
        results = shape.heads * max(kept * (_INDEX + _FLOAT + shape.value_dim * _FLOAT), slots * _FLOAT)
        return held + max(block, sort, fit) + results + _SMALL

    def survey(self, segment: Segment) -> Survey:
        """The slots' importance, as :meth:`compact` would score them."""
        attentions = (self._attention(segment, head) for head in range(len(segment.heads)))
        return Survey(segment.layer, tuple(importance(attention, self.score).scores for attention in attentions))

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """Fit one head after the other. A head that may keep all it holds is left as it is."""
        heads: list[HeadCompaction] = []
        condition, fallbacks = 1.0, []
        for index, (head, count) in enumerate(zip(segment.heads, slots, strict=True)):
            if count >= head.slots or count == 0:
                heads.append(HeadCompaction(torch.arange(count, device=head.keys.device)))
                continue
            compaction, mass, values = self._fit(head, self._attention(segment, index), count)
            heads.append(compaction)
            condition = max(condition, mass.condition, values.condition)
            fallbacks += [f"head {index}: {note}" for note in _notes(mass, values)]
        return Compaction(tuple(heads), Numerics(condition, tuple(fallbacks)))

    def _fit(
        self, head: HeadSegment, attention: LocalAttention, count: int
    ) -> tuple[HeadCompaction, MassFit, ValueFit]:
        """Score all slots, keep the top, fit β, fit values: three passes over the queries."""
        found = importance(attention, self.score)
        kept = top(found.scores, count)
        plain = attention.over(attention.keys[kept], head.bias[kept])
        mass = fit_mass(plain, found.log_mass, ridge=self.ridge_mass, bound=self.beta_bound, steps=self.steps)
        bias = plain.bias + mass.log_weights
        values = head.values.float()
        fitted = fit_values(
            attention,
            plain.over(plain.keys, bias),
            values,
            values[kept],
            ridge=self.ridge_values,
            bound=self.value_bound,
        )
        return HeadCompaction(kept, bias, fitted.values.to(head.values.dtype)), mass, fitted

    def _attention(self, segment: Segment, index: int) -> LocalAttention:
        head, queries = segment.heads[index], segment.queries(index)
        if queries.shape[1] == 0:
            raise ValueError("0 reference queries: Attention Matching needs at least 1; give the probe a token")
        rows = self._rows(_row_bytes(head.slots, head.keys.shape[1], head.values.shape[1]), queries.shape[1])
        return LocalAttention(queries, head.keys.float(), head.bias, segment.scale, rows)

    def _rows(self, row_bytes: int, queries: int) -> int:
        """Queries per block."""
        return min(queries, max(_LEAST_ROWS, self.block_bytes // row_bytes))


def _row_bytes(slots: int, key_dim: int, value_dim: int) -> int:
    """One query in a block: its cast and the last block's, its weights over the slots, its output, a few numbers."""
    return _FLOAT * (slots + 2 * key_dim + value_dim + 4)


def _notes(mass: MassFit, values: ValueFit) -> list[str]:
    notes = []
    if not mass.accepted:
        notes.append("plain β kept, no fit beat it")
    if not values.accepted:
        notes.append("own values kept, no fit beat them")
    if values.bounded:
        notes.append(f"{values.bounded} values cut to the bound")
    return notes
