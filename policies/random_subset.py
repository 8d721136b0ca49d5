"""Random subset: every head keeps random slots of its own; a baseline that every other policy should beat.

Source: "Random Attention: Rethinking KV Cache Eviction for Efficient Reasoning", arXiv:2609.03430. In the paper the
prompt stays, and each head keeps a uniformly random part of the other slots. Here the memory's ``keep_first`` is the
number of first tokens that always stay, and many slots are dropped at once when the memory fills.
"""

from __future__ import annotations

import torch

from agentmem.contracts import Policy, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import FLOAT, Eviction
from agentmem.policies.solvers.lots import lots


class ByLot(Eviction):
    """Keeps a uniformly random subset of each head's slots.

    A head's random numbers depend on the generator's seed, the layer and the head's newest key, never on the order of
    the heads. Heads therefore draw independently, and permuting the heads permutes the result. Drawing twice gives the
    same numbers: some budgets ask :meth:`survey` for scores before they allocate slots, and :meth:`compact` then
    chooses by these very scores.
    """

    def scratch(self, shape: SegmentShape) -> int:
        """Return the bytes that :meth:`score` allocates: the random numbers, and the newest key in float64."""
        return shape.slots * FLOAT + shape.key_dim * 2 * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return a random number for each slot, uniform in 0 … 1."""
        return lots(segment.heads[index].keys, hash((segment.generator.initial_seed(), segment.layer)))


def random_subset(*, budgets: str = "uniform") -> Policy:
    """Keep a random subset of each head's slots.

    Raises:
        ValueError: an option's value is unknown or out of range.

    """
    return Policy(
        name="random-subset",
        summary="a random subset of every head's slots",
        source="arXiv:2609.03430",
        compactor=ByLot(),
        budgets=by_name(budgets),
    )
