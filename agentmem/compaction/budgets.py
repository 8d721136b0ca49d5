"""The budgets of one compaction: survey where they compare heads, ask, check."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from agentmem.compaction.budget_rules import check_budgets, equal_shares, make_request
from agentmem.compaction.held_out import error_curves, split_references
from agentmem.contracts import Survey

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from agentmem.compaction.budget_rules import Slots
    from agentmem.compaction.references import References
    from agentmem.compaction.request import Job
    from agentmem.contracts import BudgetRequest, Budgets, Compactor, Reference, Segment
    from agentmem.memory.ledger import Ledger


class BudgetAllocator:
    """Allocates integer slots to every layer and head of one job, for the whole compaction at once."""

    def __init__(
        self,
        job: Job,
        held: dict[int, tuple[int, ...]],
        ledger: Ledger,
        segment: Callable[[int, tuple[Reference, ...]], Segment],
    ) -> None:
        """``held`` are the slots of every compactable layer's segments, ``segment`` makes one of them."""
        self.job, self.held, self.ledger, self.segment = job, held, ledger, segment

    def allocate(
        self, references: References, stage: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> tuple[tuple[int, ...], ...]:
        """Segment slots per layer and head, indexed like the model's layers (sliding ones are empty).

        ``stage`` is entered around the survey, for the clock.

        Raises:
            PolicyContractBroken: the policy's budgets break their invariants.

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
        """Equal shares, for when the policy's own budgets cannot be had."""
        return self._by_layer(equal_shares(self._request(())))

    def _request(self, surveys: tuple[Survey, ...]) -> BudgetRequest:
        return make_request(self.job.plan, tuple(self.held.values()), self.job.each, self.job.most, surveys)

    def _by_layer(self, budgets: Slots) -> Slots:
        allocated = dict(zip(self.held, budgets, strict=True))
        return tuple(tuple(allocated.get(index, ())) for index in range(len(self.job.begins)))

    def _surveys(self, references: References) -> tuple[Survey, ...]:
        surveys: dict[int, Survey] = {}

        def visit(layer: int, found: tuple[Reference, ...]) -> None:
            plan = self.job.plan
            with self.ledger.borrow(plan.fit_bytes + plan.check_bytes, "survey"):
                surveys[layer] = self._survey(layer, found)

        references.each(list(self.held), visit)
        return tuple(surveys[index] for index in sorted(surveys))

    def _survey(self, layer: int, references: Sequence[Reference]) -> Survey:
        """Scores by all queries; curves by the errors on those that their fits have not seen."""
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
