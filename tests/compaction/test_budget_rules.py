"""Budgets of one compaction: what is asked, and that every invariant of the answer is checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem import plugins
from agentmem.compaction.budget_rules import Slots, check_budgets, make_request, most_slots
from agentmem.contracts import BudgetRequest, Budgets, Survey
from agentmem.errors import PolicyContractBroken
from agentmem.planning.capacity import make_plan
from agentmem.planning.model_shape import LayerShape, ModelShape
from agentmem.planning.pricing import Plan
from agentmem.settings import Settings

LLAMA = ModelShape("small", (LayerShape(2, 4, 16, 16),) * 3, 4, hidden=64, intermediate=96, vocabulary=128)
PLAN = replace(
    make_plan(LLAMA, Settings.of(cap=1 << 30, max_slots=300), plugins.policy("window")),
    capacity=300,
    target=150,
    limit=262,
    most_budget=95,
    layer_ceiling=1.5,
)


@dataclass(frozen=True)
class Told(Budgets):
    """Budgets that are only asked whether they are adaptive."""

    adaptive: bool = False

    def allocate(self, request: BudgetRequest) -> Slots:
        """Nobody asks."""
        raise NotImplementedError


def plan(**changes: float) -> Plan:
    """A plan of 150 slots per head after a compaction, 262 at most; a head 95 of the segment, a layer 1.5 shares."""
    return replace(PLAN, **changes)


# ---- the request


def test_a_request_counts_the_segment_alone() -> None:
    """Prefix and recent are in no number; the total is the target's share of every head."""
    request = make_request(plan(), ((188, 88), (8, 0), (188, 188)), 38, 150, ())

    assert request.held == ((188, 88), (8, 0), (188, 188))
    assert request.total == 6 * (150 - 112)
    assert request.floor == 1
    assert request.ceiling == 95
    assert request.layer_ceiling == 450 == int(1.5 * 2 * (262 - 112))
    assert request.limit == 6 * (262 - 112)
    assert request.surveys == ()


@pytest.mark.parametrize(("heads", "ceiling"), [((2, 2), 38 * 2), ((1, 4, 2), 38 * 4)])
def test_a_layer_s_ceiling_is_in_shares_of_the_widest_layer(heads: tuple[int, ...], ceiling: int) -> None:
    """Layers with fewer heads may get as much together."""
    held = tuple((188,) * count for count in heads)
    request = make_request(plan(layer_ceiling=1.0), held, 38, 38, ())

    assert request.layer_ceiling == ceiling
    assert request.total == 38 * sum(heads)


def test_a_request_never_asks_for_less_than_the_floor() -> None:
    """Where nothing is left besides prefix and recent, ceilings still allow a slot for every head."""
    request = make_request(plan(most_budget=0), ((188, 188),), 0, 0, ())

    assert (request.total, request.limit) == (0, 0)
    assert (request.ceiling, request.layer_ceiling) == (1, 2)


def test_surveys_are_handed_on() -> None:
    """In order, as the survey pass made them."""
    surveys = (Survey(0, ()), Survey(2, ()))

    assert make_request(plan(), ((188,),), 38, 150, surveys).surveys is surveys


# ---- the invariants


REQUEST = BudgetRequest(held=((30, 10), (20, 5)), total=30, floor=1, ceiling=15, layer_ceiling=22, limit=36)
GOOD: Slots = ((12, 6), (8, 4))


def test_a_good_deal_passes() -> None:
    """Nothing is raised."""
    check_budgets("mine", Told(), REQUEST, GOOD)


@pytest.mark.parametrize(
    ("allocated", "message"),
    [
        (((12, 6),), r"budgets \(\(12, 6\),\) have not the shape of \(\(30, 10\), \(20, 5\)\)"),
        (((12, 6), (12,)), "have not the shape of"),
        (((12, 6), (8, 3, 1)), "have not the shape of"),
        (((12, 11), (5, 2)), "a head's budget lies outside 0..held"),
        (((13, 10), (8, -1)), "a head's budget lies outside 0..held"),
        (((16, 4), (8, 2)), "a head's budget exceeds the ceiling 15"),
        (((15, 8), (5, 2)), "a layer's budgets exceed its ceiling 22 together"),
        (((12, 6), (8, 5)), "budgets sum to 31 slots instead of 30"),
        (((12, 6), (8, 3)), "budgets sum to 29 slots instead of 30"),
    ],
)
def test_every_broken_law_is_refused_by_name(allocated: Slots, message: str) -> None:
    """One invariant at a time: shape, bounds, the head's ceiling, the layer's ceiling, the sum."""
    with pytest.raises(PolicyContractBroken, match=f"policy 'mine': .*{message}"):
        check_budgets("mine", Told(), REQUEST, allocated)


def test_adaptive_budgets_may_deal_anything_up_to_the_limit() -> None:
    """Less than the total and more; not more than the limit, and every other invariant is theirs too."""
    for allocated in (((0, 0), (0, 0)), GOOD, ((15, 7), (10, 4))):
        check_budgets("mine", Told(adaptive=True), REQUEST, allocated)
    with pytest.raises(PolicyContractBroken, match="budgets sum to 37 slots, above the limit of 36"):
        check_budgets("mine", Told(adaptive=True), REQUEST, ((15, 7), (11, 4)))
    with pytest.raises(PolicyContractBroken, match="exceeds the ceiling 15"):
        check_budgets("mine", Told(adaptive=True), REQUEST, ((0, 0), (16, 0)))
    with pytest.raises(PolicyContractBroken, match="instead of 30"):
        check_budgets("mine", Told(), REQUEST, ((15, 7), (10, 4)))


def test_where_the_total_is_out_of_reach_the_most_is_dealt() -> None:
    """Held slots and ceilings bound the sum: exactly what they allow, and no less."""
    request = replace(REQUEST, total=1000)
    assert most_slots(request) == 22 + 20

    check_budgets("mine", Told(), request, ((15, 7), (15, 5)))
    with pytest.raises(PolicyContractBroken, match="sum to 41 slots instead of 42"):
        check_budgets("mine", Told(), request, ((15, 7), (14, 5)))


HELD = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=2).map(tuple)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(held=HELD, ceiling=st.integers(1, 9), layer_ceiling=st.integers(1, 20))
def test_the_most_is_the_largest_sum_that_any_deal_reaches(held: Slots, ceiling: int, layer_ceiling: int) -> None:
    """It is what trying every allocate of each layer finds."""
    most = 0
    for heads in held:
        sums = {0}
        for slots in heads:
            sums = {before + more for before in sums for more in range(min(slots, ceiling) + 1)}
        most += max(total for total in sums if total <= layer_ceiling)

    assert most_slots(BudgetRequest(held, 0, 1, (), ceiling, layer_ceiling)) == most
