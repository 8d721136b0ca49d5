"""The policies that score slots and evict the rest: their invariants, and their scores against float64 oracles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from agentmem.contracts import BudgetRequest, Policy, Reference, Segment
from agentmem.policies.compactors.eviction import Eviction, Observation
from agentmem.policies.g_kv import GlobalScore, g_kv
from agentmem.policies.head_roles import HeadRoles, head_roles
from agentmem.policies.heavy_hitters import heavy_hitters
from agentmem.policies.key_norm import ShortestKeys, key_norm
from agentmem.policies.keydiff import Distinctive, keydiff
from agentmem.policies.merge import Merging, merge
from agentmem.policies.r_kv import NonRedundant, r_kv
from agentmem.policies.random_subset import random_subset
from agentmem.policies.snapkv import PooledVotes, snapkv
from agentmem.policies.tova import LastQuery, tova
from agentmem.policies.window import window
from agentmem.testing import Case, check_policy, make_segment, peak_allocated
from oracles import eviction as oracle
from support.eviction_problems import PROBLEMS, TINY, Problem, asked, eviction

FACTORIES: dict[str, Callable[..., Policy]] = {
    "snapkv": snapkv,
    "tova": tova,
    "keydiff": keydiff,
    "key-norm": key_norm,
    "r-kv": r_kv,
    "g-kv": g_kv,
    "head-roles": head_roles,
    "random-subset": random_subset,
    "heavy-hitters": heavy_hitters,
    "merge": merge,
}
POLICIES = [make() for make in FACTORIES.values()]
VARIANTS = [
    snapkv(window=4, kernel=1, pool="mean"),
    r_kv(mix=0.5, spared=3),
    g_kv(decay=1, spared=0),
    merge(rest="nearest", weigh="tokens"),
]


def ids(policy: Policy) -> str:
    """Its name."""
    return policy.name


# ---- invariants


@pytest.mark.parametrize("policy", POLICIES + VARIANTS, ids=ids)
def test_every_eviction_keeps_the_laws(policy: Policy) -> None:
    """No invariant of Compactor or Budgets is broken on any case."""
    check_policy(policy).raise_if_broken()


@pytest.mark.parametrize("name", FACTORIES)
def test_every_eviction_can_be_dealt_global_budgets(name: str) -> None:
    """The factory takes budgets by name, and the survey serves those that look at scores; a wrong name is refused."""
    policy = FACTORIES[name](budgets="global")
    assert policy.budgets is not None
    assert policy.budgets.needs_survey
    assert policy.name == name
    segment = make_segment(Case("ragged", held=(12, 3, 9), slots=(1, 1, 1), queries=4), policy)
    survey = eviction(policy).survey(segment)

    allocated = policy.budgets.allocate(BudgetRequest(((12, 3, 9),), 12, 1, (survey,)))
    assert sum(allocated[0]) == 12
    assert all(float(scores.min()) >= 0 for scores in survey.scores)
    with pytest.raises(ValueError, match="budgets: 'globel' is unknown; did you mean 'global'"):
        FACTORIES[name](budgets="globel")


def test_window_has_no_scores_to_deal_by() -> None:
    """Budgets that look at scores are refused with the reason; others are taken."""
    assert window(budgets="pyramid").budgets is not None
    with pytest.raises(ValueError, match="MostRecent has no survey; use uniform budgets"):
        window(budgets="global")


@pytest.mark.parametrize(("queries", "dtype"), [(16, torch.float32), (1024, torch.bfloat16)])
@pytest.mark.parametrize("policy", POLICIES, ids=ids)
def test_the_workspace_is_at_most_twice_what_is_used(policy: Policy, queries: int, dtype: torch.dtype) -> None:
    """The promise bounds compaction and survey, and does not waste the user's cap."""
    case = Case("halved", (512,) * 3, (256,) * 3, queries=queries, key_dim=64, value_dim=64, dtype=dtype)
    segment = make_segment(case, policy)
    promised = eviction(policy).workspace(case.shape)
    compacting = peak_allocated(lambda: eviction(policy).compact(segment, case.slots))
    surveying = peak_allocated(lambda: eviction(policy).survey(segment))

    assert max(compacting, surveying) <= promised <= 2 * max(compacting, surveying) + 2048


@pytest.mark.parametrize("policy", POLICIES, ids=ids)
def test_the_workspace_grows_with_neither_queries_times_slots_nor_slots_squared(policy: Policy) -> None:
    """At 8,192 slots and 65,536 queries: under 1,800 bytes a slot, where a matrix would take 32 KB a slot and more."""
    shape = replace(Case("long", (8192,), (4096,), queries=2**14, key_dim=64, value_dim=64).shape, group=4)

    assert eviction(policy).workspace(shape) <= 8192 * 1800 + 8 * 2**16 + 2**19


@pytest.mark.parametrize("policy", POLICIES, ids=ids)
def test_a_head_that_holds_nothing_is_surveyed_and_compacted(policy: Policy) -> None:
    """An empty segment has no scores and keeps no slot; the other heads are as they were."""
    case = Case("one empty", held=(6, 0, 6, 6), slots=(3, 0, 3, 6), queries=2)
    segment = make_segment(case, policy)

    assert [len(scores) for scores in eviction(policy).survey(segment).scores] == [6, 0, 6, 6]
    assert [len(head.kept) for head in eviction(policy).compact(segment, case.slots).heads] == [3, 0, 3, 6]


def test_an_eviction_without_queries_says_so() -> None:
    """No tokens in the references, or none at all, is an error with the remedy."""
    segment = make_segment(Case("no queries", queries=0), tova())

    with pytest.raises(ValueError, match="0 reference queries: LastQuery needs at least 1"):
        LastQuery().compact(segment, [20, 20, 20])
    with pytest.raises(ValueError, match="no reference queries"):
        LastQuery().compact(replace(segment, references=()), [20, 20, 20])


# ---- scores against the oracles


def check(
    compactor: Eviction,
    problem: Problem,
    expected: Callable[[Segment, int], Sequence[float]],
    *,
    shifted: bool = False,
) -> None:
    """Scores equal the oracle's, ``shifted`` by a constant of the head or not, and both keep the same slots."""
    segment = problem.segment()
    count = (problem.slots + 1) // 2
    survey = compactor.survey(segment)
    compacted = compactor.compact(segment, [count] * problem.heads)
    for index in range(problem.heads):
        found = survey.scores[index].double()
        wanted = torch.tensor(expected(segment, index), dtype=torch.float64)
        shift = (found - wanted).mean() if shifted else 0.0
        torch.testing.assert_close(found, wanted + shift, rtol=2e-5, atol=2e-6)
        kept = compacted.heads[index].kept
        # Float32 may decide near ties differently: what is kept scores no less than what is not, up to rounding.
        dropped = torch.ones(problem.slots, dtype=torch.bool)
        dropped[kept] = False
        if bool(dropped.any()):
            assert float(wanted[kept].min()) >= float(wanted[dropped].max()) - 5e-6


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize(("kernel", "pool"), [(1, "max"), (5, "max"), (7, "mean")])
def test_snapkv_scores_are_the_pooled_mean_weights(problem: Problem, kernel: int, pool: str) -> None:
    """SnapKV, section 4: votes of the window, pooled over neighbouring slots."""
    compactor = PooledVotes(kernel=kernel, pool=pool, block_bytes=TINY)  # type: ignore[arg-type]  # a parameter

    check(compactor, problem, lambda s, h: oracle.pooled(oracle.mean_weights(*asked(s, h)), kernel, pool))


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_tova_scores_are_the_mean_weights(problem: Problem) -> None:
    """TOVA, section 4: the attention of the queries at hand, averaged over the group; merging surveys the same."""
    check(LastQuery(block_bytes=TINY), problem, lambda s, h: oracle.mean_weights(*asked(s, h)))
    segment = problem.segment()

    pairs = zip(Merging(block_bytes=TINY).survey(segment).scores, LastQuery().survey(segment).scores, strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_keydiff_scores_are_the_distance_from_the_anchor(problem: Problem) -> None:
    """KeyDiff: minus the cosine with the mean of the normalised keys, plus one."""
    check(Distinctive(), problem, lambda s, h: [1 + score for score in oracle.keydiff(asked(s, h)[1])])


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_key_norm_scores_are_inverse_lengths(problem: Problem) -> None:
    """The mean length of the head's keys over the key's own."""

    def expected(segment: Segment, index: int) -> list[float]:
        lengths = [oracle.norm(key) for key in asked(segment, index)[1]]
        return [sum(lengths) / len(lengths) / length for length in lengths]

    check(ShortestKeys(), problem, expected)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("spared", [0, 1, 3])
def test_r_kv_scores_are_equation_7_shifted(problem: Problem, spared: int) -> None:
    """R-KV, sections 3.2 to 3.4; a constant of the head more, and never negative."""
    compactor = NonRedundant(mix=0.3, kernel=3, threshold=0.6, spared=spared, block_bytes=TINY)

    check(compactor, problem, lambda s, h: oracle.r_kv(*asked(s, h), 0.3, 3, 0.6, spared), shifted=True)
    assert all(float(scores.min()) >= 0 for scores in compactor.survey(problem.segment()).scores)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_g_kv_scores_mix_the_global_score_with_what_is_not_redundant(problem: Problem) -> None:
    """G-KV, equation 3, and R-KV's redundancy scaled to 1; what is carried on is the global score alone."""
    compactor = GlobalScore(decay=0.7, mix=0.4, threshold=0.6, block_bytes=TINY)

    def carried(segment: Segment, index: int) -> list[float]:
        before = segment.heads[index].scores
        assert before is not None
        return oracle.g_kv(*asked(segment, index), before.tolist(), 0.7)

    def expected(segment: Segment, index: int) -> list[float]:
        repeated = oracle.redundancy(asked(segment, index)[1], 0.6, 1)
        return [0.6 + score for score in oracle.g_kv_mixed(carried(segment, index), repeated, 0.4)]

    check(compactor, problem, expected)
    segment = problem.segment()
    for index, head in enumerate(compactor.compact(segment, [(problem.slots + 1) // 2] * problem.heads).heads):
        assert head.scores is not None
        wanted = torch.tensor(carried(segment, index))[head.kept]
        torch.testing.assert_close(head.scores, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_head_roles_scores_are_the_mean_pooled_weights(problem: Problem) -> None:
    """Task-KV, section IV-B: middle activations have the most attention from the window."""
    compactor = HeadRoles(kernel=5, block_bytes=TINY)

    check(compactor, problem, lambda s, h: oracle.pooled(oracle.mean_weights(*asked(s, h)), 5, "mean"))


@pytest.mark.parametrize("policy", [snapkv(), r_kv(), g_kv()], ids=ids)
def test_blocks_of_any_size_give_the_same_scores(policy: Policy) -> None:
    """32 rows at a time or all at once: equal up to rounding."""
    compactor = eviction(policy)
    assert isinstance(compactor, Observation)
    segment = Problem("long", slots=130, tokens=100).segment()
    whole = replace(compactor, block_bytes=2**24).survey(segment).scores

    for one, other in zip(replace(compactor, block_bytes=TINY).survey(segment).scores, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", [snapkv(), r_kv(), g_kv()], ids=ids)
def test_a_part_of_weight_two_counts_like_one_given_twice(policy: Policy) -> None:
    """Weights of reference queries are multiplicities."""
    segment = Problem("parts", tokens=12).segment()
    queries = segment.references[0].queries
    first, second = queries[:, :5], queries[:, 5:]
    weighted = replace(segment, references=(Reference(first, 2.0), Reference(second, 1.0)))
    repeated = replace(segment, references=(Reference(torch.cat([first, first, second], dim=1)),))

    pairs = zip(*(eviction(policy).survey(each).scores for each in (weighted, repeated)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# ---- options


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (snapkv, {"window": 0}, "window: 0 tokens are too few or no whole number; give at least 1"),
        (snapkv, {"kernel": 4}, "kernel: 4 is not an odd number of slots"),
        (snapkv, {"kernel": -1}, "kernel: -1 is not an odd number of slots"),
        (snapkv, {"pool": "median"}, "pool: 'median' is unknown; choose one of max, mean"),
        (r_kv, {"window": 0}, "window: 0 tokens are too few"),
        (r_kv, {"mix": 1.5}, "mix: 1.5 is not a share; give a number from 0 to 1"),
        (r_kv, {"kernel": 2}, "kernel: 2 is not an odd number"),
        (r_kv, {"threshold": 0.0}, "threshold: 0.0 is not a positive cosine"),
        (r_kv, {"spared": -1}, "spared: -1 is negative"),
        (g_kv, {"window": 0}, "window: 0 tokens are too few"),
        (g_kv, {"decay": -0.1}, "decay: -0.1 is not a share"),
        (g_kv, {"mix": float("nan")}, "mix: nan is not a share"),
        (g_kv, {"threshold": 1.1}, "threshold: 1.1 is not a positive cosine"),
        (g_kv, {"spared": -1}, "spared: -1 is negative"),
        (head_roles, {"window": 0}, "window: 0 tokens are too few"),
        (head_roles, {"share": 2.0}, "share: 2.0 is not a share"),
        (head_roles, {"kernel": 6}, "kernel: 6 is not an odd number"),
        (head_roles, {"vector_slots": 0}, "vector_slots: 0 make no semantic vector"),
        (merge, {"window": 0}, "window: 0 tokens are too few"),
        (merge, {"threshold": 1.5}, "threshold: 1.5 is not a cosine"),
        (merge, {"weigh": "slots"}, "weigh: 'slots' is unknown; choose one of attention, tokens"),
        (merge, {"rest": "keep"}, "rest: 'keep' is unknown; choose one of evict, nearest"),
    ],
)
def test_options_that_cannot_work_are_refused(
    make: Callable[..., Policy], options: dict[str, object], message: str
) -> None:
    """The message names the option, its value and what would do."""
    with pytest.raises(ValueError, match=message):
        make(**options)
