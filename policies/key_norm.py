"""Key norm: the slots with the shortest keys.

Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv:2406.11430, section 3:
slots whose keys have a low norm tend to be attended to. No query is needed.

The paper does not compress the first two layers (section 4); here every layer is compacted. Norms differ from head to
head, so scores are relative to the head's mean norm. The order of slots within a head is that of the paper.
"""

from __future__ import annotations

import torch

from agentmem.contracts import Policy, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import FLOAT, Eviction

_EPSILON = 1e-12


class ShortestKeys(Eviction):
    """Keeps the slots with the shortest keys."""

    def scratch(self, shape: SegmentShape) -> int:
        """Return the bytes that :meth:`score` allocates: the keys in float32 and their norms."""
        casts = shape.slots * shape.key_dim * FLOAT if shape.itemsize < FLOAT else 0
        return casts + 2 * shape.slots * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return, for each slot, the mean length of the head's keys divided by the length of the slot's key."""
        norms: torch.Tensor = segment.heads[index].keys.float().norm(dim=-1)
        return norms.mean() / norms.clamp_(min=_EPSILON)


def key_norm(*, budgets: str = "uniform") -> Policy:
    """Keep the slots with the shortest keys.

    Raises:
        ValueError: an option's value is unknown or out of range.

    """
    return Policy(
        name="key-norm",
        summary="slots with the shortest keys",
        source="arXiv:2406.11430",
        compactor=ShortestKeys(),
        budgets=by_name(budgets),
    )
