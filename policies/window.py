"""Window: a policy that keeps the memory's prefix (the attention sinks) and the most recent slots.

Source: StreamingLLM, "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453. The memory's
``keep_first`` sets the number of sinks. Here the RoPE phase of kept keys does not change; the paper numbers the
positions within the cache anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentmem.contracts import Compaction, Compactor, HeadCompaction, HeadSegment, Policy, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name


class MostRecent(Compactor):
    """Keeps the last slots of every head's segment, unchanged."""

    fits = reads_keys = reads_values = False

    def workspace(self, shape: SegmentShape) -> int:
        """Return the bytes of the kept indices of all heads."""
        return shape.heads * shape.budget * 8

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """Keep the last ``slots[h]`` slots of every head ``h``."""
        pairs = zip(segment.heads, slots, strict=True)
        return Compaction(tuple(HeadCompaction(_last(head, count)) for head, count in pairs))


def _last(head: HeadSegment, count: int) -> torch.Tensor:
    return torch.arange(head.slots - count, head.slots, device=head.bias.device)


def window(*, budgets: str = "uniform") -> Policy:
    """Keep the prefix and the most recent slots; drop all other slots.

    Raises:
        ValueError: an option's value is unknown or out of range, or ``budgets`` need scores, which this policy does not
            compute.

    """
    return Policy(
        name="window",
        summary="prefix and most recent slots",
        source="StreamingLLM, arXiv:2309.17453",
        compactor=MostRecent(),
        budgets=by_name(budgets),
    )
