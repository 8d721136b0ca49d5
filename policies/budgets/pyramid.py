"""Pyramid budgets: slots decrease linearly from the first layer to the last; heads of a layer get equally many.

Source: PyramidKV, arXiv:2406.02069, section 4 (``steepness`` is the paper's β). PyramidInfer, arXiv:2405.12532, has the
same idea.
"""

from __future__ import annotations

from agentmem.contracts import BudgetRequest, Budgets
from agentmem.policies.budgets.water_filling import allocate, proportional


class Pyramid(Budgets):
    """Gives the last layer's heads ``1 / steepness`` equal shares, and the first layer's ``2 - 1 / steepness``.

    A steepness of 1 makes uniform budgets. As the steepness grows, the first layer tends to two equal shares and the
    last layer to none.
    """

    def __init__(self, steepness: float = 2.0) -> None:
        if not 1 <= steepness < float("inf"):
            raise ValueError(f"steepness: {steepness!r} is below 1, which turns the pyramid over; give 1 or more")
        self.steepness = steepness
        self.head_ceiling = self.layer_ceiling = 2 - 1 / steepness

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Allocate slots in proportion to shares that fall linearly with the layer's index."""
        last, rise = max(1, len(request.held) - 1), 1 - 1 / self.steepness
        shares = [1 + rise * (1 - 2 * layer / last) for layer in range(len(request.held))]
        return allocate(
            request, [[proportional(s)] * len(layer) for s, layer in zip(shares, request.held, strict=True)]
        )
