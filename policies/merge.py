"""Merge: each group of slots with nearly equal keys is merged into one slot, and the least attended slots are dropped.

Source: D2O, arXiv:2406.13035 (a cosine threshold decides between merging into the most similar key and eviction);
WeightedKV, arXiv:2503.01330 (the key stays as it is, values are averaged by attention); "Token Merging",
arXiv:2210.09461, section 3 (the logit of a merged token grows by the log of its size).

D2O drops one token per step, by the attention summed up so far, and its threshold is a moving average. Here many slots
are dropped at once when the memory fills, by the attention of the newest tokens, and the threshold is fixed. The β of a
merged slot is raised, so that the slot weighs as much as its whole group. A group's weight is its number of tokens if
``weigh`` is "tokens", and its attention if ``weigh`` is "attention".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from agentmem.contracts import HeadCompaction, Policy, Queries, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import FLOAT, Observation, check_window
from agentmem.policies.solvers.merging import Rest, merging_bytes
from agentmem.policies.solvers.merging import merge as merge_slots
from agentmem.policies.solvers.selection import importance

Weigh = Literal["attention", "tokens"]

_INDEX = 8
_LEAST_ROWS = 32
_TINY = 1e-30


@dataclass(frozen=True)
class Merging(Observation):
    """Merges each group of similar slots into its most attended slot, then drops the least attended groups."""

    reads_values = True

    threshold: float = 0.9
    """The smallest cosine between two keys at which their slots may merge."""
    weigh: Weigh = "attention"
    """Weight of a slot in its group: its mean attention weight ("attention"), or e^β, which is 1 for a plain token
    ("tokens")."""
    rest: Rest = "evict"
    """Treatment of excess slots that resemble no other slot: "evict" drops them, "nearest" merges each into the nearest
    kept slot."""

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is unknown or out of range."""
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold: {self.threshold!r} is not a cosine; give a number from -1 to 1")
        for name, kind in (("weigh", Weigh), ("rest", Rest)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; choose one of {known}")

    def scratch(self, shape: SegmentShape) -> int:
        """Return the bytes of the attention of the reference queries, or of the merging if that takes more."""
        rows = self._rows(shape.slots, shape.key_dim)
        casts = shape.slots * shape.value_dim * FLOAT if shape.itemsize < FLOAT else 0
        merging = casts + merging_bytes(shape.slots, rows, shape.key_dim, shape.value_dim)
        return self.attention_bytes(shape, then=merging)

    def workspace(self, shape: SegmentShape) -> int:
        """Return an eviction's workspace plus the bytes of the new β and values of all heads."""
        return super().workspace(shape) + shape.heads * shape.budget * (1 + shape.value_dim) * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return each slot's mean attention weight over the reference queries."""
        return importance(self.attention(segment, index), "mean").scores

    def keep(self, segment: Segment, index: int, count: int) -> HeadCompaction:
        """Merge similar slots of KV head ``index``, then drop the least attended, so that ``count`` slots are left."""
        head = segment.heads[index]
        if count == 0 or count >= head.slots:
            return super().keep(segment, index, count)
        attention = self.attention(segment, index)
        weights = importance(attention, "mean").scores
        merged = merge_slots(
            attention.keys,
            head.values.float(),
            head.bias,
            weights,
            count,
            threshold=self.threshold,
            log_weights=weights.clamp(min=_TINY).log_() if self.weigh == "attention" else None,
            rest=self.rest,
            rows=self._rows(head.slots, head.key_dim),
        )
        kept, bias, values = merged.value
        return HeadCompaction(kept, bias, values.to(head.dtype))

    def _rows(self, slots: int, key_dim: int) -> int:
        return max(_LEAST_ROWS, self.block_bytes // (FLOAT * (slots + key_dim)))


def merge(
    *,
    window: int = 32,
    threshold: float = Merging.threshold,
    weigh: Weigh = Merging.weigh,
    rest: Rest = Merging.rest,
    budgets: str = "uniform",
) -> Policy:
    """Merge slots whose keys have a cosine of at least ``threshold``; drop the least attended of the other slots.

    Raises:
        ValueError: an option's value is unknown or out of range.

    """
    check_window(window)
    return Policy(
        name="merge",
        summary="similar slots merged into the most attended of them, the least attended left out",
        source="D2O, arXiv:2406.13035",
        compactor=Merging(threshold=threshold, weigh=weigh, rest=rest),
        budgets=by_name(budgets),
        queries=Queries.of("live", tokens=window),
    )
