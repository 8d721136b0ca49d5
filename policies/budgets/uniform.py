"""Uniform budgets: equal slots for every head of every layer."""

from __future__ import annotations

from agentmem.contracts import BudgetRequest, Budgets
from agentmem.policies.budgets.water_filling import allocate, proportional


class Uniform(Budgets):
    """Allocates equal slots; a head that holds less keeps all, and what it leaves is shared by the others.

    Invariants, besides those of :class:`Budgets`: two heads that keep less than they may differ by at most one slot; no
    head that keeps all has more than a head that does not, plus one. ``request.floor`` needs no care: no allocation of the
    same total has a larger least share.
    """

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """The emptiest head first, one slot at a time."""
        return allocate(request, [[proportional(1.0)] * len(layer) for layer in request.held])
