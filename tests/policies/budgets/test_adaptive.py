"""Adaptive budgets: as many slots as an error target needs, by curves of errors on queries that no fit has seen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentmem import api, plugins
from agentmem.compaction import budgets
from agentmem.compaction.budgets import check_budgets, most_slots
from agentmem.compaction.held_out import CURVE_FRACTIONS, error_curves, split_references
from agentmem.contracts import BudgetRequest, Curve, Policy, Reference, Segment, Survey
from agentmem.hf import CappedCache, describe
from agentmem.memory.forwards import Arriving, Transient
from agentmem.memory.memory import Memory
from agentmem.planning.capacity import make_plan
from agentmem.planning.pricing import HYSTERESIS
from agentmem.policies.budgets.adaptive import Adaptive
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.attention_matching import AttentionMatching
from agentmem.reporting.report import CompactionReport
from agentmem.settings import Settings
from agentmem.testing import Case, make_segment, peak_allocated
from oracles import matching as oracle
from support import tiny, variants
from support.no_model import Forwards, engine

PINNED = 4 + 8
HEADS = 4
LOOSE, IMPOSSIBLE = 1e6, 1e-9


def targets(error: float) -> Adaptive:
    """The same target for both errors."""
    return Adaptive(output_error=error, log_mass_error=error)


# ---- allocating

ERRORS = st.integers(0, 64).map(lambda count: count / 32)
"""Multiples of 1/32, so that interpolation between them is exact."""
TARGETS = st.integers(1, 127).map(lambda count: count / 64)


@st.composite
def curves(draw: st.DrawFn, held: int, *, falling: bool = False) -> Curve:
    """A measured curve of a head of so many slots: errors that jump about or fall, none where all slots are kept."""
    sizes = [*sorted(draw(st.sets(st.integers(1, held - 1), min_size=1, max_size=5))), held] if held > 1 else [held]
    errors = [[*draw(st.lists(ERRORS, min_size=len(sizes) - 1, max_size=len(sizes) - 1)), 0.0] for _ in range(2)]
    errors = [sorted(each, reverse=True) for each in errors] if falling else errors
    return Curve(tuple(sizes), tuple(errors[0]), tuple(errors[1]))


@st.composite
def requests(draw: st.DrawFn) -> BudgetRequest:
    """What a memory may ask: layers and heads of any fullness, curves of any form, limits that bind and that do not."""
    held = draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3))
    surveys = tuple(
        Survey(layer, (), tuple(draw(curves(slots)) for slots in heads)) for layer, heads in enumerate(held)
    )
    full = sum(map(sum, held))
    limit = draw(st.integers(0, full + 5))
    ceiling, layer_ceiling = draw(st.integers(1, 45)), draw(st.integers(3, 130))
    return BudgetRequest(tuple(held), limit // 2, draw(st.integers(0, 5)), surveys, ceiling, layer_ceiling, limit)


def alone(curve: Curve, output_error: float, log_mass_error: float) -> int:
    """What one head gets when nothing limits it."""
    request = BudgetRequest(((curve.slots[-1],),), 1, 0, (Survey(0, (), (curve,)),))
    return Adaptive(output_error=output_error, log_mass_error=log_mass_error).allocate(request)[0][0]


def interpolated(sizes: Sequence[int], errors: Sequence[float], slots: int) -> Fraction:
    """The error at so many slots, on straight lines between the measured sizes; exact."""
    for (low, high), (over, under) in zip(pairwise(sizes), pairwise(errors), strict=True):
        if low <= slots <= high:
            return Fraction(over) + (Fraction(under) - Fraction(over)) * Fraction(slots - low, high - low)
    return Fraction(errors[0])


@given(data=st.data(), held=st.integers(1, 40), output=TARGETS, mass=TARGETS)
def test_a_head_gets_the_fewest_slots_within_both_targets(
    data: st.DataObject, held: int, output: float, mass: float
) -> None:
    """By a loop over all slots between the measured sizes: from there on neither error is above its target."""
    curve = data.draw(curves(held))
    wanted = held
    for slots in reversed(range(curve.slots[0], held + 1)):
        errors = (interpolated(curve.slots, each, slots) for each in (curve.output, curve.log_mass))
        if any(error > target for error, target in zip(errors, (output, mass), strict=True)):
            break
        wanted = slots

    assert alone(curve, output, mass) == wanted


@given(request=requests(), error=TARGETS | st.just(LOOSE))
def test_every_deal_keeps_the_laws(request: BudgetRequest, error: float) -> None:
    """Shape, held slots, ceilings and the limit; every head its floor where that fits; the same request, the same."""
    budgets = targets(error)
    allocated = budgets.allocate(request)

    check_budgets("adaptive", budgets, request, allocated)
    assert allocated == budgets.allocate(request)
    assert sum(map(sum, allocated)) <= min(request.limit, most_slots(request))
    floors = [[min(request.floor, slots, request.ceiling) for slots in heads] for heads in request.held]
    if sum(map(sum, floors)) <= request.limit and all(sum(heads) <= request.layer_ceiling for heads in floors):
        assert all(
            slots >= floor for pair in zip(allocated, floors, strict=True) for slots, floor in zip(*pair, strict=True)
        )


@given(request=requests(), error=TARGETS, factor=st.sampled_from([1, 2, 4, 64]))
def test_a_larger_target_takes_slots_and_gives_none(request: BudgetRequest, error: float, factor: int) -> None:
    """Both targets by the same factor: no head gets more. One of them alone: the sum is no larger."""
    few, many = (sum(targets(each).allocate(request), ()) for each in (factor * error, error))
    assert all(one <= other for one, other in zip(few, many, strict=True))
    for larger in ({"output_error": factor * error}, {"log_mass_error": factor * error}):
        assert sum(sum(replace(targets(error), **larger).allocate(request), ())) <= sum(many)


@given(data=st.data(), held=st.integers(2, 40), error=TARGETS, over=st.integers(0, 40), first=st.booleans())
def test_a_harder_head_gets_at_least_as_many(
    data: st.DataObject, held: int, error: float, over: int, first: bool
) -> None:
    """Errors that are nowhere smaller take no fewer slots; where the limit binds, a tie costs at most one slot."""
    easy = data.draw(curves(held, falling=True))
    more = [data.draw(st.integers(0, 8)) / 32 for _ in easy.slots[1:]]
    more = [*sorted(more, reverse=True), 0.0]
    steep = [slots / 1024 for slots in reversed(range(len(easy.slots)))]  # without flat stretches no demand jumps

    def harder(curve: Curve, by: list[float]) -> Curve:
        output, log_mass = (tuple(map(sum, zip(each, by, strict=True))) for each in (curve.output, curve.log_mass))
        return replace(curve, output=output, log_mass=log_mass)

    easy = harder(easy, steep)
    hard = harder(easy, more)
    pair = (hard, easy) if first else (easy, hard)
    free = BudgetRequest(((held, held),), 2, 1, (Survey(0, (), pair),))
    for request, slack in ((free, 0), (replace(free, limit=2 * easy.slots[0] + over), 1)):
        one, other = targets(error).allocate(request)[0]
        assert (one + slack >= other) if first else (other + slack >= one)


@pytest.mark.parametrize("field", ["output_error", "log_mass_error"])
@pytest.mark.parametrize("value", [0.0, -0.1, float("inf"), float("nan")])
def test_a_target_that_nothing_meets_is_refused(field: str, value: float) -> None:
    """With its name and value; so are an option that these budgets do not have, and a allocate without curves."""
    with pytest.raises(ValueError, match=f"{field}: {value} is no error target; give a number above 0"):
        by_name("adaptive", **{field: value})
    with pytest.raises(ValueError, match="'adaptive' has no option 'output_eror'; did you mean 'output_error'"):
        by_name("adaptive", output_eror=0.1)
    with pytest.raises(ValueError, match="0 surveys for 2 layers: adaptive budgets read error curves"):
        Adaptive().allocate(BudgetRequest(((3,), (3,)), 2, 1))


# ---- curves


def measured(segment: Segment, compactor: AttentionMatching, head: int, size: int, held: Sequence[Reference]) -> Any:
    """Relative output error and mean log-mass error of one head with ``size`` slots left, in float64 loops."""
    source = segment.heads[head]
    fit = compactor.compact(segment, [min(size, each.slots) for each in segment.heads]).heads[head]
    kept = fit.kept.tolist()
    old = (source.keys.tolist(), source.bias.tolist())
    new = ([old[0][index] for index in kept], fit.bias.tolist() if fit.bias is not None else [old[1][i] for i in kept])
    values = fit.values.tolist() if fit.values is not None else source.values[fit.kept].tolist()
    missed = total = 0.0
    masses: list[float] = []
    for part in held:
        asked = part.queries[2 * head : 2 * head + 2].double().flatten(0, 1).tolist()
        whole = oracle.output(asked, *old, source.values.tolist(), segment.scale)
        fitted = oracle.output(asked, *new, values, segment.scale)
        missed += sum((a - b) ** 2 for x, y in zip(whole, fitted, strict=True) for a, b in zip(x, y, strict=True))
        total += sum(a**2 for row in whole for a in row)
        pair = (oracle.log_mass(asked, *each, segment.scale) for each in (old, new))
        gaps = [abs(a - b) for a, b in zip(*pair, strict=True)]
        masses.append(sum(gaps) / len(gaps))
    return (missed / total) ** 0.5, sum(masses) / len(masses)


CASE = Case("curves", held=(30, 9), slots=(16, 9), group=2, queries=40, key_dim=8, value_dim=6, weights=(1.0, 3.0))


def test_curves_are_those_of_float64_loops() -> None:
    """Five sizes up to the most that a head can get, errors on held-out queries only, and none with all slots kept."""
    compactor = AttentionMatching()
    segment = make_segment(CASE, plugins.policy("am-halving"))
    held, fitted = split_references(segment.references)
    segment = replace(segment, references=fitted)
    found = error_curves(compactor, segment, held, 16)

    assert [curve.slots for curve in found] == [(1, 2, 4, 8, 16, 30), (1, 2, 4, 8, 9)]
    assert CURVE_FRACTIONS == (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
    for head, curve in enumerate(found):
        expected = [measured(segment, compactor, head, size, held) for size in curve.slots[:-1]]
        assert curve.output == pytest.approx([output for output, _ in expected] + [0.0], rel=1e-4)
        assert curve.log_mass == pytest.approx([mass for _, mass in expected] + [0.0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("selector", ["highest", "omp-fast"])
def test_curves_commit_nothing_and_allocate_no_more_than_a_fit_and_a_check(selector: str) -> None:
    """The segment keeps every bit, and the peak is within what a survey borrows of the cap."""
    policy = plugins.policy("am-halving", selector=selector, budgets="adaptive")
    case = Case("survey", held=(120, 120), slots=(60, 60), group=2, queries=64)
    assert policy.compactor is not None
    compactor, (segment, untouched) = policy.compactor, (make_segment(case, policy) for _ in range(2))
    held, fitted = split_references(segment.references)
    fitting = replace(segment, references=fitted)
    check = 2 * 8 * (2 * 120 + 2 * 16) * 4
    peak = peak_allocated(lambda: error_curves(compactor, fitting, held, 60))

    assert peak <= compactor.workspace(case.shape) + check
    for one, other in zip(segment.heads, untouched.heads, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.bias, other.bias)


# ---- in a memory


def policy(error: float, **options: Any) -> Policy:
    """AM halving with this target for both errors."""
    return replace(plugins.policy("am-halving", **options), budgets=targets(error))


def exact(made: Policy, **settings: Any) -> AbstractContextManager[CappedCache]:
    """The smallest cap that 48 slots per head need; a refusal by the ledger is an error."""
    settings = {"on_failure": "raise"} | settings
    return tiny.capped_by(made, cap=tiny.need(made, tiny.llama(), **settings), **settings)


@pytest.mark.parametrize(
    ("settings", "scratch"),
    [
        ({}, 0),
        ({"min_reclaim": 19}, 0),
        ({"target": 44}, 0),
        ({"max_slots": 112}, 40),
        ({"max_slots": 96, "target": 0.25}, 0),
    ],
)
def test_the_limit_leaves_room_for_what_comes(settings: dict[str, Any], scratch: int) -> None:
    """The capacity less scratch and a part of it or ``min_reclaim``, never below the target; others have no limit."""
    probe = "self-study+replay" if scratch else "replay"
    plan = tiny.plan(policy(0.1, probe=probe), tiny.llama(), **settings)
    free = max(settings.get("min_reclaim", 4), plan.capacity // HYSTERESIS)

    assert plan.scratch == scratch
    assert plan.limit == max(plan.target, plan.capacity - scratch - free)
    assert plan.capacity - scratch - plan.limit >= 4
    plain = tiny.plan("replay", tiny.llama(), **settings)
    assert plain.limit == plain.target


@pytest.mark.parametrize("options", [{}, {"probe": "live+spread", "probe_tokens": 24}, {"carry": 0.9, "score": "mean"}])
def test_an_impossible_target_leaves_the_limit_and_the_memory_goes_on(options: dict[str, Any]) -> None:
    """Every compaction leaves exactly the limit, and the next one comes a part of the capacity later, not sooner."""
    with exact(policy(IMPOSSIBLE, **options)) as memory:
        tiny.feed(memory, tiny.ids(110), pieces=1)
        plan, reports = memory.plan, memory.compactions
    free = plan.capacity - plan.limit
    assert free >= plan.capacity // HYSTERESIS
    assert [report.tokens_seen for report in reports] == list(range(48, 110, free))
    for report in reports:
        check_report(report, plan.resident_bytes)
        assert report.slots_after == plan.limit * HEADS
        assert report.output_error is not None


def check_report(report: CompactionReport, resident: int) -> None:
    """Layers add up, nothing went wrong, freed slots became headroom, surveying took time."""
    assert report.faults == ()
    assert report.slots_before == sum(layer.slots_before for layer in report.layers)
    assert report.slots_after == sum(layer.slots_after for layer in report.layers)
    assert [layer.outcome for layer in report.layers] == ["compacted"] * 2
    assert report.bytes_after <= resident < report.bytes_after + HEADS * 136
    assert report.seconds_by_stage["survey"] > 0


def test_a_loose_target_leaves_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head keeps the smallest size that was measured on held-out queries, a sixteenth of the most."""
    asked: list[Any] = []
    monkeypatch.setattr(budgets, "error_curves", lambda *given: asked.append(given) or error_curves(*given))
    with exact(policy(LOOSE)) as memory:
        tiny.feed(memory, tiny.ids(150))
        plan, reports = memory.plan, memory.compactions
    for _, segment, held, most in asked:
        assert most == plan.most_budget
        assert [part.span[1] for part in held] == [part.span[0] for part in segment.references]
    floor = plan.most_budget // 16
    assert floor >= 1
    assert [report.tokens_seen for report in reports] == list(range(48, 150, 48 - PINNED - floor))
    for report in reports:
        check_report(report, plan.resident_bytes)
        assert report.slots_after == (PINNED + floor) * HEADS


def test_targets_between_are_met_with_slots_between() -> None:
    """A larger target leaves fewer slots, heads differ, and some target is met below the limit."""
    left, unequal = [], False
    for error in (1e-9, 0.2, 0.4, 0.6, 1.0, 1e6):
        with exact(policy(error)) as memory:
            tiny.feed(memory, tiny.ids(49))
            left.append(memory.compactions[0].slots_after)
            unequal |= any(len(set(store.lengths)) > 1 for store in memory.memory.sequences[0].stores if store)
    assert left == sorted(left, reverse=True)
    assert len(set(left)) >= 4
    assert unequal


def test_a_row_in_a_batch_is_the_row_alone() -> None:
    """Rows are surveyed and allocated by themselves."""
    made, model = policy(0.5), tiny.llama()
    settings = {"max_new_tokens": 40, "do_sample": False}
    ids, mask = variants.left_padded((60, 51))
    with tiny.capped_by(made) as memory:
        together = model.generate(ids, attention_mask=mask, past_key_values=memory, **settings)
        assert len(memory.compactions) >= 4
    for row, length in enumerate((60, 51)):
        with tiny.capped_by(made) as memory:
            answer = model.generate(ids[row : row + 1, 60 - length :], past_key_values=memory, **settings)
        assert together[row, 60:].tolist() == answer[0, length:].tolist()


@pytest.mark.parametrize("error", [IMPOSSIBLE, 0.5, LOOSE])
def test_a_whole_compaction_allocates_no_more_than_planned(error: float) -> None:
    """The profiler's peak of survey, fits, checks, commits and headroom stays within T, and R + T under the cap."""
    made, shape = policy(error), describe(tiny.llama().config, itemsize=4)
    settings = tiny.SETTINGS | {"max_slots": 200, "chunk": 40}
    plan = make_plan(shape, Settings.of(cap=1 << 30, **settings), made)
    memory = Memory(shape, Settings.of(cap=plan.resident_bytes + plan.workspace_bytes, **settings), made)
    memory.bind(1)
    runs = engine(memory)
    for start in range(0, 200, 40):
        step = runs.begin([Arriving(range(40), range(start, start + 40), slice(None))])
        for layer in range(2):
            step.attend(layer, torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16), 0.25)
        runs.commit()
    asked = [torch.randn(4, plan.probe_tokens, 16) for _ in range(2)]

    def probe(_: object, __: int, step: Transient) -> None:
        for layer, queries in enumerate(asked):
            step.visit(layer, queries)

    runs.forwards = Forwards(probe)

    def compact() -> None:
        for layer, store in enumerate(
            memory.sequences[0].stores
        ):  # born again: the profiler sees only frees of what it saw allocated
            assert store is not None
            memory.sequences[0].replace(layer, store.resized(store.capacities))
        assert runs.compact(memory.sequences[0]) is not None

    resident = memory.ledger.resident
    memory.ledger.cap += plan.capacity * 2 * 148  # for the rebirth alone
    assert 0 < peak_allocated(compact) - resident <= plan.workspace_bytes
    assert memory.compactions[0].bytes_peak <= memory.settings.cap


@pytest.mark.parametrize("options", [{"probe_tokens": 4}, {"pattern": "x", "probe_tokens": 16}])
def test_what_was_not_measured_is_not_taken_for_good(options: dict[str, Any]) -> None:
    """Parts too short to hold queries out, alone or cut up by a pattern: an impossible target still leaves the most."""

    class Text:
        """Every third token is an x."""

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            """As the tests' other one."""
            return tiny.tokenizer(text, add_special_tokens=add_special_tokens)

        def decode(self, ids: Sequence[int]) -> str:
            """All of them."""
            return "".join("x" if each % 3 == 0 else " a" for each in ids)

        def batch_decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
            """The text of every row."""
            return [self.decode(row) for row in rows]

    chosen = policy(IMPOSSIBLE, **options)
    with api.capped(
        tiny.llama(), cap=1 << 24, policy=chosen, tokenizer=Text(), **tiny.SETTINGS, on_failure="raise"
    ) as memory:
        tiny.feed(memory, torch.arange(3, 52)[None])
        assert memory.compactions[0].slots_after == memory.plan.limit * HEADS


@pytest.mark.parametrize("name", ["window", "heavy-hitters", "key-norm"])
def test_policies_without_reference_queries_are_refused(name: str) -> None:
    """There is nothing to measure errors with; the message names the policy and what it lacks."""
    with pytest.raises(ValueError, match=rf"'{name}'.*reference queries"):
        plugins.policy(name, budgets="adaptive")
