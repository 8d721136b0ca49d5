"""Pyramid budgets: slots decrease linearly from the first layer to the last; heads of a layer get equally many.

Source: PyramidKV, arXiv:2406.02069, section 4 (its β is ``steepness`` here). PyramidInfer, arXiv:2405.12532, also gives
higher layers fewer slots.
"""

from __future__ import annotations

from agentmem.contracts import BudgetRequest, Budgets
from agentmem.policies.budgets.water_filling import allocate, proportional


class Pyramid(Budgets):
    """Gives heads numbers of slots that fall linearly from the first layer to the last.

    Heads of the first layer get ``2 - 1 / steepness`` times the mean number of slots per head. Heads of the last layer
    get ``1 / steepness`` times this mean. With a steepness of 1, all heads get equally many slots. As the steepness
    grows, heads of the first layer tend to twice the mean number of slots, and heads of the last layer to none.
    """

    def __init__(self, steepness: float = 2.0) -> None:
        if not 1 <= steepness < float("inf"):
            raise ValueError(f"steepness: {steepness!r} is below 1, which turns the pyramid over; give 1 or more")
        self.steepness = steepness
        self.head_ceiling = self.layer_ceiling = 2 - 1 / steepness

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Allocate slots in proportion to shares that fall linearly from the first layer to the last."""
        last, rise = max(1, len(request.held) - 1), 1 - 1 / self.steepness
        shares = [1 + rise * (1 - 2 * layer / last) for layer in range(len(request.held))]
        return allocate(
            request, [[proportional(s)] * len(layer) for s, layer in zip(shares, request.held, strict=True)]
        )
