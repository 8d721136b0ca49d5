"""Head roles: heads unlike the others of their layer keep all slots they can, other heads keep their attended slots.

Source: "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads", arXiv:2501.15113,
section IV.

As in the paper, a head's semantic vector is the attention-weighted sum of the values of its ``vector_slots`` most
attended slots (equations 12 to 15, with a window of 32). The heads farthest from the layer's mean vector are
heterogeneous, and so is the head nearest to the mean vector. Heterogeneous heads keep everything. The other heads keep
sinks, recent tokens and the *middle activations*: the slots with the most attention, mean-pooled over 7 slots.

Unlike the paper, budgets are allocated over all layers together. A heterogeneous head therefore keeps all its slots
only as far as the budgets allow (``global`` allows up to four equal shares), its most attended slots first. A KV head
counts as one head, with the mean weights of its query heads. The share of heterogeneous heads is equal in every layer;
equation 16 lets it fall with depth. The memory itself keeps sinks and recent tokens (``keep_first``,
``keep_recent``). Roles are computed anew each time the memory fills.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agentmem.contracts import Policy, Queries, Segment, SegmentShape, Survey
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import (
    FLOAT,
    RANKING,
    Observation,
    check_pooling,
    check_share,
    check_window,
    pooled,
)
from agentmem.policies.solvers.selection import importance, top


@dataclass(frozen=True)
class HeadRoles(Observation):
    """Keeps the most attended slots; its survey scores slots of heterogeneous heads above those of all other heads."""

    share: float = 0.25
    """Fraction of a layer's heads that are heterogeneous; a layer of three or more heads has at least one of them."""
    vector_slots: int = 256
    """Number of slots that a head's semantic vector is computed from."""
    kernel: int = 7
    """Number of neighbouring slots over which attention is averaged, the slot itself included."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        check_share("share", self.share)
        check_pooling(self.kernel)
        if self.vector_slots < 1:
            raise ValueError(f"vector_slots: {self.vector_slots!r} make no semantic vector; give at least 1")

    def scratch(self, shape: SegmentShape) -> int:
        """Count the bytes of attention, of pooled scores, and of a survey's ranking, values and semantic vectors."""
        value = shape.itemsize + (FLOAT if shape.itemsize < FLOAT else 0)
        values = min(self.vector_slots, shape.slots) * (shape.value_dim * value + 3 * FLOAT)
        pooled_and_vectors = (shape.slots + 4 * shape.heads * shape.value_dim) * FLOAT
        return self.attention_bytes(shape, then=max(shape.slots * RANKING, values)) + pooled_and_vectors

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return the window's mean attention weight of each slot, mean-pooled over neighbours, in 0 … 1."""
        return self._pooled(self._votes(segment, index))

    def survey(self, segment: Segment) -> Survey:
        """Return the scores of all slots; those of heterogeneous heads are raised by 1."""
        scores, vectors = [], []
        for index, head in enumerate(segment.heads):
            if not head.slots:
                scores.append(head.bias.clone())
                vectors.append(head.bias.new_zeros(head.values.shape[1]))
                continue
            votes = self._votes(segment, index)
            chosen = top(votes, min(self.vector_slots, head.slots))
            vectors.append(votes[chosen] @ head.values[chosen].float())
            scores.append(self._pooled(votes))
        for index in heterogeneous(torch.stack(vectors), self.share):
            scores[index] += 1
        return Survey(segment.layer, tuple(scores))

    def _votes(self, segment: Segment, index: int) -> torch.Tensor:
        return importance(self.attention(segment, index), "mean").scores

    def _pooled(self, votes: torch.Tensor) -> torch.Tensor:
        return pooled(votes, self.kernel, "mean")


def heterogeneous(vectors: torch.Tensor, share: float) -> list[int]:
    """Return the indices of a layer's heterogeneous heads, given the semantic vectors ``[heads, dv]`` of all heads.

    These are the heads farthest from the mean vector and, if there is to be more than one, the nearest head. A layer of
    one or two heads has none, because two vectors are equally far from their mean.
    """
    heads = len(vectors)
    if heads <= 2:  # noqa: PLR2004  # a pair has no odd one out
        return []
    farthest = (vectors - vectors.mean(dim=0)).norm(dim=-1).argsort(descending=True, stable=True).tolist()
    count = max(1, round(share * heads))
    return farthest[:1] if count == 1 else [*farthest[: count - 1], farthest[-1]]


def head_roles(
    *,
    window: int = 32,
    share: float = HeadRoles.share,
    vector_slots: int = HeadRoles.vector_slots,
    kernel: int = HeadRoles.kernel,
    budgets: str = "global",
) -> Policy:
    """Keep all slots of heterogeneous heads; other heads keep slots that the newest ``window`` tokens attend to.

    Raises:
        ValueError: an option's value cannot work, or ``budgets`` ignore scores, so that roles would have no effect.

    """
    check_window(window)
    allocated = by_name(budgets)
    if not allocated.needs_survey:
        raise ValueError(f"budgets: {budgets!r} do not look at scores, so heads would have no role; use 'global'")
    return Policy(
        name="head-roles",
        summary="all slots of heads unlike the others of their layer, attended slots of the rest",
        source="Task-KV, arXiv:2501.15113",
        compactor=HeadRoles(share=share, vector_slots=vector_slots, kernel=kernel),
        budgets=allocated,
        queries=Queries.of("live", tokens=window),
    )
