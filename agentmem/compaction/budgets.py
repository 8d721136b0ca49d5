"""Allocate the budgets of one compaction: survey the layers if needed, call the policy's budgets, check the result.

To *survey* a layer is to score its slots or to measure error curves of its heads, before any layer is compacted.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from agentmem.compaction.held_out import error_curves, split_references
from agentmem.contracts import BudgetRequest, Survey
from agentmem.errors import PolicyContractBroken

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from agentmem.compaction.references import References
    from agentmem.contracts import Budgets, Compactor, Reference, Segment
    from agentmem.memory.jobs import Job, Slots
    from agentmem.memory.ledger import Ledger
    from agentmem.planning.pricing import Plan

FLOOR = 1
"""The fewest segment slots that a budget should leave to a head."""


class BudgetAllocator:
    """Allocate a number of slots to every KV head of one compaction, before any layer is compacted."""

    def __init__(
        self,
        job: Job,
        held: dict[int, tuple[int, ...]],
        ledger: Ledger,
        segment: Callable[[int, tuple[Reference, ...]], Segment],
    ) -> None:
        """Prepare the allocation; allocate nothing yet.

        ``held`` maps each layer to be compacted to the number of slots in each head's segment. ``segment`` is
        a function that returns the segment of a layer with the given reference queries.
        """
        self.job, self.held, self.ledger, self.segment = job, held, ledger, segment

    def allocate(
        self, references: References, stage: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> tuple[tuple[int, ...], ...]:
        """Return how many segment slots each head may keep, one tuple per layer (empty for a sliding layer).

        Some policies need a survey first. To survey a layer is to score its slots or to measure error curves of its
        heads. The survey of all layers runs in the context manager that ``stage()`` returns, so that the caller can
        measure the time of this stage.

        Raises:
            PolicyContractBroken: the policy's budgets violate the invariants of their contract.

        """
        with self.ledger.borrow(self.job.plan.survey_bytes, "scores of all layers"):
            surveys: tuple[Survey, ...] = ()
            if self._budgets.needs_survey or self._budgets.needs_curves:
                with stage():
                    surveys = self._surveys(references)
            request = self._request(surveys)
            allocated = self._budgets.allocate(request)
        check_budgets(self.job.policy.name, self._budgets, request, allocated)
        return self._by_layer(allocated)

    def equal(self) -> Slots:
        """Return equal budgets for all heads, in the form of :meth:`allocate`; used if the policy's budgets failed."""
        return self._by_layer(equal_shares(self._request(())))

    def _request(self, surveys: tuple[Survey, ...]) -> BudgetRequest:
        return make_request(self.job.plan, tuple(self.held.values()), self.job.each, self.job.most, surveys)

    def _by_layer(self, budgets: Slots) -> Slots:
        allocated = dict(zip(self.held, budgets, strict=True))
        return tuple(tuple(allocated.get(index, ())) for index in range(len(self.job.begins)))

    def _surveys(self, references: References) -> tuple[Survey, ...]:
        surveys: dict[int, Survey] = {}

        def visit(layer: int, found: tuple[Reference, ...]) -> None:
            with self.ledger.borrow(self.job.plan.fitting_bytes, "survey"):
                surveys[layer] = self._survey(layer, found)

        references.each(list(self.held), visit)
        return tuple(surveys[index] for index in sorted(surveys))

    def _survey(self, layer: int, references: Sequence[Reference]) -> Survey:
        """Survey one layer: compute scores, error curves or both, as the policy's budgets need.

        Scores are computed from all reference queries. For the curves, some of the queries are held out: the compactor
        gets the other queries, and errors are measured on the held-out queries.
        """
        survey = Survey(layer)
        if self._budgets.needs_survey:
            survey = self._compactor.survey(self.segment(layer, tuple(references)))
        if self._budgets.needs_curves:
            held, fitted = split_references(tuple(references))
            most = self.job.plan.most_budget if self.job.whole else min(self.job.plan.most_budget, self.job.most)
            curves = error_curves(self._compactor, self.segment(layer, fitted), held, most)
            survey = replace(survey, curves=curves)
        return survey

    @property
    def _compactor(self) -> Compactor:
        assert self.job.policy.compactor is not None  # noqa: S101  # policies that never compact make no job
        return self.job.policy.compactor

    @property
    def _budgets(self) -> Budgets:
        assert self.job.policy.budgets is not None  # noqa: S101  # comes with the compactor, by Policy.__post_init__
        return self.job.policy.budgets


# ---- the request to the budgets, and the checks of their result


def make_request(plan: Plan, held: Slots, each: int, most: int, surveys: tuple[Survey, ...]) -> BudgetRequest:
    """Make the request for :meth:`agentmem.contracts.Budgets.allocate`.

    ``held`` has the number of slots in each head's segment, by layer. ``each`` is the average number of slots per head
    to allocate, and ``most`` the largest average that adaptive budgets may allocate.
    """
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
    """Return equal budgets for all heads; if a head has fewer slots than its share, the other heads get the rest."""
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
    """Check that the slots in ``allocated`` satisfy the invariants of :class:`agentmem.contracts.Budgets`.

    Raises:
        PolicyContractBroken: an invariant is violated; the message names the policy, the invariant and the value.

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
    """Return the largest sum of budgets that a request allows.

    A head's budget may exceed neither its held slots nor ``ceiling``. The budgets of a layer may not exceed
    ``layer_ceiling`` together.
    """
    return sum(min(request.layer_ceiling, sum(min(held, request.ceiling) for held in heads)) for heads in request.held)
