"""Budgets of one compaction: what a policy's :class:`Budgets` is asked, and the invariants that its answer must keep."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from agentmem.contracts import BudgetRequest
from agentmem.errors import PolicyContractBroken

if TYPE_CHECKING:
    from agentmem.contracts import Budgets, Survey
    from agentmem.planning.pricing import Plan

FLOOR = 1
"""The least slots of a head's segment."""

Slots = tuple[tuple[int, ...], ...]


def make_request(plan: Plan, held: Slots, each: int, most: int, surveys: tuple[Survey, ...]) -> BudgetRequest:
    """What to allocate to layers whose heads' segments hold ``held`` slots: ``each`` on average, up to ``most``."""
    heads = sum(map(len, held))
    widest = max(map(len, held), default=0)
    return BudgetRequest(
        held=held,
        total=each * heads,
        floor=FLOOR,
        surveys=surveys,
        ceiling=max(FLOOR, plan.most_budget),
        layer_ceiling=max(FLOOR * widest, math.ceil(plan.layer_ceiling * widest * most)),
        limit=most * heads,
    )


def equal_shares(request: BudgetRequest) -> Slots:
    """Equal slots for every head, for when a policy's own budgets cannot be had; what one lacks goes to the others."""
    heads = [
        (min(held, request.ceiling), at, head) for at, row in enumerate(request.held) for head, held in enumerate(row)
    ]
    shares = [[0] * len(row) for row in request.held]
    left = min(request.total, most_slots(request))
    for allocated, (most, layer, head) in enumerate(sorted(heads)):
        shares[layer][head] = min(most, left // (len(heads) - allocated))
        left -= shares[layer][head]
    return tuple(map(tuple, shares))


def check_budgets(policy: str, budgets: Budgets, request: BudgetRequest, allocated: Slots) -> None:
    """Refuse what breaks the invariants of :class:`agentmem.contracts.Budgets`.

    Raises:
        PolicyContractBroken: names the policy, the invariant and the value.

    """
    if [len(layer) for layer in allocated] != [len(layer) for layer in request.held]:
        raise PolicyContractBroken(f"policy {policy!r}: budgets {allocated!r} have not the shape of {request.held!r}")
    pairs = [pair for held, kept in zip(request.held, allocated, strict=True) for pair in zip(held, kept, strict=True)]
    if any(not 0 <= kept <= held for held, kept in pairs):
        raise PolicyContractBroken(
            f"policy {policy!r}: a head's budget lies outside 0..held: {allocated!r} of {request.held!r}"
        )
    if any(kept > request.ceiling for _, kept in pairs):
        raise PolicyContractBroken(
            f"policy {policy!r}: a head's budget exceeds the ceiling {request.ceiling}: {allocated!r}"
        )
    if any(sum(kept) > request.layer_ceiling for kept in allocated):
        raise PolicyContractBroken(
            f"policy {policy!r}: a layer's budgets exceed its ceiling {request.layer_ceiling} together: {allocated!r}"
        )
    _check_sum(policy, budgets, request, sum(kept for _, kept in pairs))


def _check_sum(policy: str, budgets: Budgets, request: BudgetRequest, given: int) -> None:
    if budgets.adaptive:
        if given > min(request.limit, most_slots(request)):
            raise PolicyContractBroken(
                f"policy {policy!r}: budgets sum to {given} slots, above the limit of {request.limit}"
            )
        return
    wanted = min(request.total, most_slots(request))
    if given != wanted:
        raise PolicyContractBroken(f"policy {policy!r}: budgets sum to {given} slots instead of {wanted}")


def most_slots(request: BudgetRequest) -> int:
    """The largest sum that held slots and ceilings allow."""
    return sum(min(request.layer_ceiling, sum(min(held, request.ceiling) for held in heads)) for heads in request.held)
