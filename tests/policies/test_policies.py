"""The built-in policies: their invariants, their workspace, and what they are for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentmem.contracts import BudgetRequest, HeadSegment, Policy, Reference, Segment
from agentmem.policies.am_halving import am_halving
from agentmem.policies.budgets.uniform import Uniform
from agentmem.policies.compactors.attention_matching import AttentionMatching
from agentmem.policies.full import full
from agentmem.policies.heavy_hitters import heavy_hitters
from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.mass import fit_mass
from agentmem.policies.solvers.selection import importance
from agentmem.policies.solvers.values import fit_values
from agentmem.policies.window import window
from agentmem.testing import Case, check_policy, make_segment, peak_allocated
from oracles import matching as oracle
from support.matrices import in_turn

HALVED = Case("halved", held=(512,) * 3, slots=(256,) * 3, queries=1024, key_dim=64, value_dim=64)


def built_in() -> list[Policy]:
    """Every policy of the catalogue, and AM halving with each of its scores and probes."""
    scored = [am_halving(score="max"), am_halving(score="mean", probe="live+replay*2", probe_tokens=64)]
    return [am_halving(), *scored, window(), heavy_hitters(), full()]


@in_turn(policy=built_in(), seed=[0, 1])
def test_every_policy_keeps_the_laws(policy: Policy, seed: int) -> None:
    """No invariant of Compactor or Budgets is broken on any case."""
    check_policy(policy, seed=seed).raise_if_broken()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", built_in()[:-1], ids=lambda policy: policy.name)
def test_the_workspace_is_at_most_twice_what_is_used(policy: Policy, dtype: torch.dtype) -> None:
    """The promise is an upper bound, and it does not waste the user's cap."""
    assert policy.compactor is not None
    case = replace(HALVED, dtype=dtype)
    segment = make_segment(case, policy)
    promised = policy.compactor.workspace(case.shape)
    peak = peak_allocated(lambda: policy.compactor.compact(segment, case.slots))

    assert peak <= promised <= 2 * peak + 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", built_in()[:-1], ids=lambda policy: policy.name)
def test_a_probe_in_many_parts_takes_no_more_workspace(policy: Policy, dtype: torch.dtype) -> None:
    """Hundreds of parts with weights of their own, as a pattern makes them."""
    assert policy.compactor is not None
    case = replace(HALVED, dtype=dtype, weights=tuple(1.0 + part % 3 for part in range(HALVED.queries // 2)))
    segment = make_segment(case, policy)

    peak = peak_allocated(lambda: policy.compactor.compact(segment, case.slots))

    assert peak <= policy.compactor.workspace(case.shape)


@pytest.mark.parametrize("queries", [256, 4096])
def test_the_workspace_does_not_grow_with_the_queries(queries: int) -> None:
    """Four bytes a query vector, and never queries x slots: 1.3 MB at 512 slots, whatever the probe."""
    shape = replace(HALVED, queries=queries).shape

    assert AttentionMatching().workspace(shape) <= 1_300_000 + 4 * shape.group * queries


def clustered(seed: int, slots: int = 96) -> tuple[Segment, torch.Tensor]:
    """A segment whose keys form clusters, as real ones do, and queries that its fit has not seen."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 16, generator=generator) * 1.5
    pick = torch.randint(12, (slots,), generator=generator)
    keys = centres[pick] + 0.3 * torch.randn(slots, 16, generator=generator)
    values = torch.randn(12, 8, generator=generator)[pick] + 0.3 * torch.randn(slots, 8, generator=generator)
    aims = torch.randint(12, (2 * 320,), generator=generator)
    queries = (centres[aims] + torch.randn(2 * 320, 16, generator=generator)).reshape(2, 320, 16)
    positions = torch.arange(slots, dtype=torch.int32)
    head = HeadSegment(keys, values, torch.zeros(slots), positions)
    segment = Segment(0, (head,), (Reference(queries[:, :256]),), 0.25, torch.Generator(), 0)
    return segment, queries[:, 256:]


def compacted(segment: Segment, count: int, compactor: AttentionMatching) -> tuple[HeadSegment, torch.Tensor]:
    """The head after a compaction as the memory would commit it, and the kept indices."""
    head = segment.heads[0]
    result = compactor.compact(segment, [count]).heads[0]
    assert result.bias is not None
    assert result.values is not None
    return HeadSegment(head.keys[result.kept], result.values, result.bias, head.positions[result.kept]), result.kept


def errors(head: HeadSegment, whole: HeadSegment, queries: torch.Tensor, scale: float) -> tuple[float, float]:
    """Relative output error and mean log-mass error against the oracle."""
    asked = queries.flatten(0, 1).tolist()
    mass, expected_mass = (oracle.log_mass(asked, h.keys.tolist(), h.bias.tolist(), scale) for h in (head, whole))
    out, expected = (
        torch.tensor(oracle.output(asked, h.keys.tolist(), h.bias.tolist(), h.values.tolist(), scale))
        for h in (head, whole)
    )
    gap = [abs(a - b) for a, b in zip(mass, expected_mass, strict=True)]
    return float((out - expected).norm() / expected.norm()), sum(gap) / len(gap)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("old_bias", [0.0, 2.0])
def test_attention_matching_beats_evicting_the_same_slots(seed: int, old_bias: float) -> None:
    """On held-out queries output and mass errors fall by a quarter and more against plain β and own values.

    With an old β of 2 too: a β that is not carried leaves a log-mass error of about 2.
    """
    segment, unseen = clustered(seed)
    whole = replace(segment.heads[0], bias=segment.heads[0].bias + old_bias)
    segment = replace(segment, heads=(whole,))
    fitted, kept = compacted(segment, 32, AttentionMatching())
    evicted = HeadSegment(whole.keys[kept], whole.values[kept], whole.bias[kept], whole.positions[kept])
    output, mass = errors(fitted, whole, unseen, segment.scale)
    output_evicted, mass_evicted = errors(evicted, whole, unseen, segment.scale)

    assert output <= 0.75 * output_evicted
    assert mass <= 0.6 * mass_evicted


def test_merging_duplicates_loses_nothing() -> None:
    """Where every dropped slot repeats a kept one, β rises by log 2, and mass and output stay within 1 %."""
    segment, unseen = clustered(0, slots=24)
    head, (queries,) = segment.heads[0], segment.queries(0)
    twice = HeadSegment(head.keys.repeat(2, 1), head.values.repeat(2, 1), torch.zeros(48), torch.arange(48))
    whole = LocalAttention((queries,), twice.keys, twice.bias, segment.scale, 64)
    kept = whole.over(head.keys, head.bias)
    mass = fit_mass(kept, importance(whole).log_mass, ridge=1e-4, bound=3.0, steps=2)
    kept = kept.over(head.keys, mass.value)
    values = fit_values(whole, kept, twice.values, head.values, ridge=1e-4, bound=2.0).value
    merged = HeadSegment(head.keys, values, mass.value, head.positions)

    assert max(errors(merged, twice, unseen, segment.scale)) < 0.01
    torch.testing.assert_close(mass.value, torch.full((24,), 2.0).log(), atol=0.05, rtol=0)


def test_a_slot_with_hardly_any_evidence_outlives_six_compactions() -> None:
    """A slot with a millionth of the mass keeps its β to 0.05 over six fits; unanchored, β falls by 3 each time."""
    segment, _ = clustered(0)
    head, (queries,) = segment.heads[0], segment.queries(0)
    keys, facing = head.keys.clone(), queries.clone()
    facing[..., 0] = 4.0
    keys[-1] = 0.0
    keys[-1, 0] = -7.0
    compactor = AttentionMatching()
    whole = LocalAttention((facing,), keys, torch.zeros(96), segment.scale, 64)
    share = whole.weights(facing[0])[0][:, -1]
    kept, bias = torch.arange(96), torch.zeros(96)
    for _ in range(6):
        whole = whole.over(keys[kept], bias)
        log_mass = importance(whole).log_mass
        stay = torch.arange(len(kept))[8:] if len(kept) > 16 else torch.arange(len(kept))
        fit = fit_mass(
            whole.over(whole.keys[stay], bias[stay]),
            log_mass,
            ridge=compactor.ridge_mass,
            bound=compactor.beta_bound,
            steps=compactor.steps,
        )
        kept, bias = kept[stay], bias[stay] + fit.value

    assert 1e-8 < float(share.mean()) < 1e-5
    assert float(bias.max()) > 0.5
    assert abs(float(bias[-1])) < 0.05


def test_a_part_of_weight_three_counts_like_three_parts() -> None:
    """Which slots stay, β and values are those of a mixture in which the part is there three times."""
    segment, _ = clustered(1)
    (queries,) = segment.queries(0)
    first, rest = queries[:, :64], queries[:, 64:]
    heavy = replace(segment, references=(Reference(first, 3.0), Reference(rest)))
    often = replace(segment, references=(*[Reference(first)] * 3, Reference(rest)))
    (one, kept), (other, same), (_, plain) = (
        compacted(each, 32, AttentionMatching()) for each in (heavy, often, segment)
    )

    assert kept.tolist() == same.tolist() != plain.tolist()
    torch.testing.assert_close(one.bias, other.bias, atol=1e-3, rtol=0)
    torch.testing.assert_close(one.values, other.values, atol=1e-3, rtol=0)


def test_a_head_that_may_keep_all_is_left_as_it_is() -> None:
    """Nothing is fitted where nothing is dropped: β, values and keys stay the memory's own."""
    policy = am_halving()
    assert policy.compactor is not None
    case = Case("one full head", held=(20, 20), slots=(20, 10))
    first, second = policy.compactor.compact(make_segment(case, policy), case.slots).heads

    assert first.kept.tolist() == list(range(20))
    assert (first.bias, first.values, first.keys) == (None, None, None)
    assert second.bias is not None


def test_a_refused_fit_is_in_the_numerics() -> None:
    """One query that all slots answer alike leaves nothing to fit; the report says which head kept plain β."""
    head = HeadSegment(torch.zeros(4, 2), torch.ones(4, 2), torch.zeros(4), torch.arange(4))
    far = HeadSegment(torch.tensor([[0.0], [0.0], [200.0]]), torch.eye(3), torch.zeros(3), torch.arange(3))
    segment = Segment(0, (far,), (Reference(torch.ones(1, 1, 1)),), 1.0, torch.Generator(), 0)
    numerics = AttentionMatching().compact(segment, [1]).numerics
    segment = Segment(0, (head,), (Reference(torch.ones(1, 1, 2)),), 1.0, torch.Generator(), 0)
    merged = AttentionMatching().compact(segment, [2])

    assert numerics.fallbacks == (
        "head 0: plain β kept, no fit was better",
        "head 0: own values kept, no fit was better",
    )
    assert merged.numerics.fallbacks == ("head 0: own values kept, no fit was better",)


def test_attention_matching_refuses_a_segment_without_queries() -> None:
    """No reference queries, or none of them, is an error with the remedy."""
    policy = am_halving()
    segment = make_segment(Case("no queries", queries=0), policy)

    with pytest.raises(ValueError, match="0 reference queries"):
        AttentionMatching().compact(segment, [20, 20, 20])
    with pytest.raises(ValueError, match="no reference queries"):
        AttentionMatching().compact(replace(segment, references=()), [20, 20, 20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": "echo"}, "probe: 'echo' is unknown; choose from replay, repeat, spread"),
        ({"probe_tokens": 0}, "probe_tokens: 0 is too few or no whole number; give at least 1"),
        ({"score": "sum"}, "score: 'sum' is unknown; choose one of rms, max, mean"),
        ({"ridge_mass": 0.0}, "ridge_mass: 0.0 is not a positive number"),
        ({"ridge_values": float("nan")}, "ridge_values: nan is not a positive number"),
        ({"beta_bound": -1.0}, "beta_bound: -1.0 is not a positive number"),
        ({"steps": -1}, "steps: -1 is negative"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    """The message names the option, its value and what would do."""
    with pytest.raises(ValueError, match=message):
        am_halving(**options)


def test_window_keeps_the_most_recent_slots() -> None:
    """The last slots of every head stay, unchanged."""
    policy = window()
    assert policy.compactor is not None
    case = Case("ragged", held=(6, 9), slots=(2, 4))
    heads = policy.compactor.compact(make_segment(case, policy), case.slots).heads

    assert [head.kept.tolist() for head in heads] == [[4, 5], [5, 6, 7, 8]]
    assert all(head.bias is None and head.values is None for head in heads)


def test_heavy_hitters_keep_the_most_attended_slots_and_the_newer_of_equals() -> None:
    """The score accumulators decide; position decides between equal ones."""
    policy = heavy_hitters()
    assert policy.scores == "received"
    assert policy.compactor is not None
    segment = make_segment(Case("one head", held=(5,), slots=(3,)), policy)
    head = replace(segment.heads[0], scores=torch.tensor([2.0, 1.0, 5.0, 1.0, 1.0]))
    heads = policy.compactor.compact(replace(segment, heads=(head,)), [3]).heads

    assert heads[0].kept.tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="no score accumulators"):
        policy.compactor.compact(replace(segment, heads=(replace(head, scores=None),)), [3])


def test_full_never_compacts() -> None:
    """There is no compactor to call."""
    assert full().compactor is None
    assert full().budgets is None


total_slots = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)


@given(held=total_slots.map(tuple), total=st.integers(0, 400))
def test_uniform_budgets_are_a_water_level(held: tuple[tuple[int, ...], ...], total: int) -> None:
    """The sum is exact, nobody gets more than it holds, and heads below their holdings differ by one slot at most."""
    allocated = sum(Uniform().allocate(BudgetRequest(held, total, 1)), ())
    flat = sum(held, ())
    level = max(allocated)

    assert sum(allocated) == min(total, sum(flat))
    assert all(given <= most for given, most in zip(allocated, flat, strict=True))
    assert all(given == most or given >= level - 1 for given, most in zip(allocated, flat, strict=True))


def test_uniform_deals_the_surplus_of_a_short_head_to_the_others() -> None:
    """A head that holds 3 keeps 3, and the other three share the rest; the shape is the model's."""
    assert Uniform().allocate(BudgetRequest(((3, 40), (40, 40)), 48, 1)) == ((3, 15), (15, 15))
