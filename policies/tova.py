"""TOVA: the slots that the newest token attends to.

Source: "Transformers are Multi-State RNNs", arXiv:2401.06104, section 4 (Token Omission Via Attention).

The paper drops one token per step, by the query of that step. Here many slots are dropped at once when the memory
fills, all by the query of the newest token; slots that only earlier tokens attended to are therefore lost. The paper
averages over all query heads of a layer, so that all heads keep the same tokens (appendix A). Here every KV head
chooses slots by the mean over its own query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agentmem.contracts import Policy, Queries, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import Observation
from agentmem.policies.solvers.selection import importance


@dataclass(frozen=True)
class LastQuery(Observation):
    """Keeps the slots with the largest mean attention weight over the reference queries.

    In the policy :func:`tova` the only reference queries are those of the newest token.
    """

    def scratch(self, shape: SegmentShape) -> int:
        """Return the bytes of the attention of the reference queries."""
        return self.attention_bytes(shape)

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return each slot's mean attention weight over the reference queries."""
        return importance(self.attention(segment, index), "mean").scores


def tova(*, budgets: str = "uniform") -> Policy:
    """Keep the slots that the newest token attends to.

    Raises:
        ValueError: an option's value is unknown or out of range.

    """
    return Policy(
        name="tova",
        summary="slots that the newest token attends to",
        source="TOVA, arXiv:2401.06104",
        compactor=LastQuery(),
        budgets=by_name(budgets),
        queries=Queries.of("live", tokens=1),
    )
