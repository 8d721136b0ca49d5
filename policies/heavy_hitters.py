"""Heavy hitters: the slots that have received the most attention so far.

Source: H2O, "Heavy-Hitter Oracle for Efficient Generative Inference", arXiv:2306.14048. H2O reserves half of its cache
for recent tokens; here the memory's ``keep_recent`` does that. H2O drops one slot per step; here many slots are dropped
at once when the memory fills.
"""

from __future__ import annotations

import torch

from agentmem.contracts import Policy, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import FLOAT, Eviction


class HeavyHitters(Eviction):
    """Keeps unchanged the slots with the largest accumulated attention; of equally scored slots it keeps the newer."""

    scores = "received"
    reads_keys = False

    def scratch(self, shape: SegmentShape) -> int:
        """Return the bytes of one head's scores, which :meth:`score` copies."""
        return shape.slots * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return a copy of the attention that each slot has received; a view would keep the old storage allocated."""
        received = segment.heads[index].scores
        if received is None:
            raise ValueError("this segment has no score accumulators; heavy hitters need a memory that keeps them")
        return received.clone()


def heavy_hitters(*, budgets: str = "uniform") -> Policy:
    """Keep the slots that have received the most attention so far, unchanged.

    Raises:
        ValueError: an option's value is unknown or out of range.

    """
    return Policy(
        name="heavy-hitters",
        summary="slots with the most attention so far",
        source="H2O, arXiv:2306.14048",
        compactor=HeavyHitters(),
        budgets=by_name(budgets),
    )
