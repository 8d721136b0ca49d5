"""Gradient refinement: its objective and gradient against an oracle, its trust region, and what it must not touch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.refine import Reach, Refined, _Objective, refine, refine_bytes
from agentmem.policies.solvers.solution import Outcome, Solution
from agentmem.testing import peak_allocated
from oracles import pursuit as oracle

KEPT = torch.tensor([0, 2, 5, 8, 9])


@dataclass(frozen=True)
class Problem:
    """12 slots, 5 of them kept with some β and values of their own."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    kept_bias: torch.Tensor
    fitted: torch.Tensor
    scale: float = 0.5

    def whole(self, rows: int = 5) -> LocalAttention:
        """Over all slots."""
        return LocalAttention((self.queries,), self.keys, self.bias, self.scale, rows)

    def kept(self, rows: int = 5) -> LocalAttention:
        """Over the kept slots."""
        return self.whole(rows).over(self.keys[KEPT], self.kept_bias)

    def refine(self, rows: int = 5, **options: float | Reach) -> Solution[Refined]:
        """From the start."""
        return refine(self.whole(rows), self.kept(rows), self.values, self.fitted, **options)  # type: ignore[arg-type]  # options by name

    def mismatch(self, keys: torch.Tensor, bias: torch.Tensor, values: torch.Tensor, mass_weight: float = 1.0) -> float:
        """The oracle's objective of these kept slots."""
        queries = self.queries.flatten(0, 1).double().tolist()
        whole = (self.keys.double().tolist(), self.bias.double().tolist(), self.values.double().tolist())
        kept = (keys.double().tolist(), bias.double().tolist(), values.double().tolist())
        return oracle.mismatch(queries, whole, kept, self.scale, mass_weight)


def problem(name: str = "well posed") -> Problem:
    """A named problem."""
    generator = torch.Generator().manual_seed(31)
    queries, keys = torch.randn(2, 9, 4, generator=generator), torch.randn(12, 4, generator=generator)
    values, bias = torch.randn(12, 3, generator=generator), torch.randn(12, generator=generator) / 2
    if name == "one query":
        queries = queries[:1, :1]
    if name == "duplicate keys":
        keys[6:] = keys[:6]
    if name == "peaked":
        keys = keys * 6
    if name == "huge logits":
        keys = keys * 1e3
    if name == "no values":
        values = values * 0
    if name == "bfloat16":
        queries = queries.bfloat16()
    return Problem(queries, keys, values, bias, bias[KEPT] + 0.5, values[KEPT])


PROBLEMS = ("well posed", "one query", "duplicate keys", "peaked", "huge logits", "no values", "bfloat16")


@pytest.mark.parametrize("name", ["well posed", "one query", "duplicate keys", "peaked", "bfloat16"])
@pytest.mark.parametrize("mass_weight", [0.0, 1.0, 3.0])
def test_the_objective_is_the_oracles(name: str, mass_weight: float) -> None:
    """The value before is that of the plain loops at the start, the value after that of the returned slots."""
    given = problem(name)
    found = given.refine(mass_weight=mass_weight, steps=4)
    start = given.mismatch(given.keys[KEPT], given.kept_bias, given.fitted, mass_weight)
    end = given.mismatch(found.value.keys, found.value.bias, found.value.values, mass_weight)

    assert found.stats["before"] == pytest.approx(start, rel=1e-4, abs=1e-6)
    assert found.stats["after"] == pytest.approx(end, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["well posed", "one query", "peaked"])
def test_the_gradient_is_the_slope_of_the_objective(name: str) -> None:
    """Every entry agrees with the oracle's central difference, to 1e-3 of the largest slope of its tensor."""
    given = problem(name)
    start = (given.keys[KEPT], given.kept_bias[:, None], given.fitted)
    _, gradient = _Objective(given.whole(), given.values, 2.0).at(start)
    step = 1e-4
    for index, part in enumerate(gradient):
        slopes = torch.zeros(part.shape, dtype=torch.float64)
        for place in torch.ones_like(part).nonzero().tolist():
            ends = []
            for sign in (step, -step):
                moved = [tensor.double().clone() for tensor in start]
                moved[index][tuple(place)] += sign
                ends.append(given.mismatch(moved[0], moved[1].squeeze(-1), moved[2], mass_weight=2.0))
            slopes[tuple(place)] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(part.double(), slopes, atol=1e-3 * float(slopes.abs().max()), rtol=0)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("steps", [0, 1, 8, 30])
def test_an_accepted_result_is_better_and_any_other_is_the_start(name: str, steps: int) -> None:
    """Accepted: the objective fell. Refused: the very slots of the start come back. Always finite."""
    given = problem(name)
    found = given.refine(steps=steps)

    assert all(bool(tensor.isfinite().all()) for tensor in (found.value.keys, found.value.bias, found.value.values))
    assert found.stats["after"] <= found.stats["before"]
    if found.accepted:
        assert steps > 0
        assert found.stats["after"] < found.stats["before"]
    else:
        assert torch.equal(found.value.keys, given.keys[KEPT])
        assert torch.equal(found.value.bias, given.kept_bias)
        assert torch.equal(found.value.values, given.fitted)


def test_more_steps_lower_the_objective_a_lot() -> None:
    """40 steps bring the objective of a poor start below a third, and never does more of them end higher."""
    given = problem()
    ends = [given.refine(steps=steps).stats["after"] for steps in (1, 5, 20, 40)]

    assert ends == sorted(ends, reverse=True)
    assert ends[-1] < given.refine(steps=0).stats["before"] / 3


@pytest.mark.parametrize("rate", [0.05, 5.0])
def test_nothing_moves_beyond_the_reach(rate: float) -> None:
    """Keys, β and values stay within the trust region around the start, however long the steps."""
    given = problem()
    reach = Reach(keys=0.05, bias=0.1, values=0.02)
    found = given.refine(reach=reach, rate=rate, steps=12)
    key_shift = (found.value.keys - given.keys[KEPT]).norm(dim=-1)
    value_shift = (found.value.values - given.fitted).norm(dim=-1)

    assert found.accepted
    assert bool((key_shift <= 0.05 * given.keys[KEPT].norm(dim=-1) * 1.0001).all())
    assert float((found.value.bias - given.kept_bias).abs().max()) <= 0.1 * 1.0001
    assert float(value_shift.max()) <= 0.02 * float(given.values.norm(dim=-1).max()) * 1.0001
    assert float(key_shift.max()) > 0


def test_a_perfect_start_is_left_alone() -> None:
    """Where the kept slots are all slots nothing can be gained, and nothing moves."""
    given = problem()
    whole = given.whole()
    found = refine(whole, whole, given.values, given.values)

    assert found.outcome is Outcome.REFUSED
    assert found.stats["before"] < 1e-10
    assert torch.equal(found.value.keys, given.keys)


def test_slots_that_no_query_looks_at_do_not_move() -> None:
    """A kept slot without evidence keeps its key, β and value though the others are refined."""
    given = problem()
    facing = given.queries.clone()
    facing[..., 3] = -facing[..., 3].abs() - 1
    keys = given.keys.clone()
    keys[5] = torch.tensor([0.0, 0.0, 0.0, 60.0])
    given = replace(given, queries=facing, keys=keys)
    found = given.refine(steps=10)

    assert found.accepted
    assert float((found.value.keys - keys[KEPT])[2].abs().max()) < 1e-5
    assert float((found.value.bias - given.kept_bias)[2].abs()) < 1e-5
    assert float((found.value.values - given.fitted)[2].abs().max()) < 1e-5
    assert float((found.value.keys - keys[KEPT]).abs().max()) > 1e-3


def test_a_query_of_weight_two_counts_like_two() -> None:
    """Weights of queries are repetitions, in the objective and in the steps."""
    given = problem()
    other = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    once = LocalAttention((given.queries, other), given.keys, given.bias, 0.5, 4).weighted([1.0, 2.0])
    twice = LocalAttention((given.queries, other, other), given.keys, given.bias, 0.5, 4)
    results = [
        refine(whole, whole.over(given.keys[KEPT], given.kept_bias), given.values, given.fitted, steps=3)
        for whole in (once, twice)
    ]

    assert results[0].stats["before"] == pytest.approx(results[1].stats["before"], rel=1e-5)
    torch.testing.assert_close(results[0].value.keys, results[1].value.keys, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_blocks_of_any_size_refine_the_same(rows: int) -> None:
    """The result does not depend on how many queries are visited at a time, up to rounding."""
    given = problem()

    torch.testing.assert_close(given.refine(rows=rows).value.keys, given.refine().value.keys, atol=1e-4, rtol=0)


def test_no_global_state_is_touched_and_no_input_written() -> None:
    """The random state, the gradient mode and the given tensors are what they were; the same call gives the same."""
    given = problem()
    state, copies = torch.get_rng_state(), [given.keys.clone(), given.values.clone(), given.fitted.clone()]
    with torch.enable_grad():
        first, second = given.refine(), given.refine()
        assert torch.is_grad_enabled()

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, two) for one, two in zip(copies, (given.keys, given.values, given.fitted), strict=True))
    assert torch.equal(first.value.keys, second.value.keys)
    assert not first.value.keys.requires_grad


@pytest.mark.parametrize(("slots", "count", "queries"), [(12, 5, 9), (300, 150, 100), (300, 20, 40)])
def test_working_memory_is_stated(slots: int, count: int, queries: int) -> None:
    """No more is allocated than :func:`refine_bytes` says."""
    generator = torch.Generator().manual_seed(3)
    parts = torch.randn(3, queries, 16, generator=generator).bfloat16()
    keys, values = torch.randn(slots, 16, generator=generator), torch.randn(slots, 24, generator=generator)
    whole = LocalAttention((parts,), keys, torch.zeros(slots), 0.25, 32)
    kept, own = whole.over(keys[:count].clone(), torch.zeros(count)), values[:count].clone()
    peak = peak_allocated(lambda: refine(whole, kept, values, own, steps=4))

    assert peak <= refine_bytes(slots, count, 3 * queries, 32, 16, 24)
