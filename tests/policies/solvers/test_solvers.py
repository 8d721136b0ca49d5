"""The solvers against float64 oracles, and the numerical traps that they avoid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from agentmem.policies.solvers.anchored import Upper, add_gram, factored, upper_bytes
from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.mass import fit_mass
from agentmem.policies.solvers.selection import Score, importance, top
from agentmem.policies.solvers.solution import Outcome
from agentmem.policies.solvers.values import fit_values
from oracles import matching as oracle

WIDE = 20.0
"""A bound on β that no fit here reaches."""


@dataclass(frozen=True)
class Problem:
    """A small segment, its queries and the slots that stay."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    kept: torch.Tensor
    scale: float = 0.5

    def attention(self, rows: int = 5) -> LocalAttention:
        """Over all slots."""
        return LocalAttention((self.queries,), self.keys, self.bias, self.scale, rows)

    def over_kept(self, log_weights: torch.Tensor | float = 0.0, rows: int = 5) -> LocalAttention:
        """Over the kept slots, β updated."""
        return self.attention(rows).over(self.keys[self.kept], self.bias[self.kept] + log_weights)

    def plain(self) -> tuple[oracle.Matrix, oracle.Matrix, list[float], float]:
        """Queries, keys, bias and scale for the oracle."""
        return self.queries.flatten(0, 1).double().tolist(), self.keys.tolist(), self.bias.tolist(), self.scale


def problem(name: str) -> Problem:
    """A named problem: 12 slots of width 4, 7 of them kept, 2 query heads."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731 - three words, three times
    made = {
        "queries": draw(2, 9, 4),
        "keys": draw(12, 4),
        "values": draw(12, 3),
        "bias": torch.zeros(12),
        "kept": torch.tensor([0, 2, 3, 5, 8, 9, 11]),
    }
    if name == "old bias":
        made["bias"] = draw(12) * 2
    if name == "one query":
        made["queries"] = made["queries"][:1, :1]
    if name == "equal queries":
        made["queries"] = made["queries"][:1, :1].repeat(2, 9, 1)
    if name == "duplicate keys":
        made["keys"][[2, 5, 9]] = made["keys"][[0, 3, 8]]
    if name == "peaked":
        made["keys"] = made["keys"] * 6
    return Problem(**made)


PROBLEMS = ("well posed", "old bias", "one query", "equal queries", "duplicate keys", "peaked")


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_local_attention_is_the_softmax_of_the_segment(name: str, rows: int) -> None:
    """Weights, log mass and importance equal the oracle's, in blocks of any size."""
    given = problem(name)
    expected = oracle.weights(*given.plain())

    for score in ("rms", "max", "mean"):
        found = importance(given.attention(rows), score)
        torch.testing.assert_close(found.scores, torch.tensor(oracle.importance(expected, score)))
        torch.testing.assert_close(found.log_mass, torch.tensor(oracle.log_mass(*given.plain())))
    blocks = torch.cat([given.attention(rows).weights(block)[0] for _, block in given.attention(rows).blocks()])
    torch.testing.assert_close(blocks, torch.tensor(expected), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_queries_are_scored_in_float32(dtype: torch.dtype) -> None:
    """The only error of 16-bit queries is their own rounding: scores equal the oracle's of the rounded queries."""
    given = problem("well posed")
    rounded = given.queries.to(dtype)
    found = importance(LocalAttention((rounded,), given.keys, given.bias, given.scale, 5))
    _, keys, bias, scale = given.plain()
    expected = oracle.weights(rounded.flatten(0, 1).double().tolist(), keys, bias, scale)

    torch.testing.assert_close(found.scores, torch.tensor(oracle.importance(expected, "rms")))


def test_strided_queries_are_read_where_they_lie() -> None:
    """Queries as attention hands them over, a transposed view, give the same scores as a copy."""
    view = torch.randn(9, 6, 4).transpose(0, 1)[2:4]
    given = problem("well posed")

    over_view = importance(LocalAttention((view,), given.keys, given.bias, given.scale, 4))
    over_copy = importance(LocalAttention((view.contiguous(),), given.keys, given.bias, given.scale, 4))

    torch.testing.assert_close(over_view.scores, over_copy.scores)


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_top_keeps_the_newer_of_equal_slots(count: int) -> None:
    """The chosen indices ascend, and of equal scores the later slot stays."""
    scores = [0.5, 0.1, 0.5, 0.5, 0.9, 0.1]

    assert top(torch.tensor(scores), count).tolist() == oracle.top(scores, count)


def test_equal_scores_keep_the_newest_slots() -> None:
    """Without any difference the most recent slots stay."""
    assert top(torch.zeros(1000), 3).tolist() == [997, 998, 999]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_mass_fit_is_the_anchored_least_squares_solution(name: str, ridge: float) -> None:
    """Within wide bounds exp(update) equals the float64 solution, so a float32 Gram is enough.

    The tolerance is float32 rounding times the condition number, at most 7 / ridge here.
    """
    given = problem(name)
    log_mass = importance(given.attention()).log_mass
    fit = fit_mass(given.over_kept(), log_mass, ridge=ridge, bound=WIDE, steps=0)
    queries, keys, bias, scale = given.plain()
    design = oracle.relative_mass(queries, keys, bias, given.kept.tolist(), scale)
    expected = oracle.anchored(design, [1.0] * len(design), [1.0] * 7, ridge)

    assert fit.accepted
    assert fit.condition <= 1.1 * (1 + 7 / ridge)
    torch.testing.assert_close(
        fit.value.exp(), torch.tensor(expected).clamp(math.exp(-WIDE)), atol=1e-6 * 7 / ridge, rtol=0
    )


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("ridge", [1e-3, 1e-2, 1.0])
def test_value_fit_is_the_anchored_least_squares_solution(name: str, ridge: float) -> None:
    """Within a wide bound the values equal the float64 solution; both softmaxes are local to the segment."""
    given = problem(name)
    update = torch.linspace(-1, 1, 7)
    kept = given.over_kept(update)
    fit = fit_values(given.attention(), kept, given.values, given.values[given.kept], ridge=ridge, bound=1e6)
    queries, keys, bias, scale = given.plain()
    expected = oracle.fitted_values(
        queries, keys, bias, given.values.tolist(), given.kept.tolist(), kept.bias.tolist(), scale, ridge
    )

    assert fit.accepted
    assert fit.stats["bounded"] == 0
    torch.testing.assert_close(fit.value, torch.tensor(expected), atol=2e-6 * 7 / ridge, rtol=0)


@pytest.mark.parametrize("fraction", [1, 3, 1000])
def test_blocks_of_any_size_fit_the_same(fraction: int) -> None:
    """The fits do not depend on how many queries are visited at a time, up to rounding."""
    given = problem("well posed")
    log_mass = importance(given.attention()).log_mass
    whole = fit_mass(given.over_kept(rows=18), log_mass, ridge=1e-2, bound=3.0, steps=2)
    parts = fit_mass(given.over_kept(rows=fraction), log_mass, ridge=1e-2, bound=3.0, steps=2)

    torch.testing.assert_close(parts.value, whole.value, atol=1e-4, rtol=0)


def crowded() -> tuple[LocalAttention, torch.Tensor]:
    """32 nearly equal keys, 16 kept: the Gram's largest eigenvalue is 16 times its largest diagonal entry."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(1, 8, generator=generator) + 0.05 * torch.randn(32, 8, generator=generator)
    queries = torch.randn(1, 64, 8, generator=generator)
    whole = LocalAttention((queries,), keys, torch.zeros(32), 1.0, 16)
    log_mass = importance(whole).log_mass
    return whole.over(keys[::2], torch.zeros(16)), log_mass


def squared_mass_error(kept: LocalAttention, log_mass: torch.Tensor, update: torch.Tensor) -> float:
    """``|Φ w - 1|²`` in float64."""
    phi = (kept.queries[0][0].double() @ kept.keys.double().T * kept.scale - log_mass.double()[:, None]).exp()
    return float((phi @ update.double().exp() - 1).square().sum())


def test_projected_gradient_steps_never_diverge() -> None:
    """More steps never fit worse, though columns overlap and bounds bind (a step of 1 / max diagonal flips β)."""
    kept, log_mass = crowded()
    errors = []
    for steps in (0, 1, 2, 5, 20, 100):
        fit = fit_mass(kept, log_mass, ridge=1e-3, bound=0.75, steps=steps)
        assert fit.accepted
        assert float(fit.value.abs().max()) <= 0.75
        errors.append(squared_mass_error(kept, log_mass, fit.value))

    assert all(after <= before * 1.001 for before, after in pairwise(errors))
    assert errors[-1] < 0.1 * squared_mass_error(kept, log_mass, torch.zeros(16))


def test_the_eigenvalue_bound_is_tight_from_above() -> None:
    """The bound is never below the largest eigenvalue and less than 2 % above it for overlapping columns."""
    rows = torch.rand(200, 12, generator=torch.Generator().manual_seed(1))
    gram = rows.T @ rows
    exact = float(torch.linalg.eigvalsh(gram.double()).max())
    equations = factored(Upper((gram.clone(),)), 1e-6)

    assert equations is not None
    assert exact <= equations.largest() * (1 + 1e-5)
    assert equations.largest() <= 1.02 * exact


@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_slots_that_no_query_looks_at_are_left_alone(ridge: float) -> None:
    """Their β update is 0 and their values are their own, to within rounding, though the rest is refitted."""
    given = problem("well posed")
    away = given.keys.clone()
    away[given.kept[3:5]] = torch.tensor([0.0, 0.0, 0.0, 40.0])
    facing = given.queries.clone()
    facing[..., 3] = -facing[..., 3].abs() - 1
    given = Problem(facing, away, given.values, given.bias, given.kept)
    log_mass = importance(given.attention()).log_mass
    mass = fit_mass(given.over_kept(), log_mass, ridge=ridge, bound=3.0, steps=2)
    values = fit_values(
        given.attention(),
        given.over_kept(mass.value),
        given.values,
        given.values[given.kept],
        ridge=ridge,
        bound=2.0,
    )
    shift = (values.value - given.values[given.kept]).abs()

    assert mass.value.abs().amax() > 0.1
    assert mass.value[3:5].abs().amax() < 1e-5
    assert shift.amax() > 0.01
    assert shift[3:5].amax() < 1e-5


@pytest.mark.parametrize("ridge", [1e-8, 1e-2])
def test_near_duplicate_keys_do_not_blow_values_up(ridge: float) -> None:
    """Keys that agree to 1e-6 give values no longer than their own plus the bound, and the condition is reported."""
    given = problem("well posed")
    keys = given.keys.clone()
    keys[given.kept[1:]] = keys[given.kept[0]] + 1e-6 * torch.randn(6, 4)
    given = Problem(given.queries, keys, given.values * 10, given.bias, given.kept)
    longest = float(given.values.norm(dim=-1).max())
    fit = fit_values(
        given.attention(), given.over_kept(), given.values, given.values[given.kept], ridge=ridge, bound=2.0
    )

    assert bool(fit.value.isfinite().all())
    assert float(fit.value.norm(dim=-1).max()) <= (1 + 2.0) * longest * 1.0001
    assert fit.condition > 0.5 / max(ridge, 1e-6)


def test_values_are_cut_to_the_bound_and_counted() -> None:
    """No value moves further than the bound times the longest value, and the cut ones are counted."""
    given = problem("well posed")
    own = given.values[given.kept]
    fit = fit_values(given.attention(), given.over_kept(), given.values, own, ridge=1e-3, bound=0.05)
    limit = 0.05 * float(given.values.norm(dim=-1).max())

    assert fit.stats["bounded"] > 0
    assert float((fit.value - own).norm(dim=-1).max()) <= limit * 1.0001


def test_a_gram_that_does_not_factor_is_reported() -> None:
    """An indefinite or non-finite matrix gives no equations instead of NaN."""
    assert factored(Upper((-torch.eye(3),)), 1e-2) is None
    assert factored(Upper((torch.full((3, 3), float("nan")),)), 1e-2) is None


@pytest.mark.parametrize("size", [1, 255, 256, 257, 600])
def test_a_matrix_in_strips_is_the_whole_matrix(size: int) -> None:
    """The stored triangle is ``AᵀA``, its bytes are as stated, and solutions and gains are those of float64."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.rand(2 * size + 3, size, generator=generator)
    gram = Upper.zeros(rows, size)
    for block in rows.split(64):
        add_gram(gram, block)
    whole = rows.double().T @ rows.double()
    for columns, strip in gram.items():
        upper = torch.ones(strip.shape).triu(-columns.start).bool()
        torch.testing.assert_close(strip[upper].double(), whole[: columns.stop, columns][upper], rtol=1e-5, atol=1e-4)

    assert sum(strip.nbytes for strip in gram.strips) == upper_bytes(size)

    equations = factored(gram, 1e-2)
    assert equations is not None
    pull = torch.randn(size, 3, generator=generator)
    ridged = whole + equations.ridge * torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.solve(ridged, pull.double())
    shift = equations.shift(pull)

    assert equations.ridge == pytest.approx(1e-2 * float(whole.diagonal().mean()), rel=1e-5)
    torch.testing.assert_close(shift.double(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    torch.testing.assert_close(equations.apply(shift).double(), ridged @ shift.double(), rtol=1e-4, atol=1e-3)
    lowered = 2 * (pull.double() * shift.double()).sum() - (rows.double() @ shift.double()).square().sum()
    assert equations.gain(pull.clone(), shift) == pytest.approx(float(lowered), rel=1e-2)


def test_no_evidence_at_all_changes_nothing() -> None:
    """Where the kept slots have no mass, β and values stay as they were and the fit says that it was refused."""
    given = problem("well posed")
    fit = fit_mass(given.over_kept(), torch.full((18,), 1e4), ridge=1e-2, bound=3.0, steps=2)

    assert fit.outcome is Outcome.REFUSED
    assert torch.equal(fit.value, torch.zeros(7))


@pytest.mark.parametrize("steps", [2, None])
def test_a_fit_whose_equations_are_singular_returns_the_start(steps: int | None) -> None:
    """Masses that are no numbers give β as it was, and an outcome that is told apart from a fit that was worse."""
    given = problem("well posed")
    fit = fit_mass(given.over_kept(), torch.full((18,), float("nan")), ridge=1e-2, bound=3.0, steps=steps)

    assert fit.outcome is Outcome.SINGULAR
    assert not fit.accepted
    assert torch.equal(fit.value, torch.zeros(7))


@pytest.mark.parametrize("score", ["rms", "max", "mean"])
@pytest.mark.parametrize("spread", [1e-30, 1e4, 1e15])
def test_logits_of_any_finite_size_give_finite_results(score: Score, spread: float) -> None:
    """Huge and vanishing logits: scores, β and values are finite."""
    given = problem("well posed")
    given = Problem(given.queries, given.keys * spread, given.values, given.bias, given.kept)
    found = importance(given.attention(), score)
    mass = fit_mass(given.over_kept(), found.log_mass, ridge=1e-2, bound=3.0, steps=2)
    values = fit_values(
        given.attention(),
        given.over_kept(mass.value),
        given.values,
        given.values[given.kept],
        ridge=1e-2,
        bound=2.0,
    )

    for tensor in (found.scores, mass.value, values.value):
        assert bool(tensor.isfinite().all())


# ---- parts and their weights


def parted(parts: Sequence[torch.Tensor], weights: Sequence[float], rows: int = 4) -> LocalAttention:
    """The well posed problem asked by these parts of queries."""
    given = problem("well posed")
    return LocalAttention(tuple(parts), given.keys, given.bias, given.scale, rows).weighted(weights)


def test_parts_are_asked_one_after_the_other() -> None:
    """Parts of any lengths give what their queries give in one part: scores, and the log mass in order."""
    queries = problem("well posed").queries
    whole = importance(parted([queries], [1.0]))
    cut = importance(parted([queries[:, :2], queries[:, 2:2], queries[:, 2:]], [1.0] * 3))
    order = [0, 1, 9, 10, *range(2, 9), *range(11, 18)]

    torch.testing.assert_close(cut.scores, whole.scores)
    torch.testing.assert_close(cut.log_mass, whole.log_mass[order])


def test_many_small_parts_share_blocks() -> None:
    """Every query is in one block, in order; no block is larger than the limit, and few are made."""
    queries = torch.randn(3, 100, 4, generator=torch.Generator().manual_seed(0))
    parts = (*queries[:, :60].split(2, 1), queries[:, 60:62].bfloat16(), *queries[:, 62:].split([38, 0], 1))
    attention = LocalAttention(parts, torch.zeros(5, 4), torch.zeros(5), 1.0, 32)
    found = list(attention.blocks())

    assert [rows.stop - rows.start for rows, _ in found] == [len(block) for _, block in found]
    assert [rows.start for rows, _ in found] == [0, *(rows.stop for rows, _ in found[:-1])]
    assert len(found) == 13  # 186 queries of 31 parts in 7 blocks, and 3 times 38 in 2 blocks each
    assert max(len(block) for _, block in found) <= 32
    expected = torch.cat([part.float().flatten(0, 1) for part in parts])
    assert torch.equal(torch.cat([block for _, block in found]), expected)


def heavier(queries: torch.Tensor) -> tuple[LocalAttention, LocalAttention]:
    """The first 3 tokens with weight 2 and the rest with 1, and all with 1 but the first 3 tokens twice."""
    first, rest = queries[:, :3], queries[:, 3:]
    return parted([first, rest], [2.0, 1.0]), parted([first, first, rest], [1.0] * 3)


@pytest.mark.parametrize("score", ["rms", "mean"])
def test_a_query_of_weight_two_scores_like_two_of_weight_one(score: Score) -> None:
    """The importance is the oracle's over queries that are there twice."""
    given = problem("well posed")
    weighted, twice = heavier(given.queries)
    _, keys, bias, scale = given.plain()
    asked = torch.cat([part.flatten(0, 1) for part in twice.queries]).double().tolist()
    expected = oracle.importance(oracle.weights(asked, keys, bias, scale), score)

    torch.testing.assert_close(importance(weighted, score).scores, torch.tensor(expected))
    assert not torch.allclose(importance(given.attention(), score).scores, torch.tensor(expected), rtol=1e-3), (
        "the weight must make a difference"
    )


def test_weights_change_no_maximum_and_no_mass() -> None:
    """The largest weight of a slot is what it is, and every query's own mass as well."""
    weighted, _ = heavier(problem("well posed").queries)
    found, plain = importance(weighted, "max"), importance(weighted.weighted([1.0, 1.0]), "max")

    assert torch.equal(found.scores, plain.scores)
    assert torch.equal(found.log_mass, plain.log_mass)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_only_ratios_of_weights_matter(factor: float) -> None:
    """All weights times one factor give the same scores and the same fits."""
    queries = problem("well posed").queries
    parts = [queries[:, :3], queries[:, 3:]]
    for one, other in zip(fits(parted(parts, [2.0, 1.0])), fits(parted(parts, [2 * factor, factor])), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


def fits(attention: LocalAttention) -> tuple[torch.Tensor, ...]:
    """Scores, the update of β and the values."""
    given = problem("well posed")
    found = importance(attention)
    kept = attention.over(given.keys[given.kept], given.bias[given.kept])
    mass = fit_mass(kept, found.log_mass, ridge=1e-2, bound=WIDE, steps=0)
    own = given.values[given.kept]
    kept = kept.over(kept.keys, kept.bias + mass.value)
    values = fit_values(attention, kept, given.values, own, ridge=1e-2, bound=1e6)
    assert mass.accepted
    assert values.accepted
    return found.scores, mass.value, values.value


def test_a_query_of_weight_two_is_fitted_like_two_of_weight_one() -> None:
    """β and values are those of the queries that are there twice, and others than without the weight.

    The tolerance is float32 rounding times the condition number, at most 7 / ridge here.
    """
    queries = problem("well posed").queries
    weighted, twice = heavier(queries)
    plain = parted([queries], [1.0])

    for one, other, without in zip(fits(weighted), fits(twice), fits(plain), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
        assert float((one - without).abs().max()) > 1e-2
