"""Rows of codes and scales: how far they are off, and that all code reads and writes the same ones."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentmem.attention import decode, quantised, ragged, runs
from agentmem.attention.quantised import Format
from agentmem.settings import SlotDtype
from agentmem.testing import peak_allocated

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [7, 16, 20, 64, 80, 96, 128]
LEVELS = {"any CPU": 0, "AVX2": 1, "AVX-512": 2}
CLOSE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def rows(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes_of_rows = torch.logspace(-4, 4, sizes[-2]).unsqueeze(-1)
    return (torch.randn(sizes, generator=generator) * sizes_of_rows).clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_a_number_is_off_by_half_a_scale_at_most(dim: int, dtype: torch.dtype) -> None:
    """And the scale is the largest of the group divided by 127, or less than 0.8 % more: bfloat16 has 8 bits."""
    form, given_rows = Format(dim), rows(3, 50, dim, dtype=dtype)

    found = form.decode(form.encode(given_rows))

    groups = given_rows.float().unflatten(-1, (-1, form.group))
    largest = groups.abs().amax(-1, keepdim=True)
    off = (found.unflatten(-1, (-1, form.group)) - groups).abs()
    assert bool((off <= largest / 127 * 1.008 / 2 + 1e-12).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_four_bits_are_off_by_half_a_scale_of_the_transformed_row(dim: int, dtype: torch.dtype) -> None:
    """By the oracle's own transform, a matrix in float64; so the row itself is off by no more in all."""
    form, given_rows = Format(dim, 4), rows(3, 50, dim, dtype=dtype)
    block = dim & -dim
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for i in range(block)] for j in range(block)]).double()
    matrix /= block**0.5

    found = form.decode(form.encode(given_rows))

    turned, back = (
        (each.double().unflatten(-1, (-1, block)) @ matrix).flatten(-2).unflatten(-1, (-1, form.group))
        for each in (given_rows, found)
    )
    largest = turned.abs().amax(-1, keepdim=True)
    assert bool(((back - turned).abs() <= largest / 7 * 1.008 / 2 + 1e-5 * largest + 1e-12).all())
    assert form.row_bytes == (dim + 1) // 2 + (dim + 1) // 2 % 2 + 2 * (dim // form.group)


@pytest.mark.parametrize("bits", [8, 4])
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32))
def test_any_finite_numbers_stay_finite(bits: int, numbers: list[float]) -> None:
    """From the smallest to the largest: with 8 bits signs and zeros stay; no row becomes longer than it may."""
    given_rows = torch.tensor([numbers], dtype=torch.float32).clamp(-1e36, 1e36)

    found = Format(32, bits).decode(Format(32, bits).encode(given_rows))

    assert bool(found.isfinite().all())
    if bits == 8:
        assert bool((found * given_rows >= 0).all())
        assert float(found.abs().max()) <= 1.008 * float(given_rows.abs().max())
    assert float(found.double().norm()) <= 1.4 * float(given_rows.double().norm()) + 1e-40


@pytest.mark.parametrize(("bits", "nan"), [(8, [32, 32, 32, 0]), (4, [64, 64, 64, 0])])
def test_what_is_not_finite_makes_its_group_nan_and_no_other(bits: int, nan: list[int]) -> None:
    """NaN, and infinity of both signs; a row of zeros stays one. With 4 bits, the row is the group."""
    given_rows = torch.ones(4, 64)
    given_rows[0, 3], given_rows[1, 40], given_rows[2, 5] = torch.nan, torch.inf, -torch.inf
    given_rows[3] = 0

    found = Format(64, bits).decode(Format(64, bits).encode(given_rows))

    assert found.isnan().sum(1).tolist() == nan
    assert not found[3].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_no_more_is_allocated_than_is_promised(dim: int, dtype: torch.dtype, bits: int) -> None:
    """Encoding and decoding, by the allocator's peak; what is given is not changed."""
    form, given_rows = Format(dim, bits), rows(3, 50, dim, dtype=dtype)
    before, encoded = given_rows.clone(), form.encode(given_rows)

    assert torch.equal(given_rows, before)
    assert encoded.shape == (3, 50, form.row_bytes)
    assert peak_allocated(lambda: form.encode(given_rows)) <= form.encode_bytes(150)
    assert peak_allocated(lambda: form.decode(encoded, dtype)) <= form.decode_bytes(150, dtype.itemsize)


# ---- attention over them


def run_of(
    slot_dtype: SlotDtype, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> tuple[runs.Run, runs.Run]:
    """Slots ``[h, n, d]`` as quantised ones, and the numbers that these stand for in float32."""
    forms = quantised.formats(slot_dtype, keys.shape[-1], values.shape[-1])
    assert forms is not None
    coded = [form.encode(each) for form, each in zip(forms, (keys, values), strict=True)]
    plain = [form.decode(each) for form, each in zip(forms, coded, strict=True)]
    return runs.Run(0, *coded, bias, None, forms), runs.Run(0, *plain, bias)


@pytest.mark.parametrize("slot_dtype", quantised.BITS)
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_that_of_the_numbers_they_stand_for(
    dtype: torch.dtype, dims: tuple[int, int], tokens: int, explicit: bool, slot_dtype: SlotDtype
) -> None:
    """A decode step and chunks, with β and fresh keys, fused and explicit."""
    make = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(2, 700, dim, generator=make).to(dtype) for dim in dims)
    coded, plain = run_of(slot_dtype, keys, values, torch.randn(2, 700, generator=make))
    queries = torch.randn(6, tokens, dims[0], generator=make).to(dtype)
    fresh = None
    if tokens > 1:
        fresh = runs.Fresh(*(torch.randn(2, tokens, dim, generator=make).to(dtype) for dim in dims))
    wide = fresh and runs.Fresh(fresh.keys.float(), fresh.values.float())

    found, _ = ragged.attend(queries, [coded], fresh, 0.2, explicit=explicit)
    wanted, _ = ragged.attend(queries.float(), [plain], wide, 0.2, explicit=True)

    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=2 * CLOSE[dtype], atol=2 * CLOSE[dtype])


@pytest.mark.parametrize("bits", quantised.BITS.values(), ids=quantised.BITS)
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (96, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_step_reads_and_writes_the_same_rows(
    dtype: torch.dtype, dims: tuple[int, int], threads: int, level: int, bits: tuple[int, int]
) -> None:
    """Unequal heads with β: the new slot is written to the bit as torch encodes it, and the output is the oracle's."""
    compiled = pytest.importorskip("agentmem.attention._decode", reason="installed without a C compiler")
    if not compiled.use(level):
        pytest.skip("this CPU lacks them")
    make, lengths, group = torch.Generator().manual_seed(2), [300, 1, 47], 3
    total = sum(lengths) + len(lengths)
    starts = [0, *accumulate(length + 1 for length in lengths)][:-1]
    forms = Format(dims[0], bits[0]), Format(dims[1], bits[1])
    keys, values = (form.encode(torch.randn(total, form.dim, generator=make).to(dtype)) for form in forms)
    bias = torch.randn(total, generator=make)
    queries, key, value = (
        torch.randn(1, heads, dim, generator=make).to(dtype)
        for heads, dim in ((group * 3, dims[0]), (3, dims[0]), (3, dims[1]))
    )
    places = [
        (keys[start:].data_ptr(), values[start:].data_ptr(), bias[start:].data_ptr(), length + 1)
        for start, length in zip(starts, lengths, strict=True)
    ]
    layout = decode.layout(places, decode.Form(dtype, 3, *dims, bits), keys, values, bias)
    output, before = torch.empty(1, group * 3, dims[1], dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decode.attend_each(queries, [(0, layout, lengths, True)], 0.2, output, (key, value))
    finally:
        torch.set_num_threads(before)
        assert any(compiled.use(best) for best in (2, 1, 0))

    for head, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        last, span = start + length, slice(start, start + length + 1)
        assert torch.equal(keys[last], forms[0].encode(key[0, head]))
        assert torch.equal(values[last], forms[1].encode(value[0, head]))
        slots = forms[0].decode(keys[span]).double(), forms[1].decode(values[span]).double()
        asked = slice(head * group, (head + 1) * group)
        weights = (queries[0, asked].double() @ slots[0].T * 0.2 + bias[span].double()).softmax(-1)
        wanted = (weights @ slots[1]).float()
        torch.testing.assert_close(output[0, asked].float(), wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("bits", [8, 4])
def test_compiled_rows_of_special_numbers_are_torch_s(bits: int) -> None:
    """Zeros, the smallest numbers, large ones and such as are not finite."""
    compiled = pytest.importorskip("agentmem.attention._decode", reason="installed without a C compiler")
    assert compiled is not None
    key, form = rows(1, 8, 64), Format(64, bits)
    key[0, 0], key[0, 1, 5], key[0, 2, 40], key[0, 3] = 0, torch.nan, -torch.inf, 1e-42
    keys = torch.zeros(8, form.row_bytes, dtype=torch.uint8)
    values = torch.zeros_like(keys)
    places = [(keys[head].data_ptr(), values[head].data_ptr(), 0, 1) for head in range(8)]
    layout = decode.layout(places, decode.Form(torch.float32, 8, 64, 64, (bits, bits)), keys, values)

    decode.attend_each(torch.zeros(1, 8, 64), [(0, layout, [0] * 8, False)], 1.0, torch.empty(1, 8, 64), (key, key))

    found, wanted = form.decode(keys), form.decode(form.encode(key[0]))
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize(("keys", "values"), [(4, 3), (3, 0), (0, 3), (5, 5)])
def test_codes_that_are_not_compiled_are_refused(keys: int, values: int) -> None:
    """Keys of fewer bits than values, one of the two in numbers, and a kind that does not exist."""
    compiled = pytest.importorskip("agentmem.attention._decode", reason="installed without a C compiler")
    nothing = (0, (0, 0))
    with pytest.raises(ValueError, match="not made for"):
        compiled.attend(0, keys, values, 1, 1.0, 0, 1, 1, 1, 64, 64, *nothing, *nothing, *nothing, 0, 0, 1 << 20, [])
