"""Uniform budgets: equal slots for every head of every layer."""

from __future__ import annotations

from agentmem.contracts import BudgetRequest, Budgets
from agentmem.policies.budgets.water_filling import allocate, proportional


class Uniform(Budgets):
    """Allocates equal slots; a head that holds fewer slots keeps them all, and the other heads share the surplus.

    Invariants, besides those of :class:`Budgets`: the slots of two heads that could both keep more differ by at most
    one; a head that keeps all its slots has at most one slot more than a head that does not. ``request.floor`` needs no
    special treatment, because no allocation of an equal total gives the smallest head more slots.
    """

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Allocate slots one at a time, always to the head with the fewest."""
        return allocate(request, [[proportional(1.0)] * len(layer) for layer in request.held])
