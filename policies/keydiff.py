"""KeyDiff: the slots whose keys are least like the mean key.

Source: "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
Environments", arXiv:2504.15364, in its efficient form: slots are evicted whose keys have the largest cosine with the
*anchor*, the mean of the normalised keys. No query is needed.

The paper evicts after every block of a prompt and every generated token; here many slots are evicted at once when the
memory fills. The anchor here is the mean over the segment alone; the paper's anchor covers the whole cache.
"""

from __future__ import annotations

import torch

from agentmem.contracts import Policy, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import FLOAT, Eviction

_EPSILON = 1e-12


class Distinctive(Eviction):
    """Keeps the slots whose keys point furthest away from the mean direction."""

    def scratch(self, shape: SegmentShape) -> int:
        """Return the bytes that :meth:`score` allocates: the keys in float32 and a few numbers per slot."""
        casts = shape.slots * shape.key_dim * FLOAT if shape.itemsize < FLOAT else 0
        return casts + (3 * shape.slots + 2 * shape.key_dim) * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return, for each slot, one minus the cosine between its key and the anchor (the mean direction), in 0 … 2."""
        keys = segment.heads[index].keys.float()
        inverse: torch.Tensor = keys.norm(dim=-1).clamp_(min=_EPSILON).reciprocal_()
        anchor = inverse @ keys  # the sum of the normalised keys, which has the direction of their mean
        anchor /= anchor.norm().clamp_(min=_EPSILON)
        return (keys @ anchor).mul_(inverse).neg_().add_(1).clamp_(min=0)


def keydiff(*, budgets: str = "uniform") -> Policy:
    """Keep the slots whose keys are least like the mean key.

    Raises:
        ValueError: an option's value is unknown or out of range.

    """
    return Policy(
        name="keydiff",
        summary="slots whose keys are least like the mean key",
        source="KeyDiff, arXiv:2504.15364",
        compactor=Distinctive(),
        budgets=by_name(budgets),
    )
