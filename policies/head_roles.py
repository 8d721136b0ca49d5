"""Head roles: heads that differ from the others of their layer keep all their slots; other heads keep attended slots.

Source: "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads", arXiv:2501.15113,
section IV.

As in the paper, the ``vector_slots`` most attended slots of a head define its *semantic vector*, the sum of their
values weighted by attention (equations 12 to 15, with a window of 32 tokens). The *heterogeneous* heads of a layer are
those whose vectors are farthest from the layer's mean vector, and also the one head whose vector is nearest to it: the
paper takes both ends. These heads keep all slots. The other heads keep sinks, recent tokens and the *middle
activations*: the slots with the most attention, mean-pooled over 7 slots.

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

    *Heterogeneous* heads are chosen by their semantic vectors; see the module's docstring and :func:`heterogeneous`.
    :meth:`survey` scores each of their slots above all slots of the other heads, so that budgets that compare scores
    let heterogeneous heads keep all slots.
    """

    share: float = 0.25
    """Fraction of a layer's heads that are heterogeneous; a layer of three or more heads has at least one of them."""
    vector_slots: int = 256
    """Number of slots that a head's semantic vector is computed from."""
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

        These bytes hold the attention, the pooled scores, the ranking, the ranked slots' values and the semantic
        vectors of the layer.
        """
        value = shape.itemsize + (FLOAT if shape.itemsize < FLOAT else 0)
        values = min(self.vector_slots, shape.slots) * (shape.value_dim * value + 3 * FLOAT)
        pooled_and_vectors = (shape.slots + 4 * shape.heads * shape.value_dim) * FLOAT
        return self.attention_bytes(shape, then=max(shape.slots * RANKING, values)) + pooled_and_vectors

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return each slot's mean attention weight from the window, averaged over neighbouring slots, in 0 … 1."""
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

    A layer of one or two heads has no heterogeneous heads, because two vectors are equally far from their mean. In
    other layers, ``share`` is the fraction of heads that are heterogeneous; their number is rounded, and is at least 1.
    If only one head is heterogeneous, it is the head whose vector is farthest from the mean vector. If there are
    several, one is the head nearest to the mean vector, and the others are the heads farthest from it.
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

    Heterogeneous heads are those whose semantic vectors are farthest from their layer's mean vector, and the one
    nearest to it; see :func:`heterogeneous`. The other options are fields of :class:`HeadRoles`, and ``budgets`` names
    the head budgets.

    Raises:
        ValueError: an option's value is unknown or out of range, or ``budgets`` ignore scores, so that roles would have
            no effect.

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
