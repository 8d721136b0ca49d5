"""The numerical traps that other code bases fell into, one section each, for every fit after every selector.

Fits: β by projected gradient, exact, or by a pursuit's own weights; values; then all of it refined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from agentmem import plugins
from agentmem.contracts import HeadSegment, Numerics, Reference, Segment
from agentmem.hf import describe
from agentmem.memory.forwards import Arriving
from agentmem.memory.memory import Memory
from agentmem.policies.compactors.attention_matching import AttentionMatching
from agentmem.policies.compactors.selectors import SELECTORS, Pursue
from agentmem.settings import Settings
from oracles import matching as oracle
from oracles import pursuit as reference_pursuit
from support import tiny, variants
from support.no_model import Forwards, engine

PURSUITS = tuple(name for name in SELECTORS if isinstance(SELECTORS[name](), Pursue))
Fit = tuple[str, str, int]
FITS: tuple[Fit, ...] = tuple(
    (name, mass, refine)
    for name in SELECTORS
    for mass in (("none",) if name in PURSUITS else ("projected", "exact"))
    for refine in (0, 4)
)
"""Selector, fit of β (a pursuit has its own weights) and steps of refinement."""
EVERY = pytest.mark.parametrize("fit", FITS, ids=lambda fit: "-".join(map(str, fit)))
CLOSED = pytest.mark.parametrize("fit", [each for each in FITS if not each[2]], ids=lambda fit: "-".join(fit[:2]))
SCALE = 0.5


@dataclass(frozen=True)
class Head:
    """One head after a compaction, as the memory would commit it, and what the fit went through."""

    slots: HeadSegment
    kept: list[int]
    numerics: Numerics


def made(fit: Fit, **options: Any) -> AttentionMatching:
    """The compactor of AM halving with that selector, that fit of β and so many steps of refinement."""
    name, mass, refine = fit
    compactor = plugins.policy("am-halving", selector=name, mass=mass, refine=refine, **options).compactor
    assert isinstance(compactor, AttentionMatching)
    return compactor


def compacted(compactor: AttentionMatching, head: HeadSegment, queries: torch.Tensor, count: int) -> Head:
    """A head of one layer after a compaction to ``count`` slots by ``queries [group, n, d]``."""
    segment = Segment(0, (head,), (Reference(queries),), SCALE, torch.Generator().manual_seed(3), 0)
    result = compactor.compact(segment, [count])
    (new,) = result.heads
    assert new.bias is not None
    assert new.values is not None
    keys = head.keys[new.kept] if new.keys is None else new.keys
    return Head(HeadSegment(keys, new.values, new.bias, head.positions[new.kept]), new.kept.tolist(), result.numerics)


def head_of(keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None = None) -> HeadSegment:
    """A segment's head at the first positions."""
    return HeadSegment(keys, values, torch.zeros(len(keys)) if bias is None else bias, torch.arange(len(keys)))


def clustered(seed: int = 0) -> tuple[HeadSegment, torch.Tensor]:
    """24 slots in six clusters, as real keys lie, and the queries of two heads around them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 6, generator=generator) * 1.5
    keys = centres[torch.arange(24) % 6] + 0.3 * torch.randn(24, 6, generator=generator)
    values = torch.randn(6, 3, generator=generator)[torch.arange(24) % 6] + torch.randn(24, 3, generator=generator)
    aims = centres[torch.randint(6, (2, 24), generator=generator)]
    return head_of(keys, values), aims + torch.randn(2, 24, 6, generator=generator)


def plain(head: HeadSegment) -> tuple[oracle.Matrix, list[float], oracle.Matrix]:
    """Keys, β and values for the oracle."""
    return head.keys.tolist(), head.bias.tolist(), head.values.tolist()


def gap(head: HeadSegment, whole: HeadSegment, queries: torch.Tensor) -> float:
    """Mean absolute error of the log mass, by the oracle."""
    asked = queries.flatten(0, 1).tolist()
    masses = [oracle.log_mass(asked, *plain(each)[:2], SCALE) for each in (head, whole)]
    return sum(abs(one - other) for one, other in zip(*masses, strict=True)) / len(asked)


def mismatch(head: HeadSegment, whole: HeadSegment, queries: torch.Tensor, mass_weight: float = 1.0) -> float:
    """The relative squared error of the output, and of the log mass, by the oracle; both softmaxes local."""
    asked = queries.flatten(0, 1).tolist()
    return reference_pursuit.mismatch(asked, plain(whole), plain(head), SCALE, mass_weight)


# ---- 6.1: β must be carried


@EVERY
@pytest.mark.parametrize("seed", range(2))
def test_old_beta_is_carried(fit: Fit, seed: int) -> None:
    """Trap 1: a fit is an update. With every old β at 2 all new ones are 2 higher, and no mass is lost.

    Where it is dropped the mean error of the log mass is about 2; with scattered ones the fit is as good.
    """
    head, queries = clustered(seed)
    without = compacted(made(fit), head, queries, 12)
    lifted = replace(head, bias=head.bias + 2)
    result = compacted(made(fit), lifted, queries, 12)

    assert result.kept == without.kept
    assert torch.allclose(result.slots.bias, without.slots.bias + 2, atol=2e-3)
    scattered = replace(head, bias=2 + torch.randn(24, generator=torch.Generator().manual_seed(seed)))
    for whole in (lifted, scattered):
        slots = compacted(made(fit), whole, queries, 12).slots
        lost = replace(slots, bias=slots.bias - 2)
        assert gap(slots, whole, queries) < 0.5 * gap(lost, whole, queries)


# ---- 6.2: values are fitted to the segment's local softmax


@CLOSED
@pytest.mark.parametrize("old", [0.0, 2.0])
def test_values_are_fitted_to_the_local_softmax(fit: Fit, old: float) -> None:
    """Trap 2: they are the float64 solution with both softmaxes over the segment alone.

    Relative to more mass than the segment's, in one of them or in both, they would shrink or grow.
    """
    head, queries = clustered(1)
    head = replace(head, bias=torch.randn(24, generator=torch.Generator().manual_seed(5)) + old)
    result = compacted(made(fit), head, queries, 10)
    keys, bias, values = plain(head)
    asked = queries.flatten(0, 1).double().tolist()
    expected = oracle.fitted_values(
        asked, keys, bias, values, result.kept, result.slots.bias.tolist(), SCALE, ridge=3e-3
    )

    assert torch.allclose(result.slots.values.double(), torch.tensor(expected).double(), atol=2e-3)
    own = replace(result.slots, values=head.values[result.kept])
    assert mismatch(result.slots, head, queries, 0.0) < 0.7 * mismatch(own, head, queries, 0.0)


@EVERY
@pytest.mark.parametrize("seed", range(3))
def test_refinement_lowers_the_local_errors(fit: Fit, seed: int) -> None:
    """Trap 2: what a refinement lowers is the error against the segment's own output and mass, by the oracle."""
    head, queries = clustered(seed)
    start = mismatch(compacted(made((*fit[:2], 0)), head, queries, 10).slots, head, queries)
    refined = mismatch(compacted(made((*fit[:2], 8)), head, queries, 10).slots, head, queries)

    assert refined < 0.8 * start


# ---- 6.3: nothing diverges, nothing dies


@EVERY
def test_overlapping_columns_do_not_diverge(fit: Fit) -> None:
    """Trap 3: keys that nearly agree. Every β rises by about log 2 and the mass is restored, however many the steps.

    Steps of one over the largest diagonal entry flip β between its bounds; a fit that is then refused leaves log 2.
    """
    generator = torch.Generator().manual_seed(4)
    head = head_of(1 + 0.05 * torch.randn(24, 6, generator=generator), torch.randn(24, 3, generator=generator))
    queries = torch.randn(2, 24, 6, generator=generator)
    for steps in (2, 30):
        result = compacted(made(fit, steps=steps), head, queries, 12)
        assert gap(result.slots, head, queries) < 0.03
        assert float((result.slots.bias - math.log(2)).abs().max()) < 1.5


HELD, DARK, ROUNDS = 24, 8, 10


def dark(first: int, count: int, depth: float) -> HeadSegment:
    """Slots that queries of 4 in the first place give a logit of ``-depth``; each has β and a value of its own."""
    tags = torch.arange(first, first + count, dtype=torch.float32)
    keys = torch.zeros(count, 6)
    keys[:, 0] = -depth / (4 * SCALE)
    keys[:, 1] = tags * 1e-3  # who it is; no query looks there
    return replace(head_of(keys, tags[:, None].repeat(1, 3).sin(), tags.cos()), scores=torch.ones(count))


def lit(count: int, generator: torch.Generator) -> HeadSegment:
    """Slots that the queries look at."""
    keys = torch.randn(count, 6, generator=generator)
    keys[:, 0], keys[:, 1] = 0, -1
    return replace(head_of(keys, torch.randn(count, 3, generator=generator)), scores=torch.zeros(count))


def joined(*heads: HeadSegment) -> HeadSegment:
    """One head of all their slots."""
    parts = [[getattr(each, name) for each in heads] for name in ("keys", "values", "bias", "scores")]
    keys, values, bias, scores = map(torch.cat, parts)
    return HeadSegment(keys, values, bias, torch.arange(len(keys)), scores)


def survivors(fit: Fit, depth: float) -> tuple[HeadSegment, torch.Tensor]:
    """The dark slots that are left of eight after ten compactions, and who they are.

    They were important once, and importance is carried; a pursuit chooses most of its slots by it. New lit slots take
    the place of those that went, so that every fit has a mass to restore. A random choice drops fewer.
    """
    chosen = SELECTORS[fit[0]]()
    chosen = replace(chosen, needles=0.6) if isinstance(chosen, Pursue) else chosen
    compactor = replace(made(fit, carry=1.0), selector=chosen)
    generator, count = torch.Generator().manual_seed(6), 20 if fit[0] == "random" else 14
    head = joined(lit(HELD - DARK, generator), dark(0, DARK, depth))
    for _ in range(ROUNDS):
        queries = torch.randn(2, 24, 6, generator=generator)
        queries[..., 0], queries[..., 1] = 4, 0
        new = compacted(compactor, head, queries, count)
        left = new.slots.keys[:, 1] > -0.5
        moved = (new.slots.bias - head.bias[new.kept])[~left]
        assert float(moved.abs().max()) > 0.05, "the lit ones stand in for those that went"
        head = joined(lit(HELD - count, generator), replace(new.slots, scores=left.float()))
        if not left.any():  # a random choice may drop them all
            break
        slots = head_of(*(getattr(new.slots, name)[left] for name in ("keys", "values", "bias")))
    return slots, (slots.keys[:, 1] * 1e3).round().int()


@EVERY
@pytest.mark.parametrize(("depth", "most"), [(40, 1e-4), (10, 0.5)])
def test_slots_without_evidence_stay_as_they_are(fit: Fit, depth: float, most: float) -> None:
    """Trap 3: over ten compactions β, values and keys of slots that no query looks at are theirs, to rounding.

    Unanchored, each compaction gives them a random weight and clamps it: down by 3 each time, and they are dead. With
    a hundred-thousandth of the mass β stays within 0.5 for as long.
    """
    slots, tags = survivors(fit, depth)
    before = dark(0, DARK, depth)

    assert len(tags) == DARK or fit[0] == "random"
    assert torch.allclose(slots.keys, before.keys[tags], atol=max(1e-6, most / 5))
    assert torch.allclose(slots.bias, before.bias[tags], atol=most)
    assert torch.allclose(slots.values, before.values[tags], atol=most)


# ---- 6.4: near-duplicate keys


@EVERY
@pytest.mark.parametrize("apart", [0.0, 1e-6])
def test_near_duplicate_keys_give_bounded_values(fit: Fit, apart: float) -> None:
    """Trap 4: twelve keys twice, with other values. What is kept of a pair shares its weight; values stay as long.

    A fit that assumes full rank gives values of 1e6 without a NaN, or leaves that to a bound.
    """
    for seed in range(2):
        head, queries = clustered(seed)
        keys = head.keys.clone()
        keys[12:] = keys[:12] + apart * torch.randn(12, 6, generator=torch.Generator().manual_seed(9))
        head = replace(head, keys=keys)
        result = compacted(made(fit), head, queries, 18)
        bias = dict(zip(result.kept, result.slots.bias.tolist(), strict=True))
        pairs = [(index, index + 12) for index in range(12) if {index, index + 12} <= bias.keys()]

        assert len(pairs) >= 6
        assert all(abs(bias[one] - bias[other]) < 0.1 for one, other in pairs)
        longer = 3.0 if fit[0] == "random" else 1.5  # what was drawn may be a poor choice, and is bounded all the same
        assert float(result.slots.values.norm(dim=-1).max()) < longer * float(head.values.norm(dim=-1).max())
        assert not any("cut to the bound" in note for note in result.numerics.fallbacks)
        assert 1 < result.numerics.condition < 1e6


# ---- 6.5: the Gram squares the condition number


def bounded(phi: torch.Tensor, firm: float, steps: int | None) -> torch.Tensor:
    """The weights of least ``|Φ w - 1|² + firm |w - 1|²`` within e⁻³ and e³, in float64 and without a Gram.

    With ``steps``: the solution without bounds, clamped, and so many projected-gradient steps from there.
    """
    count = phi.shape[1]
    design = torch.cat((phi, firm**0.5 * torch.eye(count, dtype=phi.dtype)))
    target = torch.cat((phi.new_ones(len(phi)), phi.new_full((count,), firm**0.5)))
    low, high = math.exp(-3), math.exp(3)
    if steps is None:
        return reference_pursuit.active_set(design, target, low, high)
    weights = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution.squeeze(-1).clamp(low, high)
    step = 1 / float(torch.linalg.matrix_norm(design, 2)) ** 2
    for _ in range(steps):
        weights = (weights - step * (design.T @ (design @ weights - target))).clamp(low, high)
    return weights


@CLOSED
@pytest.mark.parametrize("seed", range(2))
def test_a_squared_condition_number_costs_no_accuracy(fit: Fit, seed: int) -> None:
    """Trap 5: masses of a condition of 1e8 that no float32 Gram can hold. The anchors make it harmless.

    Mass and output errors on the fitting queries are those of float64 fits of the same slots without a Gram, to 5 %.
    """
    places = torch.linspace(-1, 1, 24)
    keys, queries = torch.zeros(24, 6), torch.zeros(2, 24, 6)
    keys[:, 0], queries[..., 0] = places, torch.linspace(-6, 6, 48).view(24, 2).T
    noise = torch.randn(24, generator=torch.Generator().manual_seed(seed))
    head = head_of(keys, torch.stack(((3 * places).sin(), (5 * places).cos(), noise), 1))
    result = compacted(made(fit), head, queries, 12)
    asked = queries.flatten(0, 1).double().tolist()
    phi = torch.tensor(oracle.weights(asked, *plain(head)[:2], SCALE)).double()
    firm = float(phi.square().sum(0).mean()) * 1e-4
    part = phi[:, result.kept]
    if fit[0] not in PURSUITS:
        firm = float(part.square().sum(0).mean()) * 1e-2
    expected = bounded(part, firm, 2 if fit[1] == "projected" else None)
    error, least = (float((part @ each - 1).norm()) for each in (result.slots.bias.double().exp(), expected))
    values = oracle.fitted_values(asked, *plain(head), result.kept, result.slots.bias.tolist(), SCALE, 3e-3)
    best = replace(result.slots, values=torch.tensor(values))

    assert float(torch.linalg.cond(part)) > 1e7
    assert error < 1.05 * least + 1e-4
    assert mismatch(result.slots, head, queries, 0.0) < 1.05**2 * mismatch(best, head, queries, 0.0) + 1e-8


# ---- 6.6: what must not be seen


def full_memory(fit: Fit, shift: float) -> Memory:
    """A compacted memory of one layer without a model; ``shift`` is added to prefix and recent keys and values."""
    policy, shape = replace(tiny.KINDS["replay"], compactor=made(fit)), describe(tiny.llama(1).config, itemsize=4)
    memory = Memory(shape, Settings.of(cap=1 << 24, on_failure="raise", **tiny.SETTINGS), policy)
    memory.bind(1)
    runs, generator = engine(memory), torch.Generator().manual_seed(7)
    queries, keys, values = (torch.randn(1, heads, 48, 16, generator=generator) for heads in (4, 2, 2))
    pinned = (torch.arange(48) < 4) | (torch.arange(48) >= 40)
    keys, values = (each + shift * pinned[:, None] for each in (keys, values))
    for start in range(0, 48, 16):
        span = slice(start, start + 16)
        step = runs.begin([Arriving(range(16), range(start, start + 16), slice(None))])
        step.attend(0, queries[:, :, span], keys[:, :, span], values[:, :, span], 0.25)
        runs.commit()
    asked = torch.randn(4, memory.plan.probe_tokens, 16, generator=generator)

    runs.forwards = Forwards(lambda _ids, _start, step: step.visit(0, asked))
    assert runs.compact(memory.sequences[0]) is not None
    return memory


@EVERY
def test_prefix_and_recent_slots_are_neither_candidates_nor_mass(fit: Fit) -> None:
    """Trap 6: with other prefix and recent slots the compacted ones are the same to the bit; those stay themselves."""
    stores = [full_memory(fit, shift).sequences[0].stores[0] for shift in (0.0, 5.0)]
    for head in range(2):
        one, other = (store.segment(head, 4, 8) for store in stores if store is not None)
        for name in ("keys", "values", "bias", "positions"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert 4 <= int(one.positions[0]) <= int(one.positions[-1]) < 40
        one, other = (store.segment(head, 0, 0) for store in stores if store is not None)
        ends = [*range(4), *range(16, 24)]
        assert torch.allclose(one.keys[ends] + 5, other.keys[ends])
        assert torch.allclose(one.values[ends] + 5, other.values[ends])
        assert not one.bias[ends].any()
        assert one.positions[ends].tolist() == [*range(4), *range(40, 48)]


@pytest.mark.parametrize("name", SELECTORS)
def test_padding_never_enters_a_score(name: str) -> None:
    """Trap 6: a left-padded row of a batch keeps the slots, and says the tokens, that it does alone."""
    ids, mask = variants.left_padded((60, 43))

    def run(rows: slice, first: int) -> tuple[list[list[int]], list[list[list[int]]]]:
        given = {"attention_mask": mask[rows, first:], "max_new_tokens": 30, "do_sample": False}
        with tiny.capped_by(plugins.policy("am-halving", selector=name)) as memory:
            said = tiny.llama().generate(ids[rows, first:], past_key_values=memory, **given)[:, 60 - first :].tolist()
            assert len(memory.compactions) >= 1
            found = [[store for store in row.stores if store is not None] for row in memory.memory.sequences]
            return said, [[s.positions.tolist()[: s.settled[0]] for s in stores] for stores in found]

    together, alone = run(slice(0, 2), 0), (run(slice(0, 1), 0), run(slice(1, 2), 17))
    for row, (said, kept) in enumerate(alone):
        assert kept[0] == together[1][row]
        assert said[0] == together[0][row]


@pytest.mark.parametrize("name", SELECTORS)
def test_a_chunk_of_padding_yields_zeros(name: str) -> None:
    """Trap 6: where a row has pads only in a whole forward, attention gives it zeros, never NaN."""
    model, seen, (ids, mask) = tiny.llama(), list[torch.Tensor](), variants.left_padded((60, 7))
    watch = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with watch, tiny.capped_by(plugins.policy("am-halving", selector=name)) as memory:
        output = model(ids, attention_mask=mask, past_key_values=memory, logits_to_keep=1).logits
        assert [report.row for report in memory.compactions] == [0]
        assert memory.transcript(1) == ids[1, 53:].tolist()
    batched = torch.cat([each for each in seen if len(each) == 2], 1)
    assert batched.shape[1] == 60
    assert not batched[1, :53].any()
    assert bool((batched[1, 53:].abs().amax(-1) > 0).all())
    assert bool(output.isfinite().all())
