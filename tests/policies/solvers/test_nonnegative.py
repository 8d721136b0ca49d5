"""Bounded least squares against brute force, its conditions, and the problems that break naive solvers."""

from __future__ import annotations

import math

import pytest
import torch

from agentmem.policies.solvers import nonnegative
from agentmem.policies.solvers.nonnegative import FREE, bounded_least_squares, pivoting, pivoting_bytes
from agentmem.policies.solvers.solution import Outcome
from agentmem.testing import peak_allocated
from oracles import matching
from oracles import pursuit as oracle

LOW, HIGH = 0.05, 20.0
KEPT = [0, 2, 3, 5, 8, 9]

PROBLEMS = (
    "well posed",
    "duplicate keys",
    "fewer queries than slots",
    "one query",
    "no mass",
    "huge logits",
    "bfloat16",
)


def design(name: str) -> matching.Matrix:
    """The relative masses of 6 of 10 slots of a named problem: rows are queries."""
    generator = torch.Generator().manual_seed(11)
    count = {"fewer queries than slots": 4, "one query": 1}.get(name, 16)
    queries, keys = torch.randn(count, 4, generator=generator), torch.randn(10, 4, generator=generator)
    if name == "duplicate keys":
        keys[[2, 5, 9]] = keys[[0, 3, 8]]
    if name == "huge logits":
        keys *= 1e3
    if name == "bfloat16":
        queries, keys = queries.bfloat16(), keys.bfloat16()
    rows = matching.relative_mass(queries.double().tolist(), keys.double().tolist(), [0.0] * 10, KEPT, 0.5)
    if name == "no mass":
        rows = [[0.0 if place in {1, 4} else x for place, x in enumerate(row)] for row in rows]
    return rows


def normal(rows: matching.Matrix, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """The Gram and the pull towards a mass of 1."""
    matrix = torch.tensor(rows, dtype=torch.float64)
    return (matrix.T @ matrix).to(dtype), matrix.sum(dim=0).to(dtype)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("ridge", [1e-10, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_point_within_the_bounds_is_better(name: str, ridge: float, dtype: torch.dtype) -> None:
    """The objective is that of the best of all 3^6 vertices, up to the rounding of the Gram's entries."""
    rows = design(name)
    found = bounded_least_squares(*normal(rows, dtype), low=LOW, high=HIGH, ridge=ridge)
    point = found.value.tolist()
    ones = [1.0] * len(rows)
    firm = ridge * oracle.mean_diagonal(oracle.gram(rows))
    best = oracle.objective(rows, ones, oracle.every_vertex(rows, ones, LOW, HIGH, firm), firm)
    # A Gram that is off by e in every entry is off by e |x|² in the objective, for both points.
    rounding = 4 * torch.finfo(dtype).eps * (len(rows) + sum(abs(x) for x in point) ** 2)

    assert found.outcome is Outcome.SOLVED
    assert all(LOW <= x <= HIGH for x in point)
    assert oracle.objective(rows, ones, point, firm) <= best + rounding
    assert found.stats["violation"] <= 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_firm_anchor_makes_the_solution_the_only_one(name: str) -> None:
    """With a ridge of 1e-2 the weights themselves are those of coordinate descent run to its end."""
    rows = design(name)
    matrix, right = oracle.gram(rows), oracle.pull(rows, [1.0] * len(rows))
    firm = 1e-2 * oracle.mean_diagonal(matrix)
    for index in range(len(right)):
        matrix[index][index] += firm
        right[index] += firm
    expected = oracle.coordinate_descent(matrix, right, LOW, HIGH)
    found = bounded_least_squares(*normal(rows), low=LOW, high=HIGH, ridge=1e-2)

    torch.testing.assert_close(found.value, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert found.stats["free"] == sum(LOW < x < HIGH for x in expected)


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_exchange_at_a_time_ends_at_the_same_point(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule for blocks that go round in circles reaches the same solution in no fewer pivots."""
    blocks = bounded_least_squares(*normal(design(name)), low=0.5, high=1.5, ridge=1e-3)
    monkeypatch.setattr(nonnegative, "_PATIENCE", -1)
    single = bounded_least_squares(*normal(design(name)), low=0.5, high=1.5, ridge=1e-3)

    assert single.outcome is Outcome.SOLVED
    assert single.stats["pivots"] >= blocks.stats["pivots"]
    torch.testing.assert_close(single.value, blocks.value, atol=1e-9, rtol=0)


def test_blocks_that_go_round_in_circles_are_exchanged_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this matrix whole blocks never settle; the rule for that case does, at a point that meets the conditions."""
    generator = torch.Generator().manual_seed(2945)
    matrix = torch.randn(3, 3, generator=generator).double()
    gram, pull = matrix.T @ matrix, 3 * torch.randn(3, generator=generator).double()
    found = bounded_least_squares(gram, pull, low=1e-3, high=1e3, ridge=1e-6)
    monkeypatch.setattr(nonnegative, "_PATIENCE", 10**9)
    circling = bounded_least_squares(gram, pull, low=1e-3, high=1e3, ridge=1e-6, most=500)

    assert found.outcome is Outcome.SOLVED
    assert found.stats["violation"] < 1e-12
    assert circling.outcome is Outcome.STOPPED


def large(size: int, rows: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """A problem of overlapping positive columns: the first half of softmax weights over twice as many slots."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(rows, 6, generator=generator) @ torch.randn(6, 2 * size, generator=generator)
    share = (logits.double() / 2).softmax(dim=-1)[:, :size]
    return share.T @ share, share.sum(dim=0)


def test_unknowns_may_come_and_go_between_solves() -> None:
    """A factor that has grown and shrunk gives what a fresh one gives, across panels of unknowns."""
    gram, pull = large(120)
    ridge = 1e-4 * float(gram.diagonal().mean())
    used = pivoting(gram, pull, low=0.2, high=5.0, anchor=1.0, ridge=ridge, capacity=120)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(2))
    for part in (order[:7], order[7:60], order[60:110]):
        used.state[part] = FREE
        assert used.solve(100)
    used.state[order[20:50]] = nonnegative.ABSENT
    assert used.solve(100)
    fresh = pivoting(gram, pull, low=0.2, high=5.0, anchor=1.0, ridge=ridge, capacity=120)
    fresh.state.copy_(torch.where(used.state == nonnegative.ABSENT, nonnegative.ABSENT, FREE))
    assert fresh.solve(100)

    assert int((used.solution != 0).sum()) == 80
    torch.testing.assert_close(used.solution, fresh.solution, atol=1e-9, rtol=0)
    expected = torch.linalg.cond(_free_part(gram, ridge, fresh))
    assert 0.5 * expected <= fresh.factor.condition() <= 1.01 * expected


def _free_part(gram: torch.Tensor, ridge: float, problem: nonnegative.Pivoting) -> torch.Tensor:
    order = problem.factor.order
    return gram[order][:, order] + ridge * torch.eye(len(order), dtype=gram.dtype)


def test_a_float32_gram_is_as_good_as_its_entries() -> None:
    """From a Gram rounded to float32 come weights whose error is that of the float64 Gram's, to 1e-5."""
    gram, pull = large(60)
    exact = bounded_least_squares(gram, pull, low=1e-3, high=1e3, ridge=1e-4)
    rounded = bounded_least_squares(gram.float(), pull.float(), low=1e-3, high=1e3, ridge=1e-4)

    def error(point: torch.Tensor) -> float:
        return math.sqrt(max(0.0, float(point @ gram @ point - 2 * pull @ point) / 300 + 1))

    assert rounded.outcome is Outcome.SOLVED
    assert error(rounded.value) == pytest.approx(error(exact.value), abs=1e-5)


def test_no_evidence_stays_at_the_anchor() -> None:
    """A matrix of zeros, and an unknown whose column is zero, give the anchor, or the bound that is nearest to it."""
    nothing = bounded_least_squares(torch.zeros(3, 3), torch.zeros(3), low=0.5, high=2.0)
    outside = bounded_least_squares(torch.zeros(3, 3), torch.zeros(3), low=1.5, high=2.0)
    gram, pull = normal(design("no mass"))
    part = bounded_least_squares(gram, pull, low=LOW, high=HIGH, anchor=1.25, ridge=1e-6)

    assert nothing.value.tolist() == [1.0, 1.0, 1.0]
    assert outside.value.tolist() == [1.5, 1.5, 1.5]
    torch.testing.assert_close(part.value[[1, 4]], torch.full((2,), 1.25, dtype=torch.float64))


def test_what_cannot_be_solved_is_said() -> None:
    """Too few pivots, or a matrix that is no Gram, give a point within the bounds that is not called converged."""
    gram, pull = large(60)
    hasty = bounded_least_squares(gram, pull, low=0.9, high=1.1, ridge=1e-6, most=1)
    broken = bounded_least_squares(-torch.eye(3), torch.ones(3), low=0.5, high=2.0)

    assert hasty.outcome is Outcome.STOPPED
    assert hasty.stats["violation"] > 1e-6
    assert float(hasty.value.min()) >= 0.9
    assert float(hasty.value.max()) <= 1.1
    assert broken.outcome is Outcome.SINGULAR
    assert broken.value.tolist() == [1.0, 1.0, 1.0]
    assert math.isinf(broken.stats["violation"])


def test_equal_columns_share_their_weight() -> None:
    """Two equal columns get the same weight, up to float32's rounding over the ridge."""
    rows = [[x, x, y] for x, y in ((0.5, 0.1), (0.2, 0.3), (0.4, 0.2))]
    found = bounded_least_squares(*normal(rows, torch.float32), low=0.0, high=10.0, ridge=1e-4)

    assert found.outcome is Outcome.SOLVED
    assert float(found.value[0]) == pytest.approx(float(found.value[1]), abs=1e-3)


def test_bounds_that_cannot_hold_a_point_are_refused() -> None:
    """Equal bounds and a ridge of 0 raise, with the value and the remedy."""
    gram, pull = normal(design("well posed"))
    with pytest.raises(ValueError, match=r"low 2\.0 is not below high 2\.0.*widen"):
        bounded_least_squares(gram, pull, low=2.0, high=2.0)
    with pytest.raises(ValueError, match=r"ridge 0\.0 is not positive.*1e-10"):
        bounded_least_squares(gram, pull, low=0.0, high=2.0, ridge=0.0)


@pytest.mark.parametrize("size", [3, 40, 200])
def test_working_memory_is_stated(size: int) -> None:
    """No more is allocated than :func:`pivoting_bytes` says, and at 200 unknowns at least half of it is."""
    gram, pull = large(size)
    peak = peak_allocated(lambda: bounded_least_squares(gram, pull, low=0.9, high=1.1, ridge=1e-6))

    assert peak <= pivoting_bytes(size, size)
    assert size < 200 or peak >= 0.5 * pivoting_bytes(size, size)
