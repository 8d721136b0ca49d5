"""Random subset: every head keeps slots by lot, for itself. What no policy may fall below.

Source: "Random Attention: Rethinking KV Cache Eviction for Efficient Reasoning", arXiv:2609.03430: the prompt stays,
and of the rest each head keeps slots uniformly at random. Here what always stays is the memory's ``keep_first``, and
slots leave in one go when the memory fills.
"""

from __future__ import annotations

import torch

from agentmem.contracts import Policy, Segment, SegmentShape
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.eviction import FLOAT, Eviction
from agentmem.policies.solvers.lots import lots


class ByLot(Eviction):
    """Keeps a uniformly random subset.

    A head's lots follow from the generator's seed, the layer and the head's newest key, never from the order of the
    heads: heads draw independently, permuting them permutes the result, and a survey sees the lots that count.
    """

    def scratch(self, shape: SegmentShape) -> int:
        """The lots, and the newest key in float64."""
        return shape.slots * FLOAT + shape.key_dim * 2 * FLOAT

    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Uniform in 0 … 1."""
        return lots(segment.heads[index].keys, hash((segment.generator.initial_seed(), segment.layer)))


def random_subset(*, budgets: str = "uniform") -> Policy:
    """Keep slots by lot.

    Raises:
        ValueError: an option's value cannot work.

    """
    return Policy(
        name="random-subset",
        summary="a random subset of every head's slots",
        source="arXiv:2609.03430",
        compactor=ByLot(),
        budgets=by_name(budgets),
    )
