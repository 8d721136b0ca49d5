"""Selectors, and what Attention Matching is composed of: every choice of slots with every fit keeps the invariants."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from agentmem import plugins
from agentmem.contracts import (
    BudgetRequest,
    Budgets,
    Compaction,
    Compactor,
    HeadCompaction,
    Policy,
    Segment,
    SegmentShape,
)
from agentmem.errors import SettingsRefused
from agentmem.policies.am_halving import am_halving
from agentmem.policies.budgets.uniform import Uniform
from agentmem.policies.compactors.attention_matching import AttentionMatching
from agentmem.policies.compactors.selectors import SELECTORS, Highest, Pursue, selector
from agentmem.policies.solvers.lots import lots
from agentmem.policies.solvers.refine import NEAR
from agentmem.testing import CASES, Case, check_policy, make_segment
from oracles import eviction as reference_eviction
from oracles import matching as oracle
from oracles import pursuit as reference_pursuit
from support import tiny
from support.matrices import matrix

FITTING = ("omp", "omp-fast", "omp-progressive", "omp-needles")
"""Selectors that fit β themselves."""
PLAIN = tuple(name for name in SELECTORS if name not in FITTING)
EVERY = pytest.mark.parametrize("name", SELECTORS)
SMALL = Case("small", held=(24, 9), slots=(11, 4), group=2, queries=20, key_dim=8, value_dim=6)
TROUBLE = replace(SMALL, name="trouble", bias=1.0, duplicates=True, weights=(1.0, 0.25, 3.0))
TINY = replace(TROUBLE, name="tiny trouble", held=(8, 3), slots=(4, 3), group=1, queries=6, weights=(1.0, 3.0))


def halving(name: str, **options: Any) -> Policy:
    """AM halving with that selector."""
    return plugins.policy("am-halving", selector=name, **options)


def compact(made: Policy, segment: Segment, slots: Sequence[int]) -> tuple[HeadCompaction, ...]:
    """What becomes of the heads."""
    assert made.compactor is not None
    return made.compactor.compact(segment, slots).heads


def change(segment: Segment, head: int, result: HeadCompaction) -> torch.Tensor:
    """What a compaction adds to the β of the slots that stay."""
    assert result.bias is not None
    return result.bias - segment.heads[head].bias[result.kept]


def plain(segment: Segment, head: int) -> tuple[oracle.Matrix, oracle.Matrix, list[float], float]:
    """Queries, keys, old β and scale of one head, for the oracles."""
    asked = [row for part in segment.queries(head) for row in part.flatten(0, 1).double().tolist()]
    return asked, segment.heads[head].keys.tolist(), segment.heads[head].bias.tolist(), segment.scale


# ---- the invariants


class Free(Budgets):
    """Costs nothing: all invariants of budgets hold elsewhere."""

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """The first heads first."""
        allocated, left = [], request.total
        for layer in request.held:
            allocated.append(tuple(min(held, max(0, left - sum(layer[:head]))) for head, held in enumerate(layer)))
            left -= sum(layer)
        return tuple(allocated)


@EVERY
def test_every_selector_keeps_the_laws_on_every_case(name: str) -> None:
    """Exactly the slots that were asked for, ascending, finite, the same again, heads by themselves, bytes as stated.

    Those that fit β meet every case at a quarter of its size.
    """
    cases = [quarter(case) for case in CASES] if name in FITTING else CASES
    check_policy(replace(halving(name), budgets=Free()), shapes=cases).raise_if_broken()


def quarter(case: Case) -> Case:
    """The same with a quarter of the slots and queries, one at least."""
    held, slots = ([-(-count // 4) for count in counts] for counts in (case.held, case.slots))
    return replace(case, held=tuple(held), slots=tuple(slots), queries=-(-case.queries // 4))


@matrix(
    name=list(SELECTORS),
    mass=["projected", "exact", "none"],
    values=["fitted", "own"],
    carry=[0, 0.9],
    refine=[0, 2],
)
def test_every_composition_keeps_the_laws(name: str, mass: str, values: str, carry: float, refine: int) -> None:
    """Whatever selects, fits β and fits values, with and without carried importance and refinement."""
    made = halving(name, mass=mass, values=values, carry=carry, refine=refine)
    check_policy(replace(made, budgets=Free()), shapes=(TINY,)).raise_if_broken()


@EVERY
@pytest.mark.parametrize("bound", [0.25, 3.0])
def test_one_compaction_changes_beta_by_the_bound_at_most(name: str, bound: float) -> None:
    """Whoever fits it, and whatever it was; refinement adds its reach at most."""
    for mass, refine in itertools.product(("projected", "exact"), (0, 2)):
        made = halving(name, mass=mass, beta_bound=bound, refine=refine)
        segment = make_segment(replace(SMALL, bias=2.0), made)
        changes = [change(segment, head, each) for head, each in enumerate(compact(made, segment, (6, 3)))]
        most = max(float(each.abs().max()) for each in changes)
        assert 0 < most <= bound + (NEAR.bias if refine else 0) + 1e-5


# ---- which slots stay


@pytest.mark.parametrize("seed", range(3))
def test_highest_keeps_the_top_by_importance_and_pooled_its_neighbours_too(seed: int) -> None:
    """The oracle's order of root mean square weights; ``pooled`` of their maxima over five neighbouring slots."""
    for name, kernel in (("highest", 1), ("pooled", 5)):
        made = halving(name)
        segment = make_segment(replace(SMALL, bias=0.5), made, seed=seed)
        for head, result in enumerate(compact(made, segment, (11, 4))):
            scores = oracle.importance(oracle.weights(*plain(segment, head)), "rms")
            pooled = reference_eviction.pooled(scores, kernel, "max")
            assert result.kept.tolist() == oracle.top(pooled, (11, 4)[head])
    assert halving("pooled").compactor == AttentionMatching(selector=Highest(kernel=5))


@pytest.mark.parametrize("count", [2, 3, 10, 11])
@pytest.mark.parametrize("carry", [0.0, 1.0])
def test_needles_are_the_top_half_by_importance(count: int, carry: float) -> None:
    """Half of the slots, rounded down, are those that highest attention keeps; what they were worth once counts too."""
    made = halving("omp-needles", carry=carry)
    segment = make_segment(SMALL, made)
    (result, _) = compact(made, segment, (count, 4))
    scores = oracle.importance(oracle.weights(*plain(segment, 0)), "rms")
    old = segment.heads[0].scores
    if carry:
        assert old is not None
        scores = [max(pair) for pair in zip(scores, old.tolist(), strict=True)]

    assert set(oracle.top(scores, count // 2)) <= set(result.kept.tolist())
    assert len(result.kept) == count


@pytest.mark.parametrize(("name", "batch"), [("omp", 1), ("omp-fast", 8)])
def test_pursuit_is_the_greedy_choice_of_its_schedule(name: str, batch: int) -> None:
    """One slot a step, or twice four between two fits: slots and β are the oracle's, in float64 loops."""
    made = halving(name)
    segment = make_segment(Case("greedy", held=(24,), slots=(10,), group=2, queries=30, key_dim=8), made, seed=3)
    (result,) = compact(made, segment, (10,))
    design = oracle.weights(*plain(segment, 0))
    kept, weights = reference_pursuit.pursue(design, [1.0] * len(design), 10, batch, ridge=1e-4, bound=3.0)

    assert result.kept.tolist() == kept
    assert change(segment, 0, result).tolist() == pytest.approx([math.log(each) for each in weights], abs=2e-3)


def test_a_random_subset_differs_by_head_layer_seed_and_moment_and_not_by_the_order_of_heads() -> None:
    """Lots follow from the seed, the layer and the newest key; the global random state is left alone."""
    made = halving("random")
    case = Case("lots", held=(40,) * 3, slots=(20,) * 3, group=1, queries=4)
    segment = make_segment(case, made)
    others = [
        replace(segment, layer=1),
        replace(segment, generator=torch.Generator().manual_seed(9)),
        make_segment(case, made, seed=1),
    ]
    state = torch.get_rng_state()
    first = [result.kept.tolist() for result in compact(made, segment, (20,) * 3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(map(tuple, first))) == 3
    for other in others:
        assert all(a != b.kept.tolist() for a, b in zip(first, compact(made, other, (20,) * 3), strict=True))
    turned = replace(segment, heads=segment.heads[::-1])
    assert [result.kept.tolist() for result in compact(made, turned, (20,) * 3)] == first[::-1]


def test_lots_are_uniform_and_the_same_wherever_they_are_drawn() -> None:
    """Over 400 seeds every slot's mean is that of fair lots, to five standard errors; rounding does not matter."""
    keys = torch.randn(12, 4)
    drawn = torch.stack([lots(keys, seed) for seed in range(400)])

    assert (drawn.dtype, tuple(drawn.shape)) == (torch.float32, (400, 12))
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert float((drawn.mean(0) - 0.5).abs().max()) < 5 * (1 / 12 / 400) ** 0.5
    assert torch.equal(lots(torch.cat((torch.zeros(11, 4), keys[-1:])), 7), drawn[7])
    assert not torch.equal(lots(-keys, 7), drawn[7])
    assert torch.equal(lots((keys * (1 + 1e-6)).to(torch.bfloat16), 7), drawn[7])


# ---- which fits


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("carry", [0.0, 0.9])
def test_without_fits_it_is_eviction(name: str, carry: float) -> None:
    """β, values and keys of the slots that stay are untouched."""
    made = halving(name, mass="none", values="own", carry=carry)
    segment = make_segment(TROUBLE, made)
    for head, result in enumerate(compact(made, segment, (11, 4))):
        assert not change(segment, head, result).any()
        assert result.values is None
        assert result.keys is None


@pytest.mark.parametrize("name", FITTING)
def test_a_pursuit_has_fitted_beta_already(name: str) -> None:
    """Whichever fit of the mass is named, β is the pursuit's, and it is not plain β."""
    results = []
    for mass in ("projected", "exact", "none"):
        made = halving(name, mass=mass)
        segment = make_segment(TROUBLE, made)
        results.append([(change(segment, head, r), r.values) for head, r in enumerate(compact(made, segment, (11, 4)))])
    for one, two, three in zip(*results, strict=True):
        assert one[0].any()
        assert all(torch.equal(one[part], other[part]) for other in (two, three) for part in range(2))


@EVERY
def test_own_values_stay_and_fitted_ones_do_not_change_beta(name: str) -> None:
    """Slots and β do not depend on what happens to the values."""
    fitted, own = halving(name), halving(name, values="own")
    segment = make_segment(TROUBLE, fitted)
    for one, other in zip(compact(fitted, segment, (11, 4)), compact(own, segment, (11, 4)), strict=True):
        assert torch.equal(one.kept, other.kept)
        assert torch.equal(one.bias, other.bias) if one.bias is not None and other.bias is not None else False
        assert one.values is not None
        assert other.values is None


# ---- carried importance


@EVERY
@pytest.mark.parametrize("score", ["rms", "max", "mean"])
def test_importance_is_carried_with_a_slot(name: str, score: str) -> None:
    """A slot's score is the larger of what it has now and 0.9 of what it had, in surveys too; by the oracle."""
    made = halving(name, carry=0.9, score=score)
    assert (made.scores, halving(name, score=score).scores) == ("carried", "none")
    segment = make_segment(replace(SMALL, bias=0.5), made)
    heads = [
        replace(head, scores=head.scores * (1.0 if score == "max" else 0.2))
        for head in segment.heads
        if head.scores is not None
    ]
    segment = replace(segment, heads=tuple(heads))
    assert made.compactor is not None
    surveyed = made.compactor.survey(segment).scores
    for slots in ((11, 4), (24, 9), (0, 9)):
        for head, result in enumerate(compact(made, segment, slots)):
            now = oracle.importance(oracle.weights(*plain(segment, head)), score)
            expected = [max(new, 0.9 * old) for new, old in zip(now, heads[head].scores.tolist(), strict=True)]  # type: ignore[union-attr]  # a carried column
            assert surveyed[head].tolist() == pytest.approx(expected, rel=1e-4)
            assert result.scores is not None
            assert result.scores.tolist() == pytest.approx([expected[i] for i in result.kept.tolist()], rel=1e-4)
            assert any(new < 0.9 * old for new, old in zip(now, heads[head].scores.tolist(), strict=True))  # type: ignore[union-attr]  # the same
            assert any(new > 0.9 * old for new, old in zip(now, heads[head].scores.tolist(), strict=True))  # type: ignore[union-attr]  # the same


@pytest.mark.parametrize("name", ["highest", "pooled", "omp-needles"])
def test_what_was_important_once_stays(name: str) -> None:
    """Slots that no query looks at now are kept for what they were worth; without carrying they go."""
    for carry, kept in ((1.0, True), (0.0, False)):
        made = halving(name, carry=carry)
        segment = make_segment(SMALL, made)
        head = segment.heads[0]
        keys = head.keys.clone()
        keys[:5] = -1e3 * segment.queries(0)[0].flatten(0, 1).mean(0)
        weights = oracle.weights(plain(segment, 0)[0], keys.tolist(), [-60.0] * 5 + [0.0] * 19, segment.scale)
        assert max(max(row[:5]) for row in weights) < 0.5
        old = None if head.scores is None else torch.tensor([1.0] * 5 + [0.0] * 19)
        bias = torch.tensor([-60.0] * 5 + [0.0] * 19)
        first = replace(head, bias=bias, scores=old)
        (result, _) = compact(made, replace(segment, heads=(first, segment.heads[1])), (11, 4))
        assert (set(range(5)) <= set(result.kept.tolist())) == kept


@dataclass
class Spy(Compactor):
    """Another compactor that remembers scores by position: those that it was given and those that it gave."""

    inner: Compactor
    given: list[dict[int, float]] = field(default_factory=list)
    left: list[dict[int, float]] = field(default_factory=list)
    needs_queries = True

    def __post_init__(self) -> None:
        """Keep the other's column."""
        self.scores = self.inner.scores

    def workspace(self, shape: SegmentShape) -> int:
        """What the other needs."""
        return self.inner.workspace(shape)

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """Look, hand over, look again."""
        result = self.inner.compact(segment, slots)
        head, new = segment.heads[0], result.heads[0]
        assert head.scores is not None
        assert new.scores is not None
        if segment.layer == 0:
            self.given.append(dict(zip(head.positions.tolist(), head.scores.tolist(), strict=True)))
            self.left.append(dict(zip(head.positions[new.kept].tolist(), new.scores.tolist(), strict=True)))
        return result


def test_scores_travel_with_their_slots() -> None:
    """What a compaction leaves is what the next one is given, slot by slot, and newer slots have 0."""
    made = halving("highest", carry=0.9)
    assert made.compactor is not None
    spy = Spy(made.compactor)
    with tiny.capped_by(replace(made, compactor=spy), on_failure="raise") as memory:
        tiny.feed(memory, tiny.ids(100))
        assert len(memory.compactions) == 3
    for left, given in itertools.pairwise(zip(spy.left, spy.given, strict=True)):
        for position, score in given[1].items():
            assert score == left[0].get(position, 0.0)
        assert len(left[0].keys() & given[1].keys()) == 12


# ---- presets and refusals


@pytest.mark.parametrize("preset", ["am-calibrated", "am-recall", "am-pursuit"])
def test_presets_are_am_halving_with_other_defaults(preset: str) -> None:
    """Given the defaults of AM halving a preset is AM halving; without them it is something else, by its own name."""
    known = inspect.signature(am_halving).parameters
    defaults = {name: each.default for name, each in known.items() if name not in ("name", "summary")}
    same, own, base = plugins.policy(preset, **defaults), plugins.policy(preset), am_halving()

    assert (same.compactor, same.queries, type(same.budgets)) == (base.compactor, base.queries, Uniform)
    assert (own.compactor, own.queries, type(own.budgets)) != (base.compactor, base.queries, Uniform)
    assert own.name == same.name == preset
    assert own.source.startswith("arXiv:2602.16284")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "best"}, "selector: 'best' is unknown; choose one of highest, pooled, omp, omp-fast"),
        ({"mass": "nnls"}, "mass: 'nnls' is unknown; choose one of projected, exact, none"),
        ({"values": "old"}, "values: 'old' is unknown; choose one of fitted, own"),
        ({"carry": 1.5}, "carry: 1.5 is no fraction; give 0 (forget) to 1 (keep all)"),
        ({"carry": -0.1}, "carry: -0.1 is no fraction"),
        ({"carry": math.nan}, "carry: nan is no fraction"),
        ({"refine": -1}, "refine: -1 is negative or no whole number; give 0, 1, 2"),
        ({"mas": "exact"}, "has no option 'mas'; did you mean 'mass'?"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    """With the policy, the option, its value and what would do."""
    with pytest.raises(SettingsRefused, match=f"'am-halving'.*{re.escape(message)}"):
        plugins.policy("am-halving", **options)


@pytest.mark.parametrize("needles", [-0.1, 1.1, math.nan])
def test_what_is_no_fraction_of_the_slots_is_refused(needles: float) -> None:
    """Needles are a fraction, and a kernel has a middle; names are looked up in one place."""
    with pytest.raises(ValueError, match=f"needles: {needles} is no fraction of the slots; give 0 to 1"):
        Pursue(needles=needles)
    with pytest.raises(ValueError, match=r"kernel: 4 .*odd"):
        Highest(kernel=4)
    with pytest.raises(ValueError, match="selector: 'top' is unknown"):
        selector("top")
