"""SnapKV: the slots that the newest tokens attend to, and the neighbours of these slots.

Source: "SnapKV: LLM Knows What You Are Looking for Before Generation", arXiv:2404.14469. Slots are scored by the
attention of an observation window, the newest tokens (section 4.1). The scores are max-pooled over neighbouring slots
(sections 4.3 and 5.2). The window has 32 tokens, and 7 slots are pooled (section 5.3).

The paper compresses a prompt once; here the memory is compressed each time it fills, with the newest tokens of that
moment as the window. The paper keeps a set of slots for every query head; here the query heads of a KV head share one
set, chosen by their mean attention weights.

The default options are the paper's. While decoding with the default model, ``snapkv[window=96,kernel=1]``, which pools
nothing, was better on both texts that were measured (docs/measurements.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agentmem.contracts import Policy, Queries, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import FLOAT, Observation, Pool, check_pooling, check_window, pooled
from agentmem.policies.solvers.selection import importance


@dataclass(frozen=True)
class PooledVotes(Observation):
    """Keeps the slots with the largest mean attention weight from the window, pooled over neighbouring slots."""

    kernel: int = 7
    """Number of neighbouring slots that are pooled, the slot itself included."""
    pool: Pool = "max"
    """Statistic of the attention weights of these slots: their maximum ("max") or mean ("mean")."""

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is unknown or out of range."""
        check_pooling(self.kernel, self.pool)

    def scratch(self, shape: SegmentShape) -> int:
        """Return the bytes of the attention of the reference queries and of the pooled scores."""
        return self.attention_bytes(shape) + shape.slots * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return each slot's mean attention weight from the window, pooled over its neighbours."""
        return pooled(importance(self.attention(segment, index), "mean").scores, self.kernel, self.pool)


def snapkv(
    *, window: int = 32, kernel: int = PooledVotes.kernel, pool: Pool = PooledVotes.pool, budgets: str = "uniform"
) -> Policy:
    """Keep slots that the newest ``window`` tokens attend to, and their neighbours.

    Each slot's attention weight is replaced by the maximum or mean (``pool``) of ``kernel`` neighbouring slots.
    ``budgets`` names the head budgets.

    Raises:
        ValueError: an option's value is unknown or out of range.

    """
    check_window(window)
    return Policy(
        name="snapkv",
        summary="slots that the newest tokens attend to, with their neighbours",
        source="SnapKV, arXiv:2404.14469",
        compactor=PooledVotes(kernel=kernel, pool=pool),
        budgets=by_name(budgets),
        queries=Queries.of("live", tokens=window),
    )
