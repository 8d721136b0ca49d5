"""Uniform budgets: equal slots for every head of every layer."""

from __future__ import annotations

from agentmem.contracts import BudgetRequest, Budgets


class Uniform(Budgets):
    """Deals equal slots; a head that holds less keeps all, and what it leaves is shared by the others.

    Laws, besides those of :class:`Budgets`: two heads that keep less than they hold differ by at most one slot; no
    head that keeps all has more than a head that does not, plus one. ``request.floor`` needs no care: no deal of the
    same total has a larger least share.
    """

    def deal(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Water-filling: the emptiest head first; each takes what it holds, at most an equal share of what is left."""
        heads = [(held, layer, head) for layer, row in enumerate(request.held) for head, held in enumerate(row)]
        shares = [[0] * len(row) for row in request.held]
        left = min(request.total, sum(held for held, _, _ in heads))
        for dealt, (held, layer, head) in enumerate(sorted(heads)):
            share = min(held, left // (len(heads) - dealt))
            shares[layer][head] = share
            left -= share
        return tuple(tuple(row) for row in shares)
