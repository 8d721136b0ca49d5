"""Heavy hitters: the slots that have received the most attention so far.

Source: H2O, "Heavy-Hitter Oracle for Efficient Generative Inference", arXiv:2306.14048. The recent half of its cache
is the memory's ``keep_recent``; here slots leave in one go when the memory fills, not one a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentmem.contracts import Compaction, Compactor, HeadCompaction, HeadSegment, Policy, Segment, SegmentShape
from agentmem.policies.solvers.selection import top
from agentmem.policies.uniform import Uniform


class HeavyHitters(Compactor):
    """Keeps the slots with the largest score accumulators as they are; of equal ones, the newer."""

    scores = True

    def workspace(self, shape: SegmentShape) -> int:
        """One head's sort and all heads' kept indices."""
        return shape.slots * 24 + shape.heads * shape.budget * 8 + 1024

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """The ``slots[h]`` slots of every head with the most accumulated attention."""
        pairs = zip(segment.heads, slots, strict=True)
        return Compaction(tuple(HeadCompaction(top(_scores(head), count)) for head, count in pairs))


def _scores(head: HeadSegment) -> torch.Tensor:
    if head.scores is None:
        raise ValueError("this segment has no score accumulators; heavy hitters need a memory that keeps them")
    return head.scores


def heavy_hitters() -> Policy:
    """Keep the slots with the most attention so far, fit nothing."""
    return Policy(
        name="heavy-hitters",
        summary="slots with the most attention so far",
        source="H2O, arXiv:2306.14048",
        compactor=HeavyHitters(),
        budgets=Uniform(),
    )
