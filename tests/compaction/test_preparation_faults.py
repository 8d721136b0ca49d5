"""Faults before the first layer of a compaction: in budgets, in a survey, in a probe's text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agentmem.compaction.budgets import equal_shares
from agentmem.contracts import BudgetRequest, Budgets, Policy, Queries
from agentmem.errors import CompactionFailed, PolicyContractBroken
from agentmem.memory.ledger import Ledger
from support import tiny


class Stumbling(Budgets):
    """Equal budgets that raise the next of ``errors`` first."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Raise, or allocate equally."""
        if self.errors:
            raise self.errors.pop(0)
        return equal_shares(request)


def stumbling(*errors: Exception) -> Policy:
    """AM halving whose budgets raise these errors one after another."""
    return replace(tiny.KINDS["replay"], name="stumbling", budgets=Stumbling(list(errors)))


def test_one_fault_is_tried_again_and_noted() -> None:
    """After one fault the compaction is what it would have been, and the report says what happened."""
    prompt = tiny.ids(60)
    with tiny.capped_by(stumbling(RuntimeError("once"))) as memory, tiny.capped_by(stumbling()) as steady:
        assert torch.equal(tiny.feed(memory, prompt), tiny.feed(steady, prompt))
        assert memory.compactions[0].faults == ("before the first layer: RuntimeError: once (tried again)",)
        assert [layer.outcome for layer in memory.compactions[0].layers] == ["compacted", "compacted"]


def test_two_faults_evict_to_equal_budgets() -> None:
    """With ``on_failure="evict"`` the newest slots stay, equally many in every head, and the memory goes on."""
    with tiny.capped_by(stumbling(RuntimeError("one"), ValueError("two"))) as memory:
        tiny.feed(memory, tiny.ids(60))
        report = memory.compactions[0]
        assert [layer.outcome for layer in report.layers] == ["evicted", "evicted"]
        assert report.slots_after == memory.plan.target * 4
        assert report.faults[-1].endswith("ValueError: two (evicted to budget)")
        assert len(tiny.greedy(memory, 5, 10)) == 10


def test_two_faults_raise_where_that_is_asked_for_and_can_be_tried_again() -> None:
    """The memory stays readable, nothing is compacted, and the next forward compacts."""
    policy = stumbling(RuntimeError("one"), RuntimeError("two"))
    with tiny.capped_by(policy, on_failure="raise") as memory:
        tiny.feed(memory, tiny.ids(tiny.SLOTS))
        held = memory.usage().total_slots
        with pytest.raises(CompactionFailed, match=r"failed 2 times before the first layer.*two"):
            tiny.feed(memory, tiny.ids(1))
        assert memory.usage().total_slots == held
        tiny.feed(memory, tiny.ids(1))
        assert [layer.outcome for layer in memory.compactions[0].layers] == ["compacted", "compacted"]


def test_a_broken_contract_is_never_repaired() -> None:
    """Budgets that break their contract name the policy at once."""
    with (
        tiny.capped_by(stumbling(PolicyContractBroken("policy 'stumbling': budgets"))) as memory,
        pytest.raises(PolicyContractBroken, match="stumbling"),
    ):
        tiny.feed(memory, tiny.ids(60))


def test_a_pattern_that_cannot_be_read_is_a_fault_of_the_text() -> None:
    """A tokenizer that fails while a pattern is looked for costs quality, not the memory."""
    policy = replace(tiny.KINDS["replay"], queries=replace(Queries.of("replay"), pattern="a"))
    with tiny.capped_by(policy) as memory:
        tiny.feed(memory, tiny.ids(60))  # the stub of a tokenizer has no batch_decode
        assert all("AttributeError" in fault for fault in memory.compactions[0].faults)
        assert [layer.outcome for layer in memory.compactions[0].layers] == ["evicted", "evicted"]


@pytest.mark.parametrize("total", range(0, 60, 7))
def test_equal_shares_differ_by_at_most_one_where_heads_hold_enough(total: int) -> None:
    """The sum is exact, nobody gets more than it holds, and what one lacks goes to the others."""
    request = BudgetRequest(((20, 3), (20, 20)), total, 1)
    allocated = equal_shares(request)
    assert sum(map(sum, allocated)) == total
    roomy = [allocated[0][0], *allocated[1]]
    assert max(roomy) - min(roomy) <= 1
    assert allocated[0][1] == min(3, total // 4)


class Weighing(Budgets):
    """Equal budgets that read surveys, and what the ledger counts while they do."""

    needs_survey = True

    def __init__(self, seen: list[tuple[int, int]]) -> None:
        self.seen = seen
        self.ledger: Ledger | None = None

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Note the bytes of all scores and the bytes borrowed."""
        assert self.ledger is not None
        scores = sum(score.numel() * 4 for survey in request.surveys for score in survey.scores)
        self.seen.append((scores, self.ledger.transient))
        return equal_shares(request)


def test_scores_of_all_layers_are_counted_while_budgets_compare_them() -> None:
    """In a deep model they outweigh the store that a commit moves: the plan has room for them, the ledger counts."""
    model = tiny.llama(60)
    budgets = Weighing([])
    policy = replace(tiny.KINDS["replay"], name="weighing", budgets=budgets)
    with tiny.capped_by(policy, model) as memory:
        budgets.ledger = memory.memory.ledger
        tiny.feed(memory, tiny.ids(60), model=model)
        ((scores, counted),) = budgets.seen
        plan = memory.plan
        assert scores > plan.move_bytes
        assert scores <= counted
        assert plan.workspace_bytes >= plan.draw_bytes + plan.fitting_bytes + scores
