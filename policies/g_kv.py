"""G-KV: slots chosen as by R-KV, with attention scores that are carried from one compaction to the next.

Source: "G-KV: Decoding-Time KV Cache Eviction with Global Attention", arXiv:2512.00504. By equation 3, a slot's *global
score* is the larger of two numbers: α times its previous global score, and the attention that it gets now from the
newest tokens (the window), scaled to a maximum of 1 in every head. A slot's *redundancy* is the similarity of its key
to other keys (see :mod:`agentmem.policies.solvers.redundancy`).

The other details follow the paper's code. A window token's attention to a slot is the largest weight over the query
heads of the KV head; these weights are averaged over the window and not pooled. The redundancy, too, is scaled to a
maximum of 1.

The paper compresses every 128 tokens, so it applies α once per 128 tokens; here α is applied once each time the memory
fills. The memory carries the global scores, without the redundancy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agentmem.contracts import HeadCompaction, Policy, Queries, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import FLOAT, Observation, check_share, check_window, largest_of_group
from agentmem.policies.r_kv import check_redundancy
from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.redundancy import redundancy, redundancy_bytes
from agentmem.policies.solvers.selection import top


@dataclass(frozen=True)
class GlobalScore(Observation):
    """Keeps the slots with the largest ``λ * global score + (1 - λ) * (1 - redundancy)``; λ is ``mix``.

    A slot's *global score* is the larger of two numbers: ``decay`` times the slot's previous global score, and the
    attention that the slot gets now, scaled to a maximum of 1 in every head. A slot's *redundancy* is the similarity of
    the slot's key to other keys of the head. The redundancy, too, is scaled to a maximum of 1.
    """

    scores = "carried"

    decay: float = 0.8
    """α, the factor by which one compaction multiplies a slot's previous global score."""
    mix: float = 0.5
    """λ, the weight of the global score; the redundancy has the weight 1 - λ."""
    threshold: float = 0.5
    """Two keys whose cosine is larger than this are similar."""
    spared: int = 1
    """How many keys are spared for each key i: the newest of the keys similar to key i. The redundancy of a spared key
    does not include its similarity to key i."""

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is unknown or out of range."""
        check_share("decay", self.decay)
        check_redundancy(self.mix, self.threshold, self.spared)

    def scratch(self, shape: SegmentShape) -> int:
        """Return the bytes of one scoring: of the attention or of the redundancy, whichever takes more.

        While attention is computed, two blocks of weights exist: the maximum over the query heads so far, and the
        weights of one query head.
        """
        repeated = redundancy_bytes(shape.slots, shape.key_dim, self.block_bytes)
        return self.attention_bytes(shape, copies=2, then=repeated) + 2 * shape.slots * FLOAT

    def workspace(self, shape: SegmentShape) -> int:
        """Return the bytes of an eviction's workspace plus those of global scores.

        A global score is a number per slot that the memory carries from one compaction to the next. The workspace has
        room for the global scores of all slots of one head, and of the kept slots of all heads.
        """
        return super().workspace(shape) + (shape.slots + shape.heads * shape.budget) * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return each slot's ``λ * global score + (1 - λ) * (1 - redundancy)``, in 0 … 1; λ is ``mix``.

        The global score is high if the slot gets much attention now or got it at earlier compactions. The redundancy
        is high if the slot's key resembles other keys of the head. :class:`GlobalScore` defines both.
        """
        attention = self.attention(segment, index)
        return self._mixed(attention, self._carried(segment, index, attention))

    def keep(self, segment: Segment, index: int, count: int) -> HeadCompaction:
        """Keep the ``count`` slots of KV head ``index`` with the highest scores; return them and their global scores.

        A slot's score is ``λ * global score + (1 - λ) * (1 - redundancy)``; λ is ``mix``. The global score is high if
        the slot gets much attention now or got it at earlier compactions. The redundancy is high if the slot's key
        resembles other keys of the head. The memory carries the returned global scores to the next compaction.
        """
        head = segment.heads[index]
        if not head.slots:
            return super().keep(segment, index, count)
        attention = self.attention(segment, index)
        carried = self._carried(segment, index, attention)
        if count == 0 or count >= head.slots:
            kept = torch.arange(count, device=head.bias.device)
        else:
            kept = top(self._mixed(attention, carried), count)
        return HeadCompaction(kept, scores=carried[kept])

    def _carried(self, segment: Segment, index: int, attention: LocalAttention) -> torch.Tensor:
        """Return the new global score of each slot, as ``[T]``, in 0 … 1.

        A slot's new global score is the larger of two numbers: ``decay`` times the slot's previous global score, and
        the attention that the slot gets now, scaled to a maximum of 1. The previous global score is the one that the
        last compaction returned. It is 0 for a slot that has been through no compaction.
        """
        before = segment.heads[index].scores
        if before is None:
            raise ValueError("this segment has no score column; G-KV needs a memory that carries scores")
        now = torch.zeros_like(before)
        for weight, weights in largest_of_group(attention, segment.weights, lambda block: attention.weights(block)[0]):
            now.add_(weights.sum(dim=0), alpha=weight)
            del weights  # before the next block is made
        return torch.maximum(now.div_(now.max()), before * self.decay)

    def _mixed(self, attention: LocalAttention, carried: torch.Tensor) -> torch.Tensor:
        repeated = redundancy(
            attention.keys, threshold=self.threshold, spared=self.spared, block_bytes=self.block_bytes
        )
        fresh = repeated.div_(repeated.max()).neg_().add_(1)
        return fresh.mul_(1 - self.mix).add_(carried, alpha=self.mix)


def g_kv(
    *,
    window: int = 16,
    decay: float = GlobalScore.decay,
    mix: float = GlobalScore.mix,
    threshold: float = GlobalScore.threshold,
    spared: int = GlobalScore.spared,
    budgets: str = "uniform",
) -> Policy:
    """Keep slots that get much attention now or got it at earlier compactions, except those with redundant keys.

    A key is redundant if it resembles other keys. ``window`` is the number of newest tokens whose attention counts.
    ``decay`` is the factor by which one compaction multiplies the scores of earlier compactions (the paper's α). The
    other options are fields of :class:`GlobalScore`, and ``budgets`` names the head budgets.

    Raises:
        ValueError: an option's value is unknown or out of range.

    """
    check_window(window)
    return Policy(
        name="g-kv",
        summary="attended slots with scores carried from before, less those whose keys repeat others",
        source="G-KV, arXiv:2512.00504",
        compactor=GlobalScore(decay=decay, mix=mix, threshold=threshold, spared=spared),
        budgets=by_name(budgets),
        queries=Queries.of("live", tokens=window),
    )
