"""SnapKV: the slots that the newest tokens attend to, and the neighbours of these slots.

Source: "SnapKV: LLM Knows What You Are Looking for Before Generation", arXiv:2404.14469, section 4.1 (votes of an
observation window), 4.3 and 5.2 (max pooling over neighbours), 5.3 (a window of 32, a kernel of 7).

The paper compresses a prompt once; here the memory is compressed each time it fills, with the newest tokens of that
moment as the window. The paper keeps a set of slots for every query head; here the query heads of a KV head share one
set, chosen by their mean vote.
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
    """Keeps the slots with the most attention from the window, on average, pooled over their neighbours."""

    kernel: int = 7
    """Number of neighbouring slots that are pooled, the slot itself included."""
    pool: Pool = "max"
    """Kind of pooling over these neighbours."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        check_pooling(self.kernel, self.pool)

    def scratch(self, shape: SegmentShape) -> int:
        """Count the bytes of the reference queries' attention and of the pooled scores."""
        return self.attention_bytes(shape) + shape.slots * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return each slot's mean attention weight from the window, pooled over its neighbours."""
        return pooled(importance(self.attention(segment, index), "mean").scores, self.kernel, self.pool)


def snapkv(
    *, window: int = 32, kernel: int = PooledVotes.kernel, pool: Pool = PooledVotes.pool, budgets: str = "uniform"
) -> Policy:
    """Keep slots that the newest ``window`` tokens attend to, by weights ``pool``-ed over ``kernel`` neighbours.

    Raises:
        ValueError: an option's value cannot work.

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
