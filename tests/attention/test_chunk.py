"""A chunk's attention on AMX tiles: the oracle's numbers in every shape, whatever the threads, in a stated scratch."""

from __future__ import annotations

import pytest
import torch

from agentmem.attention import ragged
from agentmem.attention.ragged import attend, fused_bytes
from agentmem.attention.runs import Fresh, Run
from agentmem.planning.model_shape import LayerShape
from agentmem.testing import peak_allocated
from oracles import attention as reference

_chunk = pytest.importorskip("agentmem.attention._chunk", reason="installed without a C compiler")

needs_tiles = pytest.mark.skipif(not _chunk.available(), reason="this CPU has no AMX")
ROUNDING = 2**-7
"""Of an output: bfloat16 weights of at most 1 and one rounding of the result, 2**-8 of the largest each."""


def problem(
    held: tuple[int, ...], group: int, tokens: int, dims: tuple[int, int], *, biased: bool = True
) -> tuple[torch.Tensor, list[Run], Fresh]:
    """Random bfloat16 queries, runs and fresh keys as a model hands them: heads of a token side by side."""
    draw = torch.Generator().manual_seed(sum(held) + group + tokens)

    def some(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw).bfloat16()

    heads = len(held)
    runs = [
        Run(head, some(1, n, dims[0]), some(1, n, dims[1]), 2 * torch.randn(1, n, generator=draw) if biased else None)
        for head, n in enumerate(held)
    ]
    fresh = Fresh(*(some(tokens, heads, dim).transpose(0, 1) for dim in dims))
    return some(tokens, heads * group, dims[0]).transpose(0, 1), runs, fresh


def truth(queries: torch.Tensor, runs: list[Run], fresh: Fresh, scale: float, window: int | None) -> torch.Tensor:
    """The oracle's answer."""
    heads = [
        reference.Slots(run.keys[0], run.values[0], None if run.bias is None else run.bias[0])
        for run in runs
    ]  # fmt: skip
    own = [reference.Slots(key, value) for key, value in zip(fresh.keys, fresh.values, strict=True)]
    return reference.attention(queries, heads, own, scale, window).output


def error(asked: tuple[torch.Tensor, list[Run], Fresh], scale: float, window: int | None = None) -> float:
    """The largest difference from the oracle, as a share of what rounding allows."""
    queries, runs, fresh = asked
    assert ragged._tiles(queries, runs, fresh)
    output, received = attend(queries, runs, fresh, scale, window=window)
    assert received is None
    assert output.dtype == torch.bfloat16
    right = truth(queries, runs, fresh, scale, window)
    largest = max(float(source.values.abs().max()) for source in (*runs, fresh) if source.values.numel())
    return float((output.double() - right).abs().max()) / (ROUNDING * largest)


@needs_tiles
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "β"])
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (80, 80), (128, 128), (24, 8), (32, 96), (65, 33)], ids=str)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_shape_is_the_oracle_s(group: int, dims: tuple[int, int], *, biased: bool) -> None:
    """Dims that are no whole tiles, values wider and narrower than keys, slots that leave a rest of a tile."""
    assert error(problem((0, 1, 47), group, 19, dims, biased=biased), 1.5 * dims[0] ** -0.5) < 1


@needs_tiles
@pytest.mark.parametrize("tokens", [2, 16, 33, 130, 300])
@pytest.mark.parametrize("held", [0, 255, 256, 257, 600])
def test_blocks_of_slots_and_of_tokens(held: int, tokens: int) -> None:
    """Around the ends of the blocks that are packed at a time and of the rows of an item."""
    assert error(problem((held,), 1, tokens, (32, 32)), 0.25) < 1


@needs_tiles
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 100, 256, 290, 1000])
def test_windows(window: int) -> None:
    """Slots that a window hides are not seen, wherever it ends within the blocks."""
    assert error(problem((280,), 2, 70, (32, 32), biased=False), 0.25, window) < 1


@needs_tiles
@pytest.mark.parametrize("scale", [0.0, 3.0, 100.0])
def test_flat_and_peaked_attention(scale: float) -> None:
    """Logits of thousands make one slot take all; none of them overflows."""
    queries, runs, fresh = problem((300,), 2, 40, (32, 32), biased=False)
    assert error((queries, runs, fresh), scale) < 1


@needs_tiles
def test_slots_that_count_nothing() -> None:
    """Whole blocks of β of minus infinity, the first one too, take no part."""
    queries, runs, fresh = problem((700,), 2, 20, (32, 32))
    assert runs[0].bias is not None
    runs[0].bias[0, :600] = -torch.inf
    assert error((queries, runs, fresh), 0.25) < 1


@needs_tiles
def test_no_number_stays_no_number() -> None:
    """A key that is NaN is seen in the outputs of its head and of tokens from it on, and in no others."""
    queries, runs, fresh = problem((40, 40), 2, 50, (32, 32))
    fresh.keys[1, 20, 3] = torch.nan
    output, _ = attend(queries, runs, fresh, 0.25)
    assert not output[:2].isnan().any()
    assert not output[2:, :20].isnan().any()
    assert output[2:, 20:].isnan().all()


@needs_tiles
def test_queries_that_see_all() -> None:
    """Without fresh keys every token sees every slot."""
    queries, runs, _ = problem((40, 300), 2, 9, (32, 32))
    output, _ = attend(queries, runs, None, 0.25)
    heads = [reference.Slots(run.keys[0], run.values[0], run.bias[0]) for run in runs if run.bias is not None]
    right = reference.attention(queries, heads, None, 0.25).output
    assert float((output.double() - right).abs().max()) < 4 * ROUNDING


@needs_tiles
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    """A row's answer depends on its own keys alone."""
    asked, before = problem((700, 100, 300), 3, 200, (64, 64)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, _ = attend(*asked, 0.125)
        torch.set_num_threads(threads)
        assert torch.equal(attend(*asked, 0.125)[0], alone)
    finally:
        torch.set_num_threads(before)


@needs_tiles
def test_a_token_s_answer_does_not_depend_on_those_after_it() -> None:
    """The first tokens of a chunk get bit for bit what they get as a chunk of their own."""
    queries, runs, fresh = problem((300,), 3, 150, (64, 64))
    whole, _ = attend(queries, runs, fresh, 0.125)
    first, _ = attend(queries[:, :47], runs, Fresh(fresh.keys[:, :47], fresh.values[:, :47]), 0.125)
    assert torch.equal(first, whole[:, :47])


@needs_tiles
@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize(
    ("held", "dims"), [((64, 64), (64, 64)), ((3000,), (128, 128)), ((10, 900), (24, 80))], ids=str
)
def test_its_scratch_is_in_the_plan(held: tuple[int, ...], dims: tuple[int, int], threads: int) -> None:
    """The profiler's peak stays within what a plan sets aside, with any number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        asked = problem(held, 4, 100, dims)
        peak = peak_allocated(lambda: attend(*asked, 0.125))
        layer = LayerShape(len(held), len(held) * 4, *dims, None)
        assert peak - len(held) * 4 * 100 * dims[1] * 2 <= fused_bytes(layer, 100, max(held), 2)
        assert peak >= threads * _chunk.scratch_bytes(*dims)
    finally:
        torch.set_num_threads(before)


@needs_tiles
def test_what_it_is_not_made_for_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, numbers of a row that lie apart, groups of more rows than it packs, CPUs without AMX."""
    queries, runs, fresh = problem((20, 20), 2, 9, (64, 64))
    assert ragged._tiles(queries, runs, fresh)
    assert not ragged._tiles(queries.half(), runs, fresh)
    assert not ragged._tiles(queries[..., ::2], runs, fresh)
    assert not ragged._tiles(queries, runs, Fresh(fresh.keys.half(), fresh.values.half()))
    assert not ragged._tiles(queries, runs, Fresh(fresh.keys[..., ::2], fresh.values))
    assert not ragged._tiles(queries, [Run(0, runs[0].keys, runs[0].values, torch.zeros(1, 40)[:, ::2])], fresh)
    assert not ragged._tiles(queries.to("meta"), runs, fresh)
    assert not ragged._tiles(queries.repeat(65, 1, 1), runs, fresh)
    monkeypatch.setattr(ragged, "TILED", False)
    assert not ragged._tiles(queries, runs, fresh)


@needs_tiles
def test_too_little_scratch_is_refused() -> None:
    """Before anything is written."""
    address = torch.zeros(64).data_ptr()
    size = 2 * _chunk.scratch_bytes(64, 64)
    rest = (0.1, (1, 1), (1, 1), 1, 1)
    with pytest.raises(ValueError, match="does not do"):
        _chunk.attend(address, address, address, size - 1, 2, *rest, 1, 64, 64, 0, [])
    with pytest.raises(ValueError, match="does not do"):
        _chunk.attend(address, address, address, size, 2, *rest, 129, 64, 64, 0, [])
    with pytest.raises(TypeError, match="a run"):
        _chunk.attend(address, address, address, size, 2, *rest, 1, 64, 64, 0, [(0, 1)])


@pytest.mark.skipif(_chunk.available(), reason="this CPU has AMX")
def test_without_tiles_it_refuses() -> None:
    """Nothing is run that the CPU lacks."""
    with pytest.raises(NotImplementedError, match="AMX"):
        _chunk.attend(0, 0, 0, 0, 1, 0.1, (1, 1), (1, 1), 1, 1, 1, 64, 64, 0, [])
