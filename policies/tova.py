"""TOVA: the slots that the newest token attends to.

Source: "Transformers are Multi-State RNNs", arXiv:2401.06104, section 4 (Token Omission Via Attention).

The paper drops one token a step by that step's own query; here slots leave in one go when the memory fills, all by the
query of the newest token, so what only the tokens before it attended to is lost. The paper averages over the query
heads of a layer, which then keep the same tokens (appendix A); here every KV head decides by the mean of its own group.
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
    """Keeps the slots with the largest mean attention weight; with ``tokens=1`` of live queries, of the last token."""

    def scratch(self, shape: SegmentShape) -> int:
        """Observing."""
        return self.attention_bytes(shape)

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """The mean attention weight."""
        return importance(self.attention(segment, index), "mean").scores


def tova(*, budgets: str = "uniform") -> Policy:
    """Keep what the newest token attends to.

    Raises:
        ValueError: an option's value cannot work.

    """
    return Policy(
        name="tova",
        summary="slots that the newest token attends to",
        source="TOVA, arXiv:2401.06104",
        compactor=LastQuery(),
        budgets=by_name(budgets),
        queries=Queries.of("live", tokens=1),
    )
