"""A decode step in compiled code: the oracle's numbers on every set of instructions, and torch's kernel without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from agentmem.attention import decode, ragged
from agentmem.attention.ragged import attend, fused_bytes
from agentmem.attention.runs import Run
from agentmem.planning.model_shape import LayerShape
from agentmem.testing import peak_allocated
from oracles import attention as reference
from support.matrices import matrix

_decode = pytest.importorskip("agentmem.attention._decode", reason="installed without a C compiler")

LEVELS = {"any CPU": 0, "AVX2": 1, "AVX-512": 2}
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""What an output may be off by per unit of its size: float32 sums, and one rounding into the dtype of storage."""


@pytest.fixture(params=LEVELS, autouse=True)
def _instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    if not _decode.use(LEVELS[request.param]):
        pytest.skip("this CPU lacks them")
    yield
    for level in (2, 1, 0):
        if _decode.use(level):
            break


def problem(
    held: tuple[int, ...],
    group: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    biased: bool = True,
    room: int = 0,
) -> tuple[torch.Tensor, list[Run], list[reference.Slots]]:
    """Random queries, runs whose heads lie ``room`` slots apart, and the same slots for the oracle."""
    draw = torch.Generator().manual_seed(len(held) + group + dim)
    queries = torch.randn(len(held) * group, 1, dim, generator=draw).to(dtype)
    runs, heads = [], []
    for first, count in enumerate(held):
        keys, values = (torch.randn(1, count + room, dim, generator=draw).to(dtype)[:, :count] for _ in range(2))
        bias = 2 * torch.randn(1, count + room, generator=draw)[:, :count] if biased else None
        runs.append(Run(first, keys, values, bias))
        heads.append(reference.Slots(keys[0], values[0], None if bias is None else bias[0]))
    return queries, runs, heads


def error(queries: torch.Tensor, runs: list[Run], heads: list[reference.Slots], scale: float) -> float:
    """The largest difference from the float64 oracle, as a share of what the dtype allows."""
    assert ragged._compiled(queries, runs)
    output, _ = attend(queries, runs, None, scale)
    assert output.dtype == queries.dtype
    truth = reference.attention(queries, heads, None, scale).output
    return float(((output.double() - truth).abs() / (1e-6 + DTYPES[output.dtype] * truth.abs().clamp(min=0.5))).max())


@matrix(dtype=list(DTYPES), dim=[16, 48, 64, 80, 128, 256], group=[1, 2, 3, 4, 5, 7, 9], biased=[False, True])
def test_every_shape_is_the_oracle_s(dtype: torch.dtype, dim: int, group: int, *, biased: bool) -> None:
    """Groups that leave a rest of four, dims that leave a rest of two vectors, tiles and pieces that are not full."""
    assert error(*problem((1, 129, 300), group, dim, dtype, biased=biased, room=5), dim**-0.5) < 1


@pytest.mark.parametrize("dims", [(64, 32), (32, 80), (48, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_may_be_wider_or_narrower_than_keys(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    """The output has the values' width."""
    queries, runs, heads = problem((300, 40), 3, dims[0], dtype)
    _, others, wide = problem((300, 40), 3, dims[1], dtype)
    runs = [Run(run.first, run.keys, other.values, run.bias) for run, other in zip(runs, others, strict=True)]
    heads = [reference.Slots(head.keys, other.values, head.bias) for head, other in zip(heads, wide, strict=True)]
    assert error(queries, runs, heads, dims[0] ** -0.5) < 1


@matrix(
    dtype=list(DTYPES),
    held=[(1,), (255,), (256, 256, 256), (257, 2000), (4096,), (10, 5000, 10)],
    threads=[1, 2, 3, 8],
)
def test_any_number_of_threads_gives_the_answer(dtype: torch.dtype, held: tuple[int, ...], threads: int) -> None:
    """However the heads are cut into pieces."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert error(*problem(held, 3, 64, dtype), 0.125) < 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0, 100.0])
def test_flat_and_peaked_attention(scale: float) -> None:
    """Logits of thousands make one slot take all; none of them overflows."""
    queries, runs, heads = problem((700, 40), 3, 64, biased=False)
    assert error(queries, runs, heads, scale) < 10 * max(1.0, scale)


def test_a_far_better_slot_at_the_end_takes_all() -> None:
    """What was summed before shrinks to nothing when the peak rises."""
    queries, runs, heads = problem((600,), 3, 64)
    assert runs[0].bias is not None
    runs[0].bias[0, -1] = 500.0
    assert error(queries, runs, heads, 0.125) < 1
    assert torch.allclose(attend(queries, runs, None, 0.125)[0], runs[0].values[:, -1], atol=1e-6)


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_a_dtype_is_read_and_written_as_it_is(dtype: torch.dtype, dim: int) -> None:
    """One slot's values are the output: the smallest, the largest, zeros of both signs and infinities come back."""
    kept = torch.finfo(dtype)
    odd = torch.tensor([0.0, -0.0, kept.tiny, -kept.tiny, kept.max, kept.min, torch.inf, -torch.inf, torch.nan, 1 / 3])
    small = kept.tiny * torch.linspace(-1, 1, dim - 10)
    values = torch.cat((odd, small)).to(dtype).expand(1, 1, dim)
    run = Run(0, torch.randn(1, 1, dim).to(dtype), values.contiguous())
    output, _ = attend(torch.randn(1, 1, dim).to(dtype), [run], None, 0.125)
    assert ragged._compiled(output, [run])
    assert torch.equal(output[0, 0].nan_to_num(12.0), values[0, 0].nan_to_num(12.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """To the nearest, ties to even, down to the smallest numbers: two equal slots are averaged exactly before."""
    step = torch.finfo(dtype)
    draw = torch.Generator().manual_seed(0)
    for size in (1.0, 300.0, step.tiny, step.tiny * step.eps * 8):
        values = (size * torch.randn(1, 2, 256, generator=draw)).to(dtype)
        run, queries = Run(0, torch.zeros(1, 2, 256, dtype=dtype), values), torch.zeros(1, 1, 256, dtype=dtype)
        mean = (values[0, 0].double() + values[0, 1].double()) / 2
        assert torch.equal(attend(queries, [run], None, 1.0)[0][0, 0], mean.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_number_stays_no_number(dtype: torch.dtype) -> None:
    """A NaN among the keys is seen in the output of its head, as in torch's kernel, and in no other's."""
    queries, runs, _ = problem((300, 300), 2, 64, dtype)
    runs[1].keys[0, 170, 3] = torch.nan
    output, _ = attend(queries, runs, None, 0.125)
    assert not output[:2].isnan().any()
    assert output[2:].isnan().all()


def test_slots_that_count_nothing_come_first() -> None:
    """A tile, or a piece, whose slots all have a β of minus infinity takes no part."""
    queries, runs, heads = problem((700,), 3, 64)
    assert runs[0].bias is not None
    runs[0].bias[0, :400] = -torch.inf
    assert error(queries, runs, heads, 0.125) < 1


def test_queries_that_are_no_number() -> None:
    """Nothing is made up for them."""
    queries, runs, _ = problem((300,), 2, 64)
    output, _ = attend(queries * torch.nan, runs, None, 0.125)
    assert output.isnan().all()


def test_queries_may_lie_apart() -> None:
    """A strided view is read as what it shows."""
    queries, runs, heads = problem((50, 50), 2, 64)
    apart = torch.stack((queries, queries + 1), -1)[..., 0]
    assert not apart.is_contiguous()
    assert error(apart, runs, heads, 0.125) < 1


def test_what_it_is_not_made_for_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, dims that are no whole vectors, slots that lie apart, no slots."""
    queries, runs, _ = problem((20, 20), 2, 64)
    double = [Run(run.first, run.keys.double(), run.values.double(), run.bias) for run in runs]
    half = [Run(run.first, run.keys.half(), run.values.half(), run.bias) for run in runs]
    narrow = [Run(run.first, run.keys[..., :24], run.values[..., :24], run.bias) for run in runs]
    apart = [Run(run.first, run.keys[:, ::2], run.values[:, ::2], None) for run in runs]
    assert ragged._compiled(queries, runs)
    assert ragged._compiled(queries.half(), half)
    assert not ragged._compiled(queries.double(), double)
    assert not ragged._compiled(queries[..., :24], narrow)
    assert not ragged._compiled(queries, apart)
    assert not ragged._compiled(queries, half)  # a store keeps the dtype that it began with
    assert not ragged._compiled(queries, [Run(0, runs[0].keys.to("meta"), runs[0].values.to("meta"))])
    spread = torch.zeros(1, 40)[:, ::2]
    assert not ragged._compiled(queries, [Run(0, runs[0].keys, runs[0].values, spread)])
    assert not ragged._compiled(queries, [Run(0, runs[0].keys[:, :0], runs[0].values[:, :0])])
    monkeypatch.setattr(decode, "COMPILED", False)
    assert not ragged._compiled(queries, runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_s_kernel_agrees(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without a compiler computes the same."""
    queries, runs, _ = problem((700, 300), 3, 64, dtype)
    compiled, _ = attend(queries, runs, None, 0.125)
    monkeypatch.setattr(decode, "COMPILED", False)
    assert torch.allclose(attend(queries, runs, None, 0.125)[0], compiled, atol=2 * DTYPES[dtype], rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize(("held", "group"), [((64, 64), 3), ((1, 1, 1), 9), ((5000, 100), 4), ((900,) * 8, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_scratch_is_in_the_plan(dtype: torch.dtype, held: tuple[int, ...], group: int, threads: int) -> None:
    """The profiler's peak stays within what a plan sets aside, with any number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        queries, runs, _ = problem(held, group, 64, dtype)
        apart = torch.stack((queries, queries), -1)[..., 0]
        peak = peak_allocated(lambda: attend(apart, runs, None, 0.125))
        layer = LayerShape(len(held), len(held) * group, 64, 64, None)
        assert peak - queries.nbytes <= fused_bytes(layer, 1, max(held), dtype.itemsize)
    finally:
        torch.set_num_threads(before)


def test_unknown_instructions_are_refused() -> None:
    """A level that does not exist changes nothing."""
    assert not _decode.use(3)
    assert not _decode.use(-1)
