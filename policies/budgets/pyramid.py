"""Pyramid budgets: an arithmetic decrease from the first layer to the last, equal heads within a layer.

Source: PyramidKV, arXiv:2406.02069, section 4 (its β is ``steepness`` here); the idea also in PyramidInfer,
arXiv:2405.12532.
"""

from __future__ import annotations

from agentmem.contracts import BudgetRequest, Budgets
from agentmem.policies.budgets.water_filling import allocate, proportional


class Pyramid(Budgets):
    """The last layer's heads get ``1 / steepness`` equal shares, the first layer's ``2 - 1 / steepness``.

    A steepness of 1 is uniform; as it grows, the first layer tends to two equal shares and the last to none.
    """

    def __init__(self, steepness: float = 2.0) -> None:
        if not 1 <= steepness < float("inf"):
            raise ValueError(f"steepness: {steepness!r} is below 1, which turns the pyramid over; give 1 or more")
        self.steepness = steepness
        self.head_ceiling = self.layer_ceiling = 2 - 1 / steepness

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """In proportion to a line over the layers."""
        last, rise = max(1, len(request.held) - 1), 1 - 1 / self.steepness
        shares = [1 + rise * (1 - 2 * layer / last) for layer in range(len(request.held))]
        return allocate(
            request, [[proportional(s)] * len(layer) for s, layer in zip(shares, request.held, strict=True)]
        )
