"""Held-out errors against float64 loops: by layer, by part, by span; and what measuring them allocates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from agentmem.attention.ragged import local_bytes
from agentmem.compaction.held_out import WORST_SPANS, HeldOut, split_references
from agentmem.contracts import Compaction, HeadCompaction, HeadSegment, Reference, Segment
from agentmem.planning import pricing
from agentmem.planning.model_shape import LayerShape
from agentmem.planning.pricing import HELD_OUT, checked_tokens
from agentmem.testing import peak_allocated
from oracles import attention as reference

LAYER = LayerShape(kv_heads=2, query_heads=4, key_dim=8, value_dim=8)
SCALE = 0.5


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def segment(slots: tuple[int, ...] = (12, 7), dtype: torch.dtype = torch.float32, value_dim: int = 8) -> Segment:
    """Two KV heads with an old β, without references."""
    heads = tuple(
        HeadSegment(
            draw(count, 8, seed=10 + head).to(dtype),
            draw(count, value_dim, seed=20 + head).to(dtype),
            draw(count, seed=30 + head),
            torch.arange(count, dtype=torch.int32),
        )
        for head, count in enumerate(slots)
    )
    return Segment(0, heads, (), SCALE, torch.Generator(), 0)


def part(tokens: int, seed: int, span: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32) -> Reference:
    """Reference queries of four query heads, a transposed view as attention hands them over."""
    return Reference(draw(tokens, 4, 8, seed=seed).to(dtype).transpose(0, 1), 1.0, "replay", span)


def compaction(value_dim: int = 8) -> Compaction:
    """The first head is fitted in every respect, the second keeps what its slots have."""
    kept = torch.tensor([0, 3, 4, 9, 11])
    fitted = HeadCompaction(kept, draw(5, seed=40), draw(5, value_dim, seed=41), draw(5, 8, seed=42))
    return Compaction((fitted, HeadCompaction(torch.tensor([1, 6]))))


def oracle(whole: Segment, fit: Compaction, held: Sequence[Reference]) -> tuple[float, float]:
    """Relative L2 error of the output over all heads and queries, mean absolute log-mass error; in float64 loops."""
    missed = total = 0.0
    masses = []
    for asked in held:
        for index, (head, result) in enumerate(zip(whole.heads, fit.heads, strict=True)):
            queries = asked.queries[2 * index : 2 * index + 2]
            keys = head.keys[result.kept] if result.keys is None else result.keys
            values = head.values[result.kept] if result.values is None else result.values
            bias = head.bias[result.kept] if result.bias is None else result.bias
            old = reference.Slots(head.keys, head.values, head.bias)
            new = reference.Slots(keys.to(head.keys.dtype), values.to(head.values.dtype), bias)
            before, after = (reference.attention(queries, [slots], None, SCALE).output for slots in (old, new))
            missed += float((after - before).square().sum())
            total += float(before.square().sum())
            gap = reference.log_mass(queries, new, SCALE) - reference.log_mass(queries, old, SCALE)
            masses.append(float(gap.abs().mean()))
    return (missed / total) ** 0.5, sum(masses) / len(masses)


# ---- what is held out


def test_the_oldest_eighth_of_every_part_is_held_out() -> None:
    """Views with the part's weight, source and share of its span; parts of fewer than eight tokens are fitted whole."""
    parts = (part(20, 1, (100, 120)), part(7, 2, (0, 7)), part(8, 3))
    held, fitted = split_references(tuple(replace(each, weight=2.0) for each in parts))

    assert HELD_OUT == 8
    assert [each.span for each in held] == [(100, 102), None]
    assert [each.span for each in fitted] == [(102, 120), (0, 7), None]
    assert [each.tokens for each in held] == [2, 1]
    assert torch.equal(held[0].queries, parts[0].queries[:, :2])
    assert torch.equal(fitted[0].queries, parts[0].queries[:, 2:])
    assert torch.equal(fitted[1].queries, parts[1].queries)
    for each in (*held, *fitted):
        assert (each.weight, each.source) == (2.0, "replay")
        assert any(
            each.queries.untyped_storage().data_ptr() == whole.queries.untyped_storage().data_ptr() for whole in parts
        )


def test_without_references_nothing_is_held_out() -> None:
    """No parts, or only short ones: errors are unknown, not 0."""
    assert split_references(()) == ((), ())
    held, _ = split_references((part(7, 1),))
    errors = HeldOut()

    assert held == ()
    assert errors.measure(segment(), compaction(), held) == (None, None)
    assert errors.worst_spans() == ()


# ---- errors


PARTS = (part(6, 1, (0, 6)), part(3, 2), part(5, 3, (50, 55)))


@pytest.mark.parametrize("held", [PARTS, PARTS[:1], PARTS[1:2]], ids=["three parts", "one", "one without span"])
@pytest.mark.parametrize("value_dim", [8, 5], ids=["fused", "explicit"])
def test_errors_are_those_of_float64_loops(held: tuple[Reference, ...], value_dim: int) -> None:
    """Over all parts and heads together, with β, values and keys that were fitted or kept."""
    whole, fit = segment(value_dim=value_dim), compaction(value_dim)

    assert HeldOut().measure(whole, fit, held) == pytest.approx(oracle(whole, fit, held), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_in_low_precision_are_those_of_what_is_committed(dtype: torch.dtype) -> None:
    """Float32 results are rounded as the commit will round them; the rest is the rounding of outputs."""
    whole, fit = segment(dtype=dtype), compaction()
    held = (part(6, 1, (0, 6), dtype),)

    assert HeldOut().measure(whole, fit, held) == pytest.approx(oracle(whole, fit, held), rel=0.02)


def test_keeping_everything_has_no_error() -> None:
    """All slots with their own β and values answer alike."""
    whole = segment()
    everything = Compaction(tuple(HeadCompaction(torch.arange(head.slots)) for head in whole.heads))

    assert HeldOut().measure(whole, everything, PARTS) == pytest.approx((0.0, 0.0), abs=1e-6)


# ---- spans


def test_spans_are_ranked_by_their_output_error_over_all_layers() -> None:
    """The worst first, three at most, each with both of its errors; parts without a span are in none."""
    held = (part(3, 1, (0, 3)), part(4, 2), *(part(2, 3 + n, (10 * n, 10 * n + 2)) for n in range(1, 5)))
    layers = [(segment(), compaction()), (replace(segment(), layer=1), spoiled())]
    errors = HeldOut()
    for whole, fit in layers:
        errors.measure(whole, fit, held)
    expected = {}
    for each in held:
        if each.span is not None:
            expected[each.span] = both_layers(layers, each)
    ranked = sorted(expected, key=lambda span: -expected[span][0])[:WORST_SPANS]
    worst = errors.worst_spans()

    assert [(each.start, each.stop) for each in worst] == ranked
    for each in worst:
        assert (each.output_error, each.log_mass_error) == pytest.approx(expected[each.start, each.stop], rel=1e-4)
    assert worst[0].output_error > worst[-1].output_error


def spoiled() -> Compaction:
    """Another compaction of the same segment."""
    return Compaction((HeadCompaction(torch.arange(4), draw(4, seed=50)), HeadCompaction(torch.tensor([0, 2, 5]))))


def both_layers(layers: Sequence[tuple[Segment, Compaction]], held: Reference) -> tuple[float, float]:
    """The oracle's errors of one part over two layers of the same slots."""
    squares = []
    masses = []
    for whole, fit in layers:
        error, mass = oracle(whole, fit, (held,))
        squares.append(error**2)
        masses.append(mass)
    # Both layers hold the same slots, so the outputs before weigh alike.
    return (sum(squares) / len(squares)) ** 0.5, sum(masses) / len(masses)


def test_one_span_has_nothing_to_be_compared_with() -> None:
    """A replay alone names no worst span."""
    errors = HeldOut()
    errors.measure(segment(), compaction(), PARTS[:2])

    assert errors.worst_spans() == ()
    errors.measure(segment(), compaction(), PARTS[2:])
    assert len(errors.worst_spans()) == 2


def test_queries_compared_a_few_at_a_time_give_the_same_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors of 5 or 6 tokens, compared all at once and two at a time, agree to rounding."""
    whole = HeldOut().measure(segment(), compaction(), PARTS)
    monkeypatch.setattr(pricing, "CHECKED", 4)

    assert checked_tokens(2, 6) == 2
    assert HeldOut().measure(segment(), compaction(), PARTS) == pytest.approx(whole, rel=1e-5)


# ---- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_dim", [64, 48], ids=["fused", "explicit"])
@pytest.mark.parametrize("parts", [1, 3])
def test_measuring_allocates_no_more_than_planned(parts: int, value_dim: int, dtype: torch.dtype) -> None:
    """The profiler's peak over all heads and parts is within the plan's price of the check."""
    layer = LayerShape(kv_heads=3, query_heads=9, key_dim=64, value_dim=value_dim)
    heads = tuple(
        HeadSegment(
            draw(300, 64, seed=head).to(dtype),
            draw(300, value_dim, seed=head).to(dtype),
            torch.zeros(300),
            torch.arange(300),
        )
        for head in range(3)
    )
    whole = Segment(0, heads, (), 0.125, torch.Generator(), 0)
    kept = torch.arange(0, 300, 2)
    fits = Compaction(tuple(HeadCompaction(kept, torch.zeros(150), draw(150, value_dim).to(dtype)) for _ in heads))
    held = [Reference(draw(128 // parts, 9, 64, seed=n).to(dtype).transpose(0, 1)) for n in range(parts)]
    planned = local_bytes(layer, checked_tokens(3, 128), 300, 300, dtype.itemsize, fused=value_dim == 64)

    assert 0 < peak_allocated(lambda: HeldOut().measure(whole, fits, held)) <= planned
