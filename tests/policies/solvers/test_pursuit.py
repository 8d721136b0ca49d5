"""Orthogonal matching pursuit against an oracle in plain loops, its invariants, and what a Gram could have lost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.mass import fit_mass
from agentmem.policies.solvers.pursuit import EXACT, FAST, PROGRESSIVE, Pursued, Schedule, pursue, pursuit_bytes
from agentmem.policies.solvers.pursuit import relative_gram as summed
from agentmem.policies.solvers.selection import importance, top
from agentmem.policies.solvers.solution import Outcome, Solution
from agentmem.testing import peak_allocated
from oracles import matching
from oracles import pursuit as oracle


@dataclass(frozen=True)
class Problem:
    """A segment and its queries ``[group, n, d]``."""

    queries: torch.Tensor
    keys: torch.Tensor
    bias: torch.Tensor
    scale: float = 0.5

    def attention(self, rows: int = 7) -> LocalAttention:
        """Over all slots."""
        return LocalAttention((self.queries,), self.keys, self.bias, self.scale, rows)

    def pursue(
        self, count: int, schedule: Schedule = FAST, **options: float | torch.Tensor | None
    ) -> Solution[Pursued]:
        """With the log mass of the whole segment."""
        attention = self.attention()
        return pursue(attention, importance(attention).log_mass, count, schedule=schedule, **options)  # type: ignore[arg-type]  # options by name

    def design(self) -> matching.Matrix:
        """Φ in float64."""
        queries = self.queries.flatten(0, 1).double().tolist()
        keys = self.keys.double().tolist()
        return matching.relative_mass(queries, keys, self.bias.double().tolist(), list(range(len(keys))), self.scale)


def problem(name: str, slots: int = 14) -> Problem:
    """A named problem: slots of width 4, two query heads of 9 tokens."""
    generator = torch.Generator().manual_seed(23)
    queries, keys = torch.randn(2, 9, 4, generator=generator), torch.randn(slots, 4, generator=generator)
    bias = torch.zeros(slots)
    if name == "old bias":
        bias = torch.randn(slots, generator=generator)
    if name == "one query":
        queries = queries[:1, :1]
    if name == "fewer queries than slots":
        queries = queries[:, :3]
    if name == "equal queries":
        queries = queries[:1, :1].repeat(2, 9, 1)
    if name == "duplicate keys":
        keys[slots // 2 :] = keys[: slots - slots // 2]
    if name == "huge logits":
        keys = keys * 1e3
    if name == "bfloat16":
        queries = queries.bfloat16()
    return Problem(queries, keys, bias)


PROBLEMS = (
    "well posed",
    "old bias",
    "one query",
    "fewer queries than slots",
    "equal queries",
    "duplicate keys",
    "huge logits",
    "bfloat16",
)
DISTINCT = ("well posed", "old bias", "fewer queries than slots", "bfloat16")
"""Problems in which no two slots are equally good, so that the choice is not decided by rounding."""


def squared_error(rows: matching.Matrix, found: Solution[Pursued], log_weights: torch.Tensor | None = None) -> float:
    """``|Φ w - 1|²`` in float64."""
    point = [0.0] * len(rows[0])
    weights = found.value.log_weights if log_weights is None else log_weights
    for slot, weight in zip(found.value.kept.tolist(), weights.double().exp().tolist(), strict=True):
        point[slot] = weight
    return oracle.squared_error(rows, [1.0] * len(rows), point)


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("schedule", [EXACT, Schedule(2, 2), PROGRESSIVE])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_pursuit_is_the_greedy_choice_with_an_exact_fit(name: str, schedule: Schedule, count: int) -> None:
    """Slots and weights are those of the plain loops; the weights to float32's rounding over the ridge."""
    given = problem(name)
    found = given.pursue(count, schedule, ridge=1e-2, bound=7.0, cutoff=None)
    batch = schedule.choose * schedule.refit_every
    rows = given.design()
    kept, weights = oracle.pursue(rows, [1.0] * len(rows), count, batch, ridge=1e-2, bound=7.0)

    assert found.value.kept.tolist() == kept
    assert found.outcome is Outcome.SOLVED
    torch.testing.assert_close(found.value.log_weights.exp(), torch.tensor(weights), atol=1e-3, rtol=0)
    expected = math.sqrt(
        oracle.squared_error(rows, [1.0] * len(rows), _spread(kept, weights, len(rows[0]))) / len(rows)
    )
    assert found.stats["error"] == pytest.approx(expected, abs=1e-3)


def _spread(kept: list[int], weights: list[float], slots: int) -> list[float]:
    point = [0.0] * slots
    for slot, weight in zip(kept, weights, strict=True):
        point[slot] = weight
    return point


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("count", [0, 1, 6, 14, 20])
def test_exactly_count_slots_stay_and_all_is_finite(name: str, count: int) -> None:
    """Ascending indices of min(count, T) slots with finite updates within the bound, whatever the problem."""
    found = problem(name).pursue(count, bound=3.0, cutoff=-3.0)
    kept = found.value.kept.tolist()

    assert kept == sorted(set(kept))
    assert len(kept) == min(count, 14)
    assert found.value.log_weights.dtype == torch.float32
    assert bool((found.value.log_weights.abs() <= 3.0001).all())
    assert math.isfinite(found.stats["error"])


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("schedule", [EXACT, FAST, PROGRESSIVE])
def test_an_accepted_fit_beats_plain_weights_on_the_same_slots(name: str, schedule: Schedule) -> None:
    """The squared mass error on the fitting queries is smaller than that of w = 1, or the update is 0."""
    given = problem(name)
    found = given.pursue(6, schedule)
    rows = given.design()
    plain = squared_error(rows, found, torch.zeros(6))

    if found.accepted:
        assert squared_error(rows, found) < plain
        assert found.stats["error"] == pytest.approx(math.sqrt(squared_error(rows, found) / len(rows)), abs=1e-3)
    else:
        assert torch.equal(found.value.log_weights, torch.zeros(6))


def test_r_steps_of_k_slots_are_one_step_of_their_product() -> None:
    """Between two fits the residual stands still, so only the product of the two numbers counts."""
    given = problem("well posed", slots=60)

    assert torch.equal(given.pursue(30, Schedule(4, 2)).value.kept, given.pursue(30, Schedule(8, 1)).value.kept)
    assert given.pursue(30, Schedule(4, 2), cutoff=None).stats["fits"] == 4
    assert given.pursue(30, Schedule(1, 1, growth=1.0), cutoff=None).stats["fits"] == 6  # 1 + 1 + 2 + 4 + 8 + 14
    assert [PROGRESSIVE.batch(chosen) for chosen in (0, 8, 16, 80)] == [1, 1, 2, 10]


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (1, 1, -0.5), (1, 1, math.inf)])
def test_a_schedule_that_never_ends_is_refused(numbers: tuple[int, int]) -> None:
    """Nothing to choose, or a negative growth, raises with the values."""
    with pytest.raises(ValueError, match="would choose nothing"):
        Schedule(*numbers)


def test_equal_slots_go_to_the_newest() -> None:
    """Where all keys are equal, the last ones stay, and they share the mass of all."""
    given = replace(problem("well posed"), keys=torch.ones(14, 4))
    found = given.pursue(4, EXACT, ridge=1e-3)

    assert found.value.kept.tolist() == [10, 11, 12, 13]
    torch.testing.assert_close(found.value.log_weights, torch.full((4,), math.log(14 / 4)), atol=1e-2, rtol=0)


def test_one_of_each_kind_is_kept_where_highest_attention_keeps_copies() -> None:
    """Six copies of four keys, four slots: pursuit keeps one copy of each; highest attention one key's copies."""
    generator = torch.Generator().manual_seed(4)
    kinds = torch.randn(4, 4, generator=generator) * 2
    given = Problem(torch.randn(2, 30, 4, generator=generator), kinds.repeat_interleave(6, dim=0), torch.zeros(24))
    found = given.pursue(4, EXACT)
    attended = top(importance(given.attention()).scores, 4)

    assert found.value.kept.tolist() == [5, 11, 17, 23]
    torch.testing.assert_close(found.value.log_weights.exp(), torch.full((4,), 6.0), atol=0.05, rtol=0)
    assert found.stats["error"] < 1e-2
    assert len({slot // 6 for slot in attended.tolist()}) == 1


def test_slots_to_keep_are_kept() -> None:
    """The given indices stay even where pursuit would not choose them, and where their weight is at the cutoff."""
    given = problem("well posed", slots=40)
    free = given.pursue(10)
    unwanted = torch.tensor([slot for slot in range(40) if slot not in free.value.kept.tolist()][:4])
    found = given.pursue(10, keep=unwanted)

    assert set(unwanted.tolist()) <= set(found.value.kept.tolist())
    assert len(found.value.kept) == 10
    only = given.pursue(4, keep=unwanted)
    assert only.value.kept.tolist() == unwanted.tolist()
    with pytest.raises(ValueError, match=r"4 slots must be kept but only 3 may stay.*raise the count"):
        given.pursue(3, keep=unwanted)


def test_slots_at_the_cutoff_make_room_for_others() -> None:
    """Slots whose weight falls to the cutoff are exchanged, the error does not grow, and a held one stays."""
    given = crowd()
    without = given.pursue(24, Schedule(12, 1), ridge=1e-6, cutoff=None)
    found = given.pursue(24, Schedule(12, 1), ridge=1e-6, cutoff=-7.0)
    weak = set(without.value.kept[without.value.log_weights <= -6.99].tolist())
    held = given.pursue(24, Schedule(12, 1), ridge=1e-6, keep=without.value.kept)

    assert len(weak) > 5
    assert without.stats["replaced"] == 0
    assert found.stats["replaced"] >= len(weak)
    assert len(weak & set(found.value.kept.tolist())) < len(weak) / 2
    assert found.stats["error"] < 0.5 * without.stats["error"]
    assert torch.equal(held.value.kept, without.value.kept)
    assert held.stats["replaced"] == 0


def crowd(slots: int = 96, width: int = 3) -> Problem:
    """Many slots in few dimensions: their columns overlap so much that a fit without bounds is negative all over."""
    generator = torch.Generator().manual_seed(9)
    keys, queries = torch.randn(slots, width, generator=generator), torch.randn(2, 150, width, generator=generator)
    return Problem(queries, keys, torch.zeros(slots))


def held_out(given: Problem, found: Solution[Pursued]) -> float:
    """Root mean square error of the log mass on queries that were not fitted."""
    queries = torch.randn(500, given.keys.shape[1], generator=torch.Generator().manual_seed(77)).double()
    logits = queries @ given.keys.double().T * given.scale
    kept = torch.logsumexp(logits[:, found.value.kept] + found.value.log_weights.double(), dim=-1)
    return float((kept - torch.logsumexp(logits, dim=-1)).square().mean().sqrt())


@pytest.mark.parametrize("count", [8, 24, 48])
def test_the_gram_loses_nothing_against_orthogonal_factors(count: int) -> None:
    """On ill-conditioned columns the held-out error is at most 1.1 times that of QR in float64, same schedule.

    The slack of 1e-4 is float32's rounding of the log mass.
    """
    given = crowd()
    found = given.pursue(count, ridge=1e-4, cutoff=None)
    phi = torch.tensor(given.design(), dtype=torch.float64)
    kept, weights = oracle.orthogonal(phi, count, FAST.batch(0), 1e-4 * float(phi.square().sum()) / phi.shape[1])
    expected = replace(found, value=Pursued(kept, weights.log().float()))

    assert float(torch.linalg.cond(phi)) > 1e6
    assert held_out(given, found) <= 1.1 * held_out(given, expected) + 1e-4


def test_pursuit_restores_the_mass_of_unseen_queries_better_than_highest_attention() -> None:
    """On unseen queries its log-mass error is less than half that of the most attended slots with fitted β.

    The segment has 12 kinds of keys, as many slots of each as their number says: what is asked for often fills all.
    """
    generator = torch.Generator().manual_seed(6)
    kinds = torch.randn(12, 8, generator=generator).repeat_interleave(torch.arange(2, 14), dim=0)
    keys = kinds + 0.3 * torch.randn(len(kinds), 8, generator=generator)
    given = Problem(torch.randn(2, 150, 8, generator=generator), keys, torch.zeros(len(keys)))
    attention = given.attention()
    found = importance(attention)
    kept = top(found.scores, 24)
    plain = attention.over(given.keys[kept], given.bias[kept])
    fitted = fit_mass(plain, found.log_mass, ridge=1e-2, bound=3.0, steps=2)
    pursued = given.pursue(24)
    attended = replace(pursued, value=Pursued(kept, fitted.value))

    assert held_out(given, pursued) < 0.5 * held_out(given, attended)


def test_slots_without_evidence_keep_their_weight() -> None:
    """Slots that no query looks at, kept for another reason, keep w = 1."""
    given = problem("well posed")
    facing = given.queries.clone()
    facing[..., 3] = -facing[..., 3].abs() - 1
    keys = given.keys.clone()
    keys[3:5] = torch.tensor([0.0, 0.0, 0.0, 60.0])
    given = Problem(facing, keys, given.bias)
    found = given.pursue(6, keep=torch.tensor([3, 4]))
    away = [place for place, slot in enumerate(found.value.kept.tolist()) if slot in {3, 4}]

    assert found.accepted
    assert float(found.value.log_weights.abs().max()) > 0.1
    torch.testing.assert_close(found.value.log_weights[away], torch.zeros(2), atol=1e-4, rtol=0)


def test_a_query_of_weight_two_counts_like_two() -> None:
    """Weights of queries are repetitions: the Gram, the pull and the choice are the same."""
    given = problem("well posed")
    other = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    once = LocalAttention((given.queries, other), given.keys, given.bias, 0.5, 4)
    twice = LocalAttention((given.queries, other, other), given.keys, given.bias, 0.5, 4)
    weighted = once.weighted([1.0, 2.0])
    log_mass, repeated = importance(once).log_mass, importance(twice).log_mass

    for one, two in zip(summed(weighted, log_mass), summed(twice, repeated), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), rtol=1e-5, atol=1e-6)
    assert torch.equal(pursue(weighted, log_mass, 5).value.kept, pursue(twice, repeated, 5).value.kept)


@pytest.mark.parametrize("slots", [14, 600])
def test_the_gram_is_that_of_the_relative_masses(slots: int) -> None:
    """Summed by blocks of queries and strips of slots, it is symmetric and that of Φ, to float32."""
    given = problem("old bias", slots=slots)
    attention = given.attention()
    gram, pull, total = summed(attention, importance(attention).log_mass)
    phi = torch.tensor(given.design(), dtype=torch.float64)

    assert torch.equal(gram, gram.T)
    assert total == 18
    torch.testing.assert_close(gram.double(), phi.T @ phi, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(pull, phi.sum(dim=0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_blocks_of_any_size_choose_the_same(rows: int) -> None:
    """The choice does not depend on how many queries are visited at a time."""
    given = problem("well posed")
    attention = given.attention(rows)
    found = pursue(attention, importance(attention).log_mass, 6, ridge=1e-2)
    expected = given.pursue(6, ridge=1e-2)

    assert torch.equal(found.value.kept, expected.value.kept)
    torch.testing.assert_close(found.value.log_weights, expected.value.log_weights, atol=1e-3, rtol=0)


def test_no_mass_changes_nothing() -> None:
    """Where the slots have no share of the mass, the newest stay as they are and the fit says that it was refused."""
    given = problem("well posed")
    found = pursue(given.attention(), torch.full((18,), 1e4), 5)

    assert found.value.kept.tolist() == [9, 10, 11, 12, 13]
    assert found.outcome is Outcome.REFUSED
    assert torch.equal(found.value.log_weights, torch.zeros(5))


def test_masses_beyond_float32_give_plain_slots() -> None:
    """A log mass far below that of the slots overflows the Gram; the result is finite and refused."""
    given = problem("well posed")
    found = pursue(given.attention(), torch.full((18,), -1e4), 5)

    assert len(found.value.kept) == 5
    assert found.outcome is Outcome.SINGULAR
    assert torch.equal(found.value.log_weights, torch.zeros(5))


@pytest.mark.parametrize(("slots", "count", "queries"), [(14, 6, 9), (300, 150, 100), (300, 20, 100), (64, 64, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_working_memory_is_stated(slots: int, count: int, queries: int, dtype: torch.dtype) -> None:
    """No more is allocated than :func:`pursuit_bytes` says, and no queries x slots matrix exists."""
    generator = torch.Generator().manual_seed(3)
    parts = torch.randn(3, queries, 16, generator=generator).to(dtype)
    attention = LocalAttention((parts,), torch.randn(slots, 16, generator=generator), torch.zeros(slots), 0.25, 32)
    log_mass = importance(attention).log_mass
    keep = torch.arange(count // 2)
    peak = max(
        peak_allocated(lambda: pursue(attention, log_mass, count)),
        peak_allocated(lambda: pursue(attention, log_mass, count, keep=keep, bound=0.5, cutoff=-0.5)),
    )

    assert peak <= pursuit_bytes(slots, count, 32, 16)


def test_pursuit_at_its_size_needs_half_of_the_masses() -> None:
    """For 3,072 queries and 1,024 slots, 512 of them kept, less is needed than 0.6 of Φ in float32."""
    assert pursuit_bytes(1024, 512, 128, 64) < 0.6 * 4 * 3072 * 1024
