"""Re-basing without a model: stored keys turn as a float64 oracle says, and the position map keeps its invariants."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentmem.memory.rotation import (
    Rotation,
    rebased,
    shift_keys,
    widest_gap,
)
from agentmem.planning.rebasing import BLOCK, map_scratch, shift_scratch
from agentmem.testing import peak_allocated
from oracles.attention import Slots, attention
from oracles.rope import fits, moved, places

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FREQUENCIES = [1.0, 0.31622776, 0.1, 0.031622775, 0.01, 0.0031622777, 0.001, 0.00031622776]


def rotation(frequencies: list[float] = FREQUENCIES) -> Rotation:
    """One whose frequencies are float32 numbers, as a model's are."""
    return Rotation(torch.tensor(frequencies, dtype=torch.float32).double())


def random_keys(count: int, dim: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal keys of that dtype."""
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(0)).to(dtype)


def spread(count: int, below: int = 120_000, seed: int = 0) -> torch.Tensor:
    """Different positions, ascending, far into a long context."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(below, generator=generator)[:count].sort().values.to(torch.int32)


def shifted(keys: torch.Tensor, positions: torch.Tensor, deltas: torch.Tensor, by: Rotation) -> torch.Tensor:
    """A copy of the keys, shifted."""
    result = keys.clone()
    shift_keys(result, positions, deltas, by)
    return result


def oracle(keys: torch.Tensor, positions: torch.Tensor, deltas: torch.Tensor, by: Rotation) -> torch.Tensor:
    """The same in float64 by plain loops."""
    rows = zip(keys.double().tolist(), positions.tolist(), deltas.tolist(), strict=True)
    return torch.tensor([moved(*row, by.frequencies.tolist()) for row in rows], dtype=torch.float64)


def pair_norms(keys: torch.Tensor, width: int) -> torch.Tensor:
    """``[n, d]``: the length of the pair that each dim belongs to; a dim that never turns is its own pair."""
    norms = keys.double().abs()
    norms[:, :width] = torch.hypot(*norms[:, :width].chunk(2, dim=1)).repeat(1, 2)
    return norms


def turning_error(dtype: torch.dtype) -> float:
    """Of one turn relative to the pair, before it is rounded to ``dtype``.

    Cosine and sine within one unit, two products and a sum within half a unit each of |low| + |high| ≤ √2 pairs.
    """
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return 2 * 2**0.5 * unit


# ---- keys


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 24])
def test_a_shift_is_the_oracle_s_with_one_rounding(dtype: torch.dtype, dim: int) -> None:
    """Far positions, either direction, partial rotary: off by one rounding to the keys' dtype and one turn's error."""
    keys, positions, by = random_keys(150, dim, dtype), spread(150), rotation()
    deltas = torch.randint(-90_000, 5_000, (150,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    expected = oracle(keys, positions, deltas, by)

    got = shifted(keys, positions, deltas, by)

    assert got.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + torch.finfo(dtype).tiny
    assert ((got.double() - expected).abs() <= bound + turning_error(dtype) * pair_norms(keys, by.width)).all()


def test_a_shift_of_nothing_keeps_every_bit() -> None:
    """Rows with delta 0 keep their bits between others that move: negative zeros, infinities and NaN included."""
    keys, positions = random_keys(2 * BLOCK + 5), spread(2 * BLOCK + 5)
    keys[0], keys[2, ::2], keys[4, 3], keys[6, 9] = -0.0, -0.0, float("inf"), float("nan")
    deltas = torch.zeros(len(keys), dtype=torch.int32)
    deltas[1:BLOCK:2] = -7

    got = shifted(keys, positions, deltas, rotation())

    assert torch.equal(got[deltas == 0].view(torch.int32), keys[deltas == 0].view(torch.int32))
    assert (got[1:BLOCK:2] != keys[1:BLOCK:2]).any(dim=1).all()


def test_dims_beyond_the_width_keep_every_bit() -> None:
    """Where rotary is partial, the dims that never turn are not even rounded; positions and deltas are not written."""
    keys, positions = random_keys(70, 24, torch.bfloat16), spread(70)
    deltas = torch.full((70,), -1000, dtype=torch.int32)
    before = positions.clone()

    got = shifted(keys, positions, deltas, rotation())

    assert torch.equal(got[:, 16:], keys[:, 16:])
    assert not torch.equal(got[:, :16], keys[:, :16])
    assert torch.equal(positions, before)
    assert (deltas == -1000).all()


def test_keys_inside_a_larger_store_are_shifted_in_place() -> None:
    """A strided view works, an expanded delta too, and neighbouring slots are left alone."""
    store = random_keys(40, 48)
    before, positions = store.clone(), spread(20)
    deltas = torch.tensor(-50, dtype=torch.int32).expand(20)

    shift_keys(store[10:30, 16:32], positions, deltas, rotation())

    assert torch.equal(store[10:30, 16:32], shifted(before[10:30, 16:32], positions, deltas, rotation()))
    store[10:30, 16:32] = before[10:30, 16:32]
    assert torch.equal(store, before)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_do_not_change_the_result(block: int) -> None:
    """However many slots are turned at once, the bits are the same."""
    keys, positions = random_keys(150), spread(150)
    deltas = -(positions // 2)
    whole = shifted(keys, positions, deltas, rotation())

    shift_keys(keys, positions, deltas, rotation(), block=block)

    assert torch.equal(keys, whole)


def test_a_window_may_be_shifted_below_zero() -> None:
    """Only distances matter inside a sliding window: its oldest slots may stand at negative positions."""
    keys, positions = random_keys(32), torch.arange(100, 132, dtype=torch.int32)
    deltas = torch.full((32,), -120, dtype=torch.int32)

    error = (shifted(keys, positions, deltas, rotation()) - oracle(keys, positions, deltas, rotation())).abs()

    assert (error <= 2 * turning_error(torch.float32) * pair_norms(keys, 16)).all()


def test_two_shifts_are_one() -> None:
    """Shifting by a and then by b is shifting by a + b, and back again is nothing, to the error of each turn."""
    keys, positions, by = random_keys(100), spread(100), rotation()
    first, second = -(positions // 3), -(positions // 5)
    bound = turning_error(torch.float32) * pair_norms(keys, by.width)

    halfway = shifted(keys, positions, first, by)
    twice = shifted(halfway, positions + first, second, by)
    back = shifted(halfway, positions + first, -first, by)

    assert ((twice - shifted(keys, positions, first + second, by)).abs() <= 3 * bound).all()
    assert ((back - keys).abs() <= 2 * bound).all()
    assert not torch.equal(halfway, keys)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_shifts_add_no_error_of_phase(dtype: torch.dtype) -> None:
    """Each costs a rounding of the key and nothing that grows with the position: angles are never added up."""
    shifts, by = 100, rotation()
    keys, positions = random_keys(40, 16, dtype), spread(40) + 100_000
    start, held = positions, keys.clone()
    for index in range(shifts):
        deltas = torch.full((40,), -997 + 3 * index, dtype=torch.int32)
        shift_keys(held, positions, deltas, by)
        positions = positions + deltas

    error = (held.double() - oracle(keys, start, positions - start, by)).abs()

    one = turning_error(dtype) + 2**0.5 * torch.finfo(dtype).eps / 2 * (dtype.itemsize < 4)
    # Lengths may drift too, which the last factor allows for: (1 + one)^100 < 1 + 1.3 * 100 * one.
    assert (error <= 1.3 * shifts * one * pair_norms(keys, by.width)).all()


def test_attention_does_not_see_a_shift_of_all() -> None:
    """Where a query and all slots are shifted alike, the output stays.

    Frequencies are powers of two here, so that no angle is rounded and the invariant holds to float64.
    """
    by, delta = rotation([1.0, 0.5, 0.125, 0.015625]), -4321
    keys, queries, values = random_keys(30, 8, torch.float64), 2 * random_keys(3, 8, torch.float64), random_keys(30, 4)
    places_of_keys, places_of_queries = spread(30, 9000) + 5000, torch.tensor([15_000, 15_001, 15_002])
    all_alike = [torch.full((count,), delta, dtype=torch.int32) for count in (30, 3)]

    def output(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        return attention(queries[None], [Slots(keys, values.double())], None, 8**-0.5).output

    together = output(
        shifted(keys, places_of_keys, all_alike[0], by), shifted(queries, places_of_queries, all_alike[1], by)
    )

    torch.testing.assert_close(together, output(keys, queries), rtol=0, atol=1e-12)
    keys_alone = output(shifted(keys, places_of_keys, all_alike[0], by), queries)
    assert (keys_alone - together).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("slots", "width", "dim"), [(1, 2, 2), (5, 8, 16), (BLOCK, 64, 64), (300, 48, 64)])
def test_a_shift_allocates_what_it_says(dtype: torch.dtype, slots: int, width: int, dim: int) -> None:
    """Every byte is within the promise, which is at most half too much where it matters."""
    keys, positions = random_keys(slots, dim, dtype), spread(slots)
    deltas = torch.full((slots,), -3, dtype=torch.int32)
    by = rotation([0.5**pair for pair in range(width // 2)])
    promised = shift_scratch(slots, width, dtype.itemsize)

    peak = peak_allocated(lambda: shift_keys(keys, positions, deltas, by))

    assert 0 < peak <= promised
    assert slots < BLOCK or promised <= 1.5 * peak
    assert promised <= shift_scratch(BLOCK, width, dtype.itemsize)


# ---- positions

FIRST, START = 4, 400
heads_of_slots = st.lists(st.lists(st.integers(FIRST, START - 1), unique=True, max_size=24), min_size=1, max_size=4)
spans = st.integers(24, START - FIRST)


def as_positions(slots: list[int]) -> torch.Tensor:
    """Positions of one head, in the order given."""
    return torch.tensor(slots, dtype=torch.int32)


def goes_to(slots: list[int], end: int, gap: int, start: int = START) -> list[int]:
    """Where a head's slots are after re-basing."""
    positions = as_positions(slots)
    return (positions + rebased(positions, start, end, gap)).tolist()


@given(heads=heads_of_slots, span=spans)
def test_the_gap_is_the_widest_that_fits_every_head(heads: list[list[int]], span: int) -> None:
    """No greater one fits, and it is the whole span where nothing is too wide; as trying each in turn finds."""
    expected = max(gap for gap in range(1, span + 1) if all(fits(head, START, span, gap) for head in heads))

    assert widest_gap(map(as_positions, heads), START, span) == expected


@given(heads=heads_of_slots, span=spans)
def test_slots_go_where_the_oracle_puts_them(heads: list[list[int]], span: int) -> None:
    """Whatever order they are stored in: pinned slots stand before older ones."""
    gap = widest_gap(map(as_positions, heads), START, span)

    for head in heads:
        assert goes_to(head, FIRST + span, gap) == places(head, START, FIRST + span, gap)


@given(heads=heads_of_slots, span=spans)
def test_order_and_runs_are_kept(heads: list[list[int]], span: int) -> None:
    """Slots stay in strict order between prefix and recent, none goes up, runs keep their inner distances."""
    gap = widest_gap(map(as_positions, heads), START, span)

    for head in map(sorted, heads):
        after = goes_to(head, FIRST + span, gap)
        distances = list(zip(pairwise([*head, START]), pairwise([*after, FIRST + span]), strict=True))

        assert all(FIRST <= new <= old for old, new in zip(head, after, strict=True))
        assert all(right - left >= 1 for _, (left, right) in distances)
        assert all(
            right - left == after - before if after - before <= gap else gap <= right - left <= after - before
            for (before, after), (left, right) in distances
        )
        wide = [right - left > gap for _, (left, right) in distances]
        moved_apart = [before != left for (before, _), (left, _) in distances]
        # A distance beyond the gap is left only below the first slot that moves.
        assert not any(wider and moving for wider, moving in zip(wide, moved_apart, strict=True))


@given(heads=heads_of_slots, span=spans)
def test_re_basing_twice_is_re_basing_once(heads: list[list[int]], span: int) -> None:
    """With the same goal nothing moves any more, with the old gap and with the gap found anew."""
    end = FIRST + span
    gap = widest_gap(map(as_positions, heads), START, span)
    once = [goes_to(head, end, gap) for head in heads]
    anew = widest_gap(map(as_positions, once), end, span)

    assert anew >= gap
    for head in once:
        assert goes_to(head, end, gap, start=end) == goes_to(head, end, anew, start=end) == head


def test_slots_without_gaps_need_one_position_each() -> None:
    """A run as long as the span fits at gap 1 and moves as one block; one slot more is refused with the remedy."""
    run = list(range(100, 130))

    assert widest_gap([as_positions(run)], 130, 30) == 30
    assert goes_to(run, 34, 1, start=130) == list(range(4, 34))
    assert widest_gap([as_positions([*run[:10], *range(200, 220)])], 300, 30) == 1
    with pytest.raises(ValueError, match=r"30 slots cannot be re-based into 29 positions.*compact to fewer"):
        widest_gap([as_positions([]), as_positions(run)], 130, 29)


def test_heads_without_slots_ask_for_nothing() -> None:
    """An empty segment fits into no positions at all, and has no deltas."""
    assert widest_gap([as_positions([])], 50, 0) == 1
    assert rebased(as_positions([]), 50, 10, 1).tolist() == []


def test_a_lone_old_slot_stays() -> None:
    """It is not brought closer than it has to be, however small the gap that other heads need."""
    assert goes_to([20], 300, 2, start=10_000) == [20]
    assert goes_to([20, 9_000, 9_001], 300, 2, start=10_000) == [20, 297, 298]


@pytest.mark.parametrize(
    ("positions", "start", "end", "message"),
    [
        ([5, 9], 20, 21, "begins at position 20 and cannot be re-based to 21.*choose a lower end"),
        ([5, 9, 5], 20, 10, "0 positions apart.*one head's slots at a time"),
        ([5, 20], 20, 10, "0 positions apart; they must differ and lie below 20"),
        ([5, 26], 20, 10, "-6 positions apart"),
    ],
)
def test_positions_out_of_order_are_refused(positions: list[int], start: int, end: int, message: str) -> None:
    """Equal positions, slots of the recent block, and a goal beyond the start: with value, limit and remedy."""
    with pytest.raises(ValueError, match=message):
        rebased(as_positions(positions), start, end, 1)


@pytest.mark.parametrize("slots", [1, 10, 700])
def test_the_map_allocates_what_it_says(slots: int) -> None:
    """For every head after the other, sorted or not, whatever has to be searched."""
    heads = [spread(slots, 20_000, seed).flip(0) for seed in range(3)]

    searched = peak_allocated(lambda: widest_gap(heads, 20_000, slots + slots // 2 + 1))
    mapped = peak_allocated(lambda: rebased(heads[0], 20_000, 15_000, 2))

    assert max(searched, mapped) <= map_scratch(slots) <= max(1.5 * searched, 100)
