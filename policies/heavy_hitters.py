"""Heavy hitters: the slots that have received the most attention so far.

Source: H2O, "Heavy-Hitter Oracle for Efficient Generative Inference", arXiv:2306.14048. The recent half of its cache
is the memory's ``keep_recent``; here slots leave in one go when the memory fills, not one a step.
"""

from __future__ import annotations

import torch

from agentmem.contracts import Policy, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import FLOAT, Eviction


class HeavyHitters(Eviction):
    """Keeps the slots with the largest score accumulators as they are; of equal ones, the newer."""

    scores = "received"

    def scratch(self, shape: SegmentShape) -> int:
        """A copy of the accumulators."""
        return shape.slots * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """The attention received so far: a copy, since a view would keep the memory's old store alive."""
        received = segment.heads[index].scores
        if received is None:
            raise ValueError("this segment has no score accumulators; heavy hitters need a memory that keeps them")
        return received.clone()


def heavy_hitters(*, budgets: str = "uniform") -> Policy:
    """Keep the slots with the most attention so far, fit nothing.

    Raises:
        ValueError: an option's value cannot work.

    """
    return Policy(
        name="heavy-hitters",
        summary="slots with the most attention so far",
        source="H2O, arXiv:2306.14048",
        compactor=HeavyHitters(),
        budgets=by_name(budgets),
    )
