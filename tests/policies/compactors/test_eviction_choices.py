"""What the evictions and the merging policy keep, and why each exists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agentmem.contracts import BudgetRequest, HeadSegment, Reference, Segment
from agentmem.policies.g_kv import GlobalScore, g_kv
from agentmem.policies.head_roles import HeadRoles, head_roles, heterogeneous
from agentmem.policies.heavy_hitters import heavy_hitters
from agentmem.policies.key_norm import ShortestKeys, key_norm
from agentmem.policies.keydiff import Distinctive, keydiff
from agentmem.policies.merge import Merging, merge
from agentmem.policies.r_kv import NonRedundant, r_kv
from agentmem.policies.random_subset import ByLot, random_subset
from agentmem.policies.snapkv import PooledVotes, snapkv
from agentmem.policies.solvers.redundancy import redundancy
from agentmem.policies.tova import LastQuery, tova
from agentmem.testing import Case, make_segment
from oracles import eviction as oracle
from oracles import matching
from support.eviction_problems import PROBLEMS, Problem, asked, eviction, facing, kept


def test_snapkv_keeps_the_neighbours_of_what_is_attended() -> None:
    """Slots around the two peaks stay with the peaks; without pooling the newest of the rest fill up."""
    segment = facing(12, at=[3, 8])

    assert kept(PooledVotes(kernel=3), segment, 6) == [2, 3, 4, 7, 8, 9]
    assert kept(PooledVotes(kernel=1), segment, 6) == [3, 7, 8, 9, 10, 11]


def test_a_window_asks_for_the_newest_tokens() -> None:
    """Live queries, as many as the window has; TOVA asks for one; KeyDiff and key norm for none."""
    asked_for = {make.__name__: make().queries for make in (snapkv, r_kv, g_kv, head_roles, merge, tova)}

    assert {str(queries) for queries in asked_for.values()} == {"live"}
    tokens = {name: queries.tokens for name, queries in asked_for.items()}
    assert tokens == {"snapkv": 32, "r_kv": 8, "g_kv": 16, "head_roles": 32, "merge": 32, "tova": 1}
    assert snapkv(window=5).queries.tokens == 5
    assert not any(make().queries.parts for make in (keydiff, key_norm, random_subset, heavy_hitters))


def test_keydiff_keeps_the_odd_key_and_key_norm_the_short_one() -> None:
    """Among near-equal keys of length 2, one points elsewhere and one is short."""
    keys = torch.tensor([[2.0, 0.0], [2.0, 0.1], [0.0, 2.0], [0.5, 0.0], [2.0, -0.1]])
    head = HeadSegment(keys, keys, torch.zeros(5), torch.arange(5))
    segment = Segment(0, (head,), (), 1.0, torch.Generator(), 0)

    assert kept(Distinctive(), segment, 1) == [2]
    assert kept(ShortestKeys(), segment, 1) == [3]


def test_zero_keys_are_scored() -> None:
    """Keys without a direction or a length give finite scores."""
    head = HeadSegment(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4), torch.arange(4))
    segment = Segment(0, (head,), (), 1.0, torch.Generator(), 0)

    assert kept(Distinctive(), segment, 2) == [2, 3]
    assert kept(ShortestKeys(), segment, 2) == [2, 3]


def test_of_equal_keys_the_last_are_the_least_redundant() -> None:
    """Three equal keys and two others: with one spared the third is blamed by itself alone, with two only the first."""
    keys = torch.tensor([[1.0, 0.0, 0.0]] * 3 + [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    none, one, two, all_ = (redundancy(keys, threshold=0.5, spared=n, block_bytes=2**19) for n in range(4))

    assert none[0] == none[1] == none[2] > none[3] == none[4]
    # The third blames the second, which is the last that is similar to it but itself: so that one is spared once.
    assert one[0] > one[1] > one[2] == one[3]
    assert torch.equal(two, torch.full((5,), 0.2))
    assert torch.equal(all_, two)


def test_r_kv_drops_the_repetitions_that_attention_alone_keeps() -> None:
    """Four copies are attended to equally; attention keeps them all, R-KV the newest of them and other keys."""
    axis = torch.eye(8)
    keys = torch.cat([axis[:1].repeat(4, 1), axis[1:5]]) * 3
    head = HeadSegment(keys, keys, torch.zeros(8), torch.arange(8))
    queries = keys[None, :1] * 2
    segment = Segment(0, (head,), (Reference(queries),), 1.0, torch.Generator(), 0)

    assert kept(LastQuery(), segment, 4) == [0, 1, 2, 3]
    assert kept(NonRedundant(kernel=1), segment, 5) == [3, 4, 5, 6, 7]
    assert kept(NonRedundant(kernel=1, mix=1.0), segment, 4) == [0, 1, 2, 3]


def test_g_kv_remembers_what_the_window_no_longer_attends_to() -> None:
    """Slot 1 was attended to before the last compaction: at a decay of 0.9 it outlives the rest, at 0 it does not."""
    segment = facing(8, at=[5, 6], scores=[0.0, 1.0, *[0.0] * 6])

    assert kept(GlobalScore(decay=0.9, mix=1.0), segment, 3) == [1, 5, 6]
    assert kept(GlobalScore(decay=0.0, mix=1.0), segment, 3) == [5, 6, 7]


def test_g_kv_forgets_by_the_power_of_its_decay() -> None:
    """A score that nothing renews falls by the decay at every compaction; one that is attended to stays 1."""
    compactor = GlobalScore(decay=0.5, mix=1.0)
    column = [0.0, 1.0, *[0.0] * 6]
    for compaction in range(1, 4):
        segment = facing(8, at=[5], scores=column)
        head = compactor.compact(segment, [8]).heads[0]
        assert head.kept.tolist() == list(range(8))
        assert head.scores is not None
        column = head.scores.tolist()
        assert column[1] == pytest.approx(0.5**compaction)
        assert column[5] == pytest.approx(1.0)


def test_g_kv_needs_a_column() -> None:
    """A segment without one is refused, as it is by heavy hitters."""
    assert g_kv().scores == "carried"
    assert heavy_hitters().scores == "received"
    with pytest.raises(ValueError, match="no score column"):
        GlobalScore().compact(facing(4, at=[0]), [2])


def test_a_survey_of_heavy_hitters_holds_no_view_of_the_memory() -> None:
    """A view would keep a replaced store alive, beyond the cap."""
    segment = make_segment(Case("one head", held=(5,), slots=(3,)), heavy_hitters())
    received = segment.heads[0].scores
    assert received is not None
    scores = eviction(heavy_hitters()).survey(segment).scores[0]

    assert torch.equal(scores, received)
    assert scores.data_ptr() != received.data_ptr()


# ---- roles of heads


@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[2], PROBLEMS[4]], ids=lambda problem: problem.name)
def test_the_heads_farthest_from_the_semantic_centre_are_lifted(problem: Problem) -> None:
    """With 8 heads and a share of 0.3: the farthest and the nearest, and their slots rank above all others."""
    segment = replace(problem, heads=8).segment()
    plain = HeadRoles(share=0.3, vector_slots=12)
    scores = plain.survey(segment).scores
    vectors = [
        oracle.semantic_vector(oracle.mean_weights(*asked(segment, index)), head.values.double().tolist(), 12)
        for index, head in enumerate(segment.heads)
    ]
    far = oracle.distances(vectors)
    lifted = [index for index, head_scores in enumerate(scores) if float(head_scores.min()) >= 1]

    assert sorted(lifted) == sorted([far.index(max(far)), far.index(min(far))])
    for index in lifted:
        torch.testing.assert_close(scores[index] - 1, plain.score(segment, index), atol=1e-6, rtol=0)


def test_which_heads_are_heterogeneous() -> None:
    """The farthest first, the nearest last if there are several; a pair has none; a share of 1 takes all."""
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.1], [9.0, 9.0], [0.2, 0.1], [5.0, 0.0]])

    assert heterogeneous(vectors, 0.0) == [3]
    assert heterogeneous(vectors, 0.5) == [3, 0, 1]
    assert sorted(heterogeneous(vectors, 1.0)) == list(range(6))
    assert heterogeneous(vectors[:2], 1.0) == []
    assert heterogeneous(vectors[:1], 1.0) == []


def test_heterogeneous_heads_get_all_they_hold_and_the_others_share_the_rest() -> None:
    """Halving 4 heads of 40 under global budgets: one keeps 40, and no other less than its floor of half a share."""
    policy = head_roles()
    assert policy.budgets is not None
    segment = replace(PROBLEMS[0], heads=4).segment()
    survey = eviction(policy).survey(segment)
    (allocated,) = policy.budgets.allocate(BudgetRequest(((40,) * 4,), 80, 1, (survey,)))
    lifted = [index for index, scores in enumerate(survey.scores) if float(scores.min()) >= 1]

    assert [index for index, given in enumerate(allocated) if given == 40] == lifted
    assert len(lifted) == 1
    assert sum(allocated) == 80
    assert min(allocated) >= 10


def test_roles_without_budgets_that_look_at_scores_are_refused() -> None:
    """Uniform budgets would give every head the same, so a role would mean nothing."""
    with pytest.raises(ValueError, match="budgets: 'uniform' do not look at scores"):
        head_roles(budgets="uniform")


# ---- lots


def test_lots_depend_on_seed_layer_and_head_alone() -> None:
    """The same again, also after other draws; other heads, layers and seeds draw other lots."""
    segment = replace(PROBLEMS[0], heads=3).segment()
    lots = ByLot().survey(segment).scores
    torch.rand(5, generator=segment.generator)

    assert all(map(torch.equal, ByLot().survey(segment).scores, lots))
    assert not torch.equal(lots[0], lots[1])
    assert not torch.equal(ByLot().survey(replace(segment, layer=1)).scores[0], lots[0])
    other = replace(segment, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(ByLot().survey(other).scores[0], lots[0])


def test_lots_are_fair() -> None:
    """Over 600 seeds each of 20 slots is kept half of the time, within five standard deviations."""
    segment = Problem("fair", slots=20, heads=1).segment()
    times = torch.zeros(20)
    for seed in range(600):
        generator = torch.Generator().manual_seed(seed)
        times[kept(ByLot(), replace(segment, generator=generator), 10)] += 1

    assert float((times - 300).abs().max()) <= 5 * (600 * 0.25) ** 0.5


# ---- merging


def twins(seed: int) -> Segment:
    """20 slots of which each of the last ten has the key of one of the first, with a value and a β of its own."""
    segment = replace(PROBLEMS[2], heads=1, slots=10).segment(seed)
    (head,) = segment.heads
    other = replace(PROBLEMS[2], heads=1, slots=10).segment(seed + 100).heads[0]
    doubled = HeadSegment(
        torch.cat([head.keys, head.keys]),
        torch.cat([head.values, other.values]),
        torch.cat([head.bias, other.bias]),
        torch.arange(20, dtype=torch.int32),
    )
    return replace(segment, heads=(doubled,))


@pytest.mark.parametrize("weigh", ["attention", "tokens"])
@pytest.mark.parametrize("seed", range(3))
def test_merging_twins_loses_nothing(seed: int, weigh: str) -> None:
    """Slots of one key become one: mass and output are what they were, for queries that no fit has seen."""
    segment = twins(seed)
    head = segment.heads[0]
    result = Merging(threshold=0.999, weigh=weigh).compact(segment, [10]).heads[0]  # type: ignore[arg-type]  # a parameter
    assert result.bias is not None
    assert result.values is not None
    unseen = torch.randn(9, 8, generator=torch.Generator().manual_seed(7)).tolist()
    before = (head.keys.tolist(), head.bias.tolist())
    after = (head.keys[result.kept].tolist(), result.bias.tolist())

    mass, merged_mass = (matching.log_mass(unseen, *each, segment.scale) for each in (before, after))
    assert merged_mass == pytest.approx(mass, abs=1e-5)
    wanted = torch.tensor(matching.output(unseen, *before, head.values.tolist(), segment.scale))
    found = torch.tensor(matching.output(unseen, *after, result.values.tolist(), segment.scale))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_merging_keeps_the_attended_and_unlike() -> None:
    """Orthogonal keys do not merge, unless any cosine will do: it keeps what SnapKV keeps without pooling, as it is."""
    segment = facing(12, at=[3, 8])
    result = Merging(weigh="tokens").compact(segment, [6]).heads[0]
    anything = Merging(weigh="tokens", threshold=-1.0).compact(segment, [6]).heads[0]
    assert result.bias is not None
    assert result.values is not None
    assert anything.bias is not None

    assert result.kept.tolist() == kept(PooledVotes(kernel=1), segment, 6)
    assert torch.allclose(result.values, segment.heads[0].values[result.kept])
    assert torch.allclose(result.bias, torch.zeros(6), atol=1e-6)
    assert float(anything.bias.exp().sum()) == pytest.approx(12.0, rel=1e-5)


def test_the_nearest_may_take_what_would_leave() -> None:
    """With ``rest="nearest"`` nothing leaves: the weight of 12 tokens is that of the 6 slots that stay."""
    segment = facing(12, at=[3, 8])
    result = Merging(rest="nearest", weigh="tokens").compact(segment, [6]).heads[0]
    assert result.bias is not None

    assert float(result.bias.exp().sum()) == pytest.approx(12.0, rel=1e-5)
