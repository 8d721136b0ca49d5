"""Head roles: some heads of each layer keep all their slots; the other heads keep the slots that get most attention.

Source: "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads", arXiv:2501.15113,
section IV.

As in the paper, every head has a *semantic vector*: the sum of the values of its ``vector_slots`` most attended slots,
weighted by attention (equations 12 to 15, with a window of 32 tokens). The *mean vector* of a layer is the mean of the
semantic vectors of its heads. The *heterogeneous* heads of a layer keep all slots. They are of two kinds: the heads
whose semantic vectors are farthest from the mean vector, and the one head whose semantic vector is nearest to the mean
vector.

The other heads keep sinks, recent tokens and *middle activations*. This is the paper's name for the slots that get most
attention, where attention is mean-pooled over 7 neighbouring slots.

Unlike in the paper, budgets are allocated over all layers together. A heterogeneous head may therefore get fewer slots
than it holds: the budgets ``global`` give a head at most four times the mean number of slots per head. The head then
keeps its most attended slots. A KV head counts as one head, with the mean weights of its query heads. The fraction of
heterogeneous heads is equal in every layer; in the paper's equation 16 it falls with depth. The memory itself keeps
sinks and recent tokens (``keep_first``, ``keep_recent``). The heterogeneous heads are chosen anew each time the memory
fills.
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
    """Keeps each head's most attended slots.

    Some heads of each layer, the *heterogeneous* heads, should keep all their slots; :func:`heterogeneous` chooses
    these heads. :meth:`survey` scores each slot of a heterogeneous head above all slots of the other heads. Budgets
    that compare scores therefore let heterogeneous heads keep all slots that the budgets' ceilings allow.
    """

    reads_values = True

    share: float = 0.25
    """Fraction of a layer's heads that are heterogeneous; a layer of three or more heads has at least one such head."""
    vector_slots: int = 256
    """Number of most attended slots of a head whose values make up the head's semantic vector."""
    kernel: int = 7
    """Number of neighbouring slots over which attention is averaged, the slot itself included."""

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is unknown or out of range."""
        check_share("share", self.share)
        check_pooling(self.kernel)
        if self.vector_slots < 1:
            raise ValueError(f"vector_slots: {self.vector_slots!r} make no semantic vector; give at least 1")

    def scratch(self, shape: SegmentShape) -> int:
        """Return the bytes that :meth:`survey` allocates for one head; :meth:`score` alone allocates fewer.

        These bytes hold the head's attention, pooled scores, ranking and the values of the most attended slots. They
        also hold one vector for every head of the layer: the head's semantic vector, the sum of the values of its most
        attended slots, weighted by attention.
        """
        value = shape.itemsize + (FLOAT if shape.itemsize < FLOAT else 0)
        values = min(self.vector_slots, shape.slots) * (shape.value_dim * value + 3 * FLOAT)
        pooled_and_vectors = (shape.slots + 4 * shape.heads * shape.value_dim) * FLOAT
        return self.attention_bytes(shape, then=max(shape.slots * RANKING, values)) + pooled_and_vectors

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return each slot's mean attention weight from the window, averaged over neighbouring slots, in 0 … 1."""
        return self._pooled(self._votes(segment, index))

    def survey(self, segment: Segment) -> Survey:
        """Return the scores of all slots; the scores of all slots of heterogeneous heads are raised by 1.

        Heterogeneous heads are the heads of the layer that should keep all slots; :func:`heterogeneous` chooses them.
        Scores lie in 0 … 1 before they are raised. Every slot of a heterogeneous head therefore scores at least as high
        as any slot of another head.
        """
        scores, vectors = [], []
        for index, head in enumerate(segment.heads):
            if not head.slots:
                scores.append(head.bias.clone())
                vectors.append(head.bias.new_zeros(head.value_dim))
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
    """Return the indices of a layer's heterogeneous heads, the heads that should keep all slots.

    ``vectors [heads, dv]`` are the semantic vectors of all heads. A head's semantic vector is the sum of the values of
    the head's most attended slots, weighted by attention. The distance of a head is the distance of its semantic vector
    from the mean of all these vectors.

    A layer of one or two heads has no heterogeneous heads, because two vectors are equally far from their mean. In
    other layers, the number of heterogeneous heads is ``share * heads``, rounded, and at least 1. If this number is 1,
    the head with the largest distance is chosen. If this number is n > 1, two kinds of heads are chosen: the n - 1
    heads with the largest distances, and the one head with the smallest distance.
    """
    heads = len(vectors)
    if heads <= 2:  # noqa: PLR2004  # two vectors are equally far from their mean
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

    A head's semantic vector is the sum of the values of the head's most attended slots, weighted by attention. The
    heterogeneous heads of a layer are of two kinds: the heads whose semantic vectors are farthest from the mean of the
    layer's semantic vectors, and the one head whose semantic vector is nearest to this mean. :func:`heterogeneous`
    tells how many heads are chosen. The other options are fields of :class:`HeadRoles`, and ``budgets`` names the head
    budgets.

    Raises:
        ValueError: an option's value is unknown or out of range; also if the budgets ignore scores, because then
            heterogeneous heads would get no more slots than other heads.

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
