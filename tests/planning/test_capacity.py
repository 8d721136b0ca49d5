"""The plan: bytes become slots so that R + T ≤ cap, with the largest capacity, or the refusal says what would do."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentmem import plugins
from agentmem.contracts import (
    BudgetRequest,
    Budgets,
    Compaction,
    Compactor,
    Policy,
    ScoreColumn,
    Segment,
    SegmentShape,
)
from agentmem.errors import CapTooSmall, SettingsRefused
from agentmem.planning.capacity import make_plan
from agentmem.planning.model_shape import LayerShape, ModelShape
from agentmem.planning.pricing import UNBOUNDED, Plan, Planner, grown, window_slots
from agentmem.reference_queries.stored import NORMS, random_bytes
from agentmem.settings import Settings


@dataclass(frozen=True)
class Bounded(Budgets):
    """Budgets that promise these ceilings; a plan asks for no more."""

    head_ceiling: float = 1.0
    layer_ceiling: float = 1.0
    adaptive: bool = False

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """No plan allocates."""
        raise NotImplementedError


def unequal(head: float = 1.0, layer: float = 1.0, *, adaptive: bool = False, name: str = "am-halving") -> Policy:
    """That policy with budgets of these ceilings."""
    return replace(plugins.policy(name), budgets=Bounded(head, layer, adaptive))


BUILT_IN = ("am-halving", "full", "heavy-hitters", "window")
PLANNED = {name: plugins.policy(name) for name in BUILT_IN} | {
    "stored": plugins.policy("am-halving", probe="live+random+context:2", probe_tokens=48),
    "mixed": plugins.policy("am-halving", probe="live+spread+replay:3", probe_tokens=96),
    "heads": unequal(2.5),
    "layers": unequal(2.5, 1.5),
    "adaptive": unequal(3.0, 2.0, adaptive=True, name="window"),
}
POLICIES, NAMES = list(PLANNED.values()), list(PLANNED)
BY_NAME = st.sampled_from(POLICIES)
SHARED = plugins.policy("am-halving", probe="live+replay")
"""Stored queries that take a share of the cap."""

# How fast a machine is must not decide whether an invariant holds.
LAW = settings(deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow])

LLAMA = ModelShape("small", (LayerShape(2, 4, 16, 16),) * 3, 4, hidden=64, intermediate=96, vocabulary=128)
GEMMA = replace(LLAMA, layers=(LayerShape(2, 4, 16, 16, window=32), LayerShape(2, 4, 16, 16)))
SLIDING = replace(LLAMA, layers=(LayerShape(2, 4, 16, 16, window=32),))


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Small models: 1 to 4 layers alike, some of them sliding perhaps, of 16 or 32 bits."""
    heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dim = draw(st.sampled_from([8, 16, 64]))
    full = LayerShape(heads, heads * group, dim, draw(st.sampled_from([dim, 8])))
    sliding = replace(full, window=draw(st.integers(4, 64)))
    layers = (full, *draw(st.lists(st.sampled_from([full, sliding]), max_size=3)))
    return ModelShape("drawn", layers, draw(st.sampled_from([2, 4])), hidden=64, intermediate=96, vocabulary=128)


@st.composite
def wishes(draw: st.DrawFn) -> dict[str, Any]:
    """Settings without their cap."""
    first, recent = draw(st.integers(0, 16)), draw(st.integers(0, 64))
    pinned = first + recent + 1
    target = draw(st.one_of(st.floats(0.1, 0.9), st.integers(pinned, pinned + 100)))
    chunk, reclaim = draw(st.integers(1, 300)), draw(st.integers(1, 32))
    return {"keep_first": first, "keep_recent": recent, "target": target, "chunk": chunk, "min_reclaim": reclaim}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Attention's scratch is counted per thread; the figures here are those of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 1)
        yield


def test_attention_scratch_is_counted_for_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads take more scratch, so the same cap has room for fewer slots."""
    alone = make_plan(LLAMA, Settings.of(cap=8_000_000), plugins.policy("window"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 32)
    crowded = make_plan(LLAMA, Settings.of(cap=8_000_000), plugins.policy("window"))
    assert crowded.capacity < alone.capacity
    assert total(crowded) <= 8_000_000


def planned(shape: ModelShape, cap: int, policy: Policy, rows: int, wish: dict[str, Any]) -> Plan | None:
    """The plan, or ``None`` when the cap is too small."""
    try:
        return make_plan(shape, Settings.of(cap=cap, **wish), policy, rows)
    except CapTooSmall:
        return None


def total(plan: Plan) -> int:
    """R + T when everything is full."""
    return plan.resident_bytes + plan.workspace_bytes


CAPS = st.integers(1, 1 << 24)
ROWS = st.integers(1, 3)


@LAW
@given(shape=shapes(), cap=CAPS, policy=BY_NAME, rows=ROWS, wish=wishes())
def test_a_plan_stays_under_the_cap_with_the_largest_capacity(
    shape: ModelShape, cap: int, policy: Policy, rows: int, wish: dict[str, Any]
) -> None:
    """R + T ≤ cap; one more slot per head would cross it; a compaction leaves a budget and frees ``min_reclaim``."""
    plan = planned(shape, cap, policy, rows, wish)
    if plan is None:
        return
    assert total(plan) <= cap
    wider = Planner(shape, Settings.of(cap=cap, **wish), policy, rows).at(plan.capacity + 1)
    assert total(wider) > cap
    assert plan.prefix + plan.recent + 1 <= plan.target <= plan.limit <= plan.capacity - wish["min_reclaim"]
    assert plan.probe_tokens <= wish["chunk"]


@LAW
@given(shape=shapes(), cap=CAPS, more=st.integers(0, 1 << 20), policy=BY_NAME, rows=ROWS, wish=wishes())
def test_a_larger_cap_never_gives_less(
    shape: ModelShape, cap: int, more: int, policy: Policy, rows: int, wish: dict[str, Any]
) -> None:
    """Capacity is monotone in the cap (stored queries that take a share of the cap apart)."""
    small, large = planned(shape, cap, policy, rows, wish), planned(shape, cap + more, policy, rows, wish)
    if small is not None:
        assert large is not None
        assert large.capacity >= small.capacity


@LAW
@given(shape=shapes(), cap=CAPS, policy=st.sampled_from([*POLICIES, SHARED]), rows=ROWS, wish=wishes())
def test_the_cap_that_a_refusal_names_is_enough_and_no_smaller_one_is(
    shape: ModelShape, cap: int, policy: Policy, rows: int, wish: dict[str, Any]
) -> None:
    """The needed bytes of the message plan well; one byte fewer is refused."""
    with pytest.raises(CapTooSmall) as refused:
        make_plan(shape, Settings.of(cap=1, **wish), policy, rows)
    needed = int(re.search(r"need (\d+) bytes", str(refused.value))[1])  # type: ignore[index]
    assert planned(shape, needed, policy, rows, wish) is not None
    assert planned(shape, needed - 1, policy, rows, wish) is None
    if cap >= needed:
        assert planned(shape, cap, policy, rows, wish) is not None


def test_a_refusal_says_what_was_asked_and_what_to_do() -> None:
    """Value, limit and remedy stand in one message."""
    said = r"a cap of 9\.8 KiB \(10000 bytes\).*prefix 16 \+ recent 96.*'window'.*raise cap"
    with pytest.raises(CapTooSmall, match=said):
        make_plan(LLAMA, Settings.of(cap=10_000), plugins.policy("window"))


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_rows_share_one_cap(policy: Policy) -> None:
    """Three rows have fewer slots each and no fewer together (T is there once), and their bytes stay under the cap."""
    one = make_plan(LLAMA, Settings.of(cap=2_000_000, chunk=64), policy)
    three = make_plan(LLAMA, Settings.of(cap=2_000_000, chunk=64), policy, rows=3)
    assert three.capacity < one.capacity < 3 * (three.capacity + 1)
    assert total(three) <= 2_000_000
    slot = 6 * LLAMA.slot_bytes(LLAMA.layers[0], scores=policy.scores != "none")
    assert three.resident_bytes == 3 * three.capacity * slot + three.stored_bytes


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_sliding_layers_cost_their_window_and_no_more(policy: Policy) -> None:
    """A sliding layer's slots do not grow with the cap; what it does not need goes to the full layers."""
    plan = make_plan(GEMMA, Settings.of(cap=2_000_000, chunk=16), policy)
    slot = GEMMA.slot_bytes(GEMMA.layers[0], scores=policy.scores != "none")
    assert plan.resident_bytes - plan.stored_bytes == 2 * slot * (window_slots(32, 16) + plan.capacity)
    both_full = replace(GEMMA, layers=(GEMMA.layers[1],) * 2)
    assert plan.capacity > make_plan(both_full, Settings.of(cap=2_000_000, chunk=16), policy).capacity


def test_a_model_that_only_slides_is_never_full() -> None:
    """Its windows are counted, its capacity is unbounded, and no policy is priced."""
    plan = make_plan(SLIDING, Settings.of(cap=200_000, chunk=16), plugins.policy("am-halving"))
    assert plan.capacity == UNBOUNDED
    assert plan.resident_bytes == 2 * window_slots(32, 16) * SLIDING.slot_bytes(SLIDING.layers[0], scores=False)
    assert total(plan) <= 200_000
    assert "never compacted" in plan.table()[1][2]
    with pytest.raises(CapTooSmall, match="sliding windows are held whole"):
        make_plan(SLIDING, Settings.of(cap=1000, chunk=16), plugins.policy("window"))


def test_a_target_is_a_fraction_slots_or_bytes() -> None:
    """0.25 is a quarter of the capacity; an int is slots; a text is bytes of all slots of all rows."""
    plan = lambda target: make_plan(LLAMA, Settings.of(cap=2_000_000, target=target), plugins.policy("window"), rows=2)  # noqa: E731
    assert plan(0.25).target == plan(0.25).capacity // 4
    assert plan(200).target == 200
    assert plan("400KB").target == 400_000 // (2 * 6 * LLAMA.slot_bytes(LLAMA.layers[0], scores=False))


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"target": 100}, r"target: 100 slots cannot hold keep_first=16 \+ keep_recent=96 \+ 1; give at least 113"),
        ({"target": 1.5}, r"target: 1\.5 is no fraction between 0 and 1"),
        ({"target": 0.0}, r"target: 0\.0 is no fraction between 0 and 1"),
        ({"target": "1KB"}, r"target: '1KB' leaves no room for keep_first"),
        ({"target": "half"}, "cannot read 'half'"),
        ({"max_slots": 150}, r"max_slots: 150 is below 226"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wish: dict[str, Any], message: str) -> None:
    """Whatever the cap, with field, value and limit."""
    with pytest.raises(SettingsRefused, match=message):
        make_plan(LLAMA, Settings.of(cap=10_000_000, **wish), plugins.policy("window"))


def test_max_slots_bounds_the_capacity() -> None:
    """Comparisons at equal slots: the cap has room for more, and they are not used."""
    plan = make_plan(LLAMA, Settings.of(cap=10_000_000, max_slots=300), plugins.policy("window"))
    assert plan.capacity == 300
    assert total(plan) < 10_000_000


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_the_table_adds_up(policy: Policy) -> None:
    """Its R + T row is the sum of the plan, and no part of T is larger than T."""
    plan = make_plan(GEMMA, Settings.of(cap=2_000_000, chunk=64), policy)
    rows = {name: count or 0 for name, count, _ in plan.table()}
    assert rows["R + T"] == rows["R: slots"] + rows["R: stored queries"] + plan.workspace_bytes <= rows["cap"]
    assert max(rows[name] for name in rows if name.startswith("T:")) <= plan.workspace_bytes


# ---- unequal budgets


ROOMY = Settings.of(cap=4_000_000, chunk=64)


def test_unequal_heads_take_workspace_and_not_slots() -> None:
    """A head of three shares is planned for: its fit, its move and its attention; slots cost what they cost."""
    equal, ragged = (make_plan(LLAMA, ROOMY, policy) for policy in (unequal(), unequal(3.0, 1.5)))
    same = Planner(LLAMA, ROOMY, unequal(3.0, 1.5), 1).at(equal.capacity)
    segment = equal.target - equal.prefix - equal.recent
    assert (equal.most_budget, equal.layer_ceiling) == (segment, 1.0)
    assert (same.most_budget, same.layer_ceiling) == (3 * segment, 1.5)
    assert same.resident_bytes == equal.resident_bytes
    assert same.fit_bytes > equal.fit_bytes
    assert same.check_bytes > equal.check_bytes
    assert same.move_bytes > equal.move_bytes
    assert same.forward_bytes >= equal.forward_bytes
    assert ragged.capacity < equal.capacity
    assert total(ragged) <= ROOMY.cap


@pytest.mark.parametrize("ceilings", [(2.0, 1.0), (2.0, 1.5), (1.25, 2.0), (4.0, 9.0)])
def test_a_layer_moves_with_what_its_heads_may_keep_together(ceilings: tuple[float, float]) -> None:
    """Its store is priced at the smaller of all heads at their ceiling and the layer at its own, headroom besides."""
    plan = make_plan(LLAMA, ROOMY, unequal(*ceilings))
    segment = plan.target - plan.prefix - plan.recent
    headroom = plan.prefix + plan.recent + plan.capacity - plan.target + 1
    slots = 2 * headroom + min(math.ceil(2 * ceilings[1] * segment), 2 * math.ceil(ceilings[0] * segment))
    assert plan.move_bytes == slots * LLAMA.slot_bytes(LLAMA.layers[0], scores=False)


def test_adaptive_budgets_may_leave_more_than_the_target_and_free_enough() -> None:
    """Their limit frees a quarter of the capacity, or ``min_reclaim`` if more, and is never below the target."""
    policy = unequal(2.0, adaptive=True, name="window")
    wish = {"cap": 4_000_000, "chunk": 64}
    plan = make_plan(LLAMA, Settings.of(**wish), policy)
    assert plan.limit == plan.capacity - plan.capacity // 4 > plan.target
    reclaim = make_plan(LLAMA, Settings.of(**wish, min_reclaim=900), policy)
    assert reclaim.limit == reclaim.capacity - 900
    high = make_plan(LLAMA, Settings.of(**wish, target=0.95, min_reclaim=1), policy)
    assert high.limit == high.target == int(0.95 * high.capacity)


# ---- scores and stored queries


class Scored(Compactor):
    """A compactor that wants a score column of that kind."""

    def __init__(self, scores: ScoreColumn) -> None:
        self.scores = scores

    def workspace(self, shape: SegmentShape) -> int:
        """Nothing."""
        return 0

    def compact(self, segment: Segment, slots: object) -> Compaction:
        """No plan compacts."""
        raise NotImplementedError


def test_a_score_column_costs_four_bytes_a_slot() -> None:
    """Received and carried alike; only received scores need the explicit path of attention."""
    plans = {
        kind: Planner(LLAMA, ROOMY, Policy("mine", "-", "-", Scored(kind), Bounded()), 1).at(200)
        for kind in get_args(ScoreColumn)
    }
    assert plans["none"].resident_bytes == 200 * 6 * (2 * 16 * 4 + 8)
    assert plans["carried"].resident_bytes == plans["received"].resident_bytes == 200 * 6 * (2 * 16 * 4 + 12)
    assert plans["carried"].forward_bytes == plans["none"].forward_bytes < plans["received"].forward_bytes


def test_every_part_gets_its_share_of_the_reference_tokens() -> None:
    """Probing parts together, each stored part, and what is drawn at random, of which only norms are kept."""
    policy = plugins.policy("am-halving", probe="replay:4+live:2+spread+random", probe_tokens=64)
    plan = make_plan(LLAMA, ROOMY, policy)
    query = 3 * 4 * 16 * 4
    assert (plan.probe_tokens, plan.stored, plan.drawn_tokens) == (40, (16, NORMS), 8)
    assert plan.stored_bytes == (16 + NORMS) * query
    assert plan.draw_bytes == random_bytes(LLAMA.layers[0], 8, 4)
    three = make_plan(LLAMA, ROOMY, policy, rows=3)
    assert (three.stored, three.stored_bytes) == (plan.stored, 3 * plan.stored_bytes)


def test_stored_queries_take_a_tenth_of_the_cap_at_most() -> None:
    """Without a count they are as many as a tenth of the cap has room for, 512 at most and 8 at least."""
    query = 3 * 4 * 16 * 4
    stored = [
        make_plan(LLAMA, Settings.of(cap=cap, chunk=64), plugins.policy("am-halving", probe="live")).stored[0]
        for cap in (1_200_000, 2_000_000, 8_000_000)
    ]
    assert stored[:2] == [1_200_000 // 10 // query, 2_000_000 // 10 // query]
    assert stored[2] == 512
    with pytest.raises(CapTooSmall) as refused:
        make_plan(LLAMA, Settings.of(cap=1, chunk=64), plugins.policy("am-halving", probe="live"))
    needed = int(re.search(r"need (\d+) bytes", str(refused.value))[1])  # type: ignore[index]
    assert make_plan(LLAMA, Settings.of(cap=needed, chunk=64), plugins.policy("am-halving", probe="live")).stored == (
        8,
    )


@pytest.mark.parametrize("probe", ["live", "context+replay", "random"])
def test_a_model_that_only_slides_stores_no_queries(probe: str) -> None:
    """There is nothing to compact, so nothing is kept for it."""
    plan = make_plan(SLIDING, Settings.of(cap=200_000, chunk=16), plugins.policy("am-halving", probe=probe))
    assert (plan.stored_bytes, plan.draw_bytes, plan.fit_bytes) == (0, 0, 0)


@LAW
@given(needed=st.integers(1, 5000), limit=st.integers(1, 5000))
def test_growing_never_passes_the_limit_nor_leaves_a_large_store_behind(needed: int, limit: int) -> None:
    """The capacity holds what is needed; the next larger one is at most twice as large, and the limit is the last."""
    if needed > limit:
        return
    capacity = grown(needed, limit)
    assert needed <= capacity <= limit
    assert capacity == limit or grown(capacity + 1, limit) <= 2 * capacity
    assert -(-capacity // 2) < needed or capacity == 1


@LAW
@given(pieces=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_a_store_that_grows_is_at_most_half_of_its_limit(pieces: list[int]) -> None:
    """However tokens arrive, the store that is replaced has at most half of the limit's slots, rounded up."""
    limit, held, capacity = sum(pieces), 0, 0
    for piece in pieces:
        held += piece
        if held > capacity:
            assert capacity <= -(-limit // 2)
            capacity = grown(held, limit)
    assert capacity == limit


@LAW
@given(window=st.integers(1, 200), chunk=st.integers(1, 300))
def test_a_sliding_store_holds_its_window_and_some_slack(window: int, chunk: int) -> None:
    """What a query sees besides itself, room for at least one token, and never twice the window."""
    slots = window_slots(window, chunk)
    assert window <= slots <= 2 * window - 1
    assert slots - (window - 1) <= max(1, chunk)
