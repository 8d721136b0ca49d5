"""Uniform budgets: equally many slots for every head of every layer."""

from __future__ import annotations

from agentmem.contracts import BudgetRequest, Budgets
from agentmem.policies.budgets.water_filling import allocate, proportional


class Uniform(Budgets):
    """Allocates equally many slots; a head that holds fewer keeps them all, and the other heads share the rest.

    Invariants, besides those of :class:`Budgets`, as long as no layer reaches its ceiling: two heads that both lose
    slots get numbers of slots that differ by at most one; a head that keeps all its slots gets at most one slot more
    than a head that loses some.

    ``request.floor`` is the fewest slots that each head should get. Equal numbers meet the floor whenever the total and
    the ceilings allow it.
    """

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Allocate slots one at a time, always to the head with the fewest slots among those that can take one."""
        return allocate(request, [[proportional(1.0)] * len(layer) for layer in request.held])
