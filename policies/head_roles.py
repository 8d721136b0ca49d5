"""Head roles: heads that differ from the others of their layer keep all they can, the others what is attended to.

Source: "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads", arXiv:2501.15113,
section IV. Followed: a head's semantic vector is the attention-weighted sum of the values of its ``vector_slots`` most
attended slots (equations 12 to 15, a window of 32); heads far from the layer's mean vector are heterogeneous, and the
head next to it joins them; heterogeneous heads keep everything, the others sinks, recent tokens and the *middle
activations*, the slots with the most attention, mean-pooled over 7.

Different: budgets are allocated over all layers, not to each alone, so heterogeneous heads get all they hold as far as
budgets go (``global``: up to four equal shares), first the most attended of their slots. A KV head is one head, with
the mean weights of its query heads. The share of heterogeneous heads is the same in every layer, where equation 16
lets it fall with depth. Sinks and recent tokens are the memory's. Roles are found anew each time the memory fills.
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
    """Keeps the most attended slots; surveys those of heterogeneous heads above all others."""

    share: float = 0.25
    """Of a layer's heads, how many are heterogeneous; at least one of three or more."""
    vector_slots: int = 256
    """Slots that make up a head's semantic vector."""
    kernel: int = 7
    """Neighbouring slots over which attention is averaged, the slot itself included."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        check_share("share", self.share)
        check_pooling(self.kernel)
        if self.vector_slots < 1:
            raise ValueError(f"vector_slots: {self.vector_slots!r} make no semantic vector; give at least 1")

    def scratch(self, shape: SegmentShape) -> int:
        """Observing, the pooled scores, and what a survey takes besides: a ranking, values, all heads' vectors."""
        value = shape.itemsize + (FLOAT if shape.itemsize < FLOAT else 0)
        values = min(self.vector_slots, shape.slots) * (shape.value_dim * value + 3 * FLOAT)
        pooled_and_vectors = (shape.slots + 4 * shape.heads * shape.value_dim) * FLOAT
        return self.attention_bytes(shape, then=max(shape.slots * RANKING, values)) + pooled_and_vectors

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """The window's mean attention weights, mean-pooled: 0 … 1."""
        return self._pooled(self._votes(segment, index))

    def survey(self, segment: Segment) -> Survey:
        """The scores, and 1 more for every slot of a heterogeneous head."""
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
    """Which heads of a layer are heterogeneous, by their semantic vectors ``[heads, dv]``.

    The farthest from the mean vector and, if there is to be more than one, the nearest. None of one or two heads: two
    are equally far from their mean.
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
    """Keep all of heterogeneous heads, and of the others what the newest ``window`` tokens attend to.

    Raises:
        ValueError: an option's value cannot work; ``budgets`` do not look at scores, so that roles would not count.

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
