"""R-KV: slots that the newest tokens attend to, except those whose keys resemble other keys.

Source: "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", arXiv:2505.24133. A slot's score is
``λ * importance - (1 - λ) * redundancy`` (section 3.4), where λ is the option ``mix``. The importance is the attention
from the newest tokens (section 3.2). The redundancy is the similarity of the slot's key to other keys (section 3.3).
Three defaults come from the paper's code. Attention is max-pooled over 7 slots. Two keys are similar if their cosine is
above 0.5. For each key i, the newest of all keys similar to key i is spared: the redundancy of this newest key does not
include its similarity to key i.

The paper compresses every 128 tokens; here many slots are dropped at once when the memory fills. The scores of a head
are shifted by a constant, so that none is negative; the order of slots is that of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agentmem.contracts import Policy, Queries, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import (
    FLOAT,
    Observation,
    check_pooling,
    check_share,
    check_window,
    largest_of_group,
    pooled,
)
from agentmem.policies.solvers.redundancy import redundancy, redundancy_bytes


@dataclass(frozen=True)
class NonRedundant(Observation):
    """Keeps the slots with the largest ``λ * importance + (1 - λ) * (largest redundancy - redundancy)``.

    λ is ``mix``. A slot's importance is the attention that the slot gets from the newest tokens. A slot's redundancy is
    the similarity of the slot's key to other keys of the head. The largest redundancy is the maximum over the slots of
    the head.
    """

    mix: float = 0.1
    """λ, the weight of the importance; the redundancy has the weight 1 - λ."""
    kernel: int = 7
    """Number of neighbouring slots over which a query's weights are max-pooled, the slot itself included."""
    threshold: float = 0.5
    """Two keys whose cosine is larger than this are similar."""
    spared: int = 1
    """How many keys are spared for each key i: the newest of the keys similar to key i. The redundancy of a spared key
    does not include its similarity to key i."""

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is unknown or out of range."""
        check_pooling(self.kernel)
        check_redundancy(self.mix, self.threshold, self.spared)

    def scratch(self, shape: SegmentShape) -> int:
        """Return the bytes of one scoring: of the attention or of the redundancy, whichever takes more.

        While attention is computed, two blocks exist. One holds the maximum over the query heads. The other holds first
        the logits of one query head, later the pooled weights.
        """
        repeated = redundancy_bytes(shape.slots, shape.key_dim, self.block_bytes)
        return self.attention_bytes(shape, copies=2, then=repeated) + 2 * shape.slots * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return each slot's ``λ * importance - (1 - λ) * redundancy`` (the paper's equation 7), plus a constant.

        λ is ``mix``; :class:`NonRedundant` tells what importance and redundancy are. The constant is ``1 - λ`` times
        the head's largest redundancy, so that no score is negative.
        """
        attention = self.attention(segment, index)
        scores, seen = attention.bias.new_zeros(len(attention.keys)), 0.0
        for weight, logits in largest_of_group(attention, segment.weights, attention.logits):
            scores.add_(pooled(_softmax_(logits), self.kernel, "max").sum(dim=0), alpha=weight)
            seen += weight * len(logits)
            del logits  # before the next block is made
        repeated = redundancy(
            attention.keys, threshold=self.threshold, spared=self.spared, block_bytes=self.block_bytes
        )
        return scores.mul_(self.mix / seen).add_(repeated.max() - repeated, alpha=1 - self.mix)


def _softmax_(logits: torch.Tensor) -> torch.Tensor:
    """Compute the softmax over the last dimension, in place."""
    logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    return logits.div_(logits.sum(dim=-1, keepdim=True))


def check_redundancy(mix: float, threshold: float, spared: int) -> None:
    """Check three settings that R-KV and G-KV have in common.

    Raises:
        ValueError: ``mix`` (the weight of importance against redundancy) is not in 0 … 1; ``threshold`` (the cosine
            above which two keys are alike) is not above 0 and up to 1; or ``spared`` (for each key, the number of
            newest alike keys whose redundancy does not count) is negative.

    """
    check_share("mix", mix)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: {threshold!r} is not a positive cosine; give one above 0 and up to 1")
    if spared < 0:
        raise ValueError(f"spared: {spared!r} is negative; give 0 or more")


def r_kv(
    *,
    window: int = 8,
    mix: float = NonRedundant.mix,
    kernel: int = NonRedundant.kernel,
    threshold: float = NonRedundant.threshold,
    spared: int = NonRedundant.spared,
    budgets: str = "uniform",
) -> Policy:
    """Keep slots that the newest ``window`` tokens attend to, except those whose keys resemble other keys.

    A slot's importance is the attention that the slot gets from these tokens. A slot's redundancy is the similarity of
    the slot's key to other keys. ``mix`` is λ, the weight of the importance; the redundancy has the weight ``1 - mix``.
    The other options are fields of :class:`NonRedundant`, and ``budgets`` names the head budgets.

    Raises:
        ValueError: an option's value is unknown or out of range.

    """
    check_window(window)
    return Policy(
        name="r-kv",
        summary="attended slots, less those whose keys repeat others",
        source="R-KV, arXiv:2505.24133",
        compactor=NonRedundant(mix=mix, kernel=kernel, threshold=threshold, spared=spared),
        budgets=by_name(budgets),
        queries=Queries.of("live", tokens=window),
    )
