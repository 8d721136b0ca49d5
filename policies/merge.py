"""Merge: slots with nearly the same key become one, which answers for all; the least attended ones leave.

Source: D2O, arXiv:2406.13035 (a cosine threshold decides between merging into the most similar key and eviction);
WeightedKV, arXiv:2503.01330 (the key stays as it is, values are averaged by attention); "Token Merging",
arXiv:2210.09461, section 3 (the logit of a merged token grows by the log of its size).

There tokens leave one a step, by attention summed up so far, and the threshold is an average that moves; here slots
leave in one go when the memory fills, by the attention of the newest tokens, and the threshold is fixed. β makes a slot
weigh what its group weighed: in tokens where ``weigh`` is "tokens", else in attention.
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
    """Merges similar slots into the most attended of them, then drops the least attended groups."""

    threshold: float = 0.9
    """The least cosine between two keys that merge."""
    weigh: Weigh = "attention"
    """What a slot weighs in its group: its mean attention weight, or what its β says, 1 for a token."""
    rest: Rest = "evict"
    """What becomes of slots that are too many and like no other: they leave, or join the nearest."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold: {self.threshold!r} is not a cosine; give a number from -1 to 1")
        for name, kind in (("weigh", Weigh), ("rest", Rest)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; choose one of {known}")

    def scratch(self, shape: SegmentShape) -> int:
        """Observing, then merging the values in float32."""
        rows = self._rows(shape.slots, shape.key_dim)
        casts = shape.slots * shape.value_dim * FLOAT if shape.itemsize < FLOAT else 0
        merging = casts + merging_bytes(shape.slots, rows, shape.key_dim, shape.value_dim)
        return self.attention_bytes(shape, then=merging)

    def workspace(self, shape: SegmentShape) -> int:
        """As any eviction, and the merged β and values of all heads."""
        return super().workspace(shape) + shape.heads * shape.budget * (1 + shape.value_dim) * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """The mean attention weight."""
        return importance(self.attention(segment, index), "mean").scores

    def keep(self, segment: Segment, index: int, count: int) -> HeadCompaction:
        """``count`` slots of KV head ``index``, merged and most attended."""
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
            rows=self._rows(head.slots, head.keys.shape[1]),
        )
        kept, bias, values = merged.value
        return HeadCompaction(kept, bias, values.to(head.values.dtype))

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
    """Merge slots whose keys have a cosine of at least ``threshold``; the least attended of the rest leave.

    Raises:
        ValueError: an option's value cannot work.

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
