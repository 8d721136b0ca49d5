"""R-KV: attended slots, less those whose keys repeat others.

Source: "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", arXiv:2505.24133, sections 3.2 (importance),
3.3 (redundancy) and 3.4 (λ times the one less 1 - λ times the other); its code for what the text leaves open: a pool
of 7 slots, a similarity threshold of 0.5, one similar slot spared.

The paper compresses every 128 tokens; here slots leave in one go when the memory fills. Scores are shifted by a
constant of the head, so that none is negative; the order is the paper's.
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
    """Keeps the slots with the largest λ importance + (1 - λ) (largest redundancy - redundancy)."""

    mix: float = 0.1
    """λ."""
    kernel: int = 7
    """Neighbouring slots over which a query's weights are max-pooled, the slot itself included."""
    threshold: float = 0.5
    """Keys with a larger cosine are similar."""
    spared: int = 1
    """Of the slots similar to any one, so many of the newest are not blamed for it."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        check_pooling(self.kernel)
        check_redundancy(self.mix, self.threshold, self.spared)

    def scratch(self, shape: SegmentShape) -> int:
        """Observing with two blocks of weights (the group's, and one head's or the pooled), then redundancy."""
        repeated = redundancy_bytes(shape.slots, shape.key_dim, self.block_bytes)
        return self.attention_bytes(shape, copies=2, then=repeated) + 2 * shape.slots * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Equation 7 plus (1 - λ) times the largest redundancy."""
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
    """Over the last dimension, in place."""
    logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    return logits.div_(logits.sum(dim=-1, keepdim=True))


def check_redundancy(mix: float, threshold: float, spared: int) -> None:
    """Refuse settings that cannot work.

    Raises:
        ValueError: ``mix`` is no share, ``threshold`` no positive cosine, or ``spared`` negative.

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
    """Keep what the newest ``window`` tokens attend to, less what repeats other slots; ``mix`` is λ.

    Raises:
        ValueError: an option's value cannot work.

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
