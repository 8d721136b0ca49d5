"""One compiled call for a token of each of several sequences: the oracle's numbers, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from agentmem.attention import decode
from agentmem.attention.ragged import fused_bytes
from agentmem.planning.model_shape import LayerShape
from agentmem.testing import peak_allocated
from oracles import attention as reference

_decode = pytest.importorskip("agentmem.attention._decode", reason="installed without a C compiler")

LEVELS = {"any CPU": 0, "AVX2": 1, "AVX-512": 2}
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""What an output may be off by per unit of its size: float32 sums, and one rounding into the dtype of storage."""
SCALE = 0.25
SOME = ((40,), (1, 300), (7, 130, 64, 500, 3), tuple(range(1, 17)))
"""Slots of each of several sequences, before their heads are made unequal."""


@pytest.fixture(params=LEVELS, autouse=True)
def _instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    if not _decode.use(LEVELS[request.param]):
        pytest.skip("this CPU lacks them")
    yield
    for level in (2, 1, 0):
        if _decode.use(level):
            break


@contextmanager
def threads(count: int) -> Iterator[None]:
    """With another number of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Sequence:
    """Slots as a store has them: ``keys [S, d]``, ``values [S, dv]``, ``bias [S]``; head ``h`` fills ``lengths[h]``."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    lengths: list[int]
    room: int = 1
    """Slots that each head has free."""
    biased: bool = True

    @property
    def starts(self) -> list[int]:
        """The first slot of each head."""
        return [sum(self.lengths[:head]) + head * self.room for head in range(len(self.lengths))]

    @property
    def layout(self) -> decode.Layout:
        """As the compiled code is told."""
        form = decode.Form(self.keys.dtype, len(self.lengths), self.keys.shape[1], self.values.shape[1])
        rows = [
            (
                self.keys[start:].data_ptr(),
                self.values[start:].data_ptr(),
                self.bias[start:].data_ptr(),
                length + self.room,
            )
            for start, length in zip(self.starts, self.lengths, strict=True)
        ]
        return decode.layout(rows, form, self.keys, self.values, self.bias)

    def slots(self, window: int | None, key: torch.Tensor | None, value: torch.Tensor | None) -> list[reference.Slots]:
        """What each head attends to, for the oracle; ``key [Hkv, d]`` and ``value [Hkv, dv]`` are the new slot's."""
        heads = []
        for head, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            keys, values, bias = (each[start : start + length] for each in (self.keys, self.values, self.bias))
            if key is not None and value is not None:
                keys, values = torch.cat((keys, key[head][None])), torch.cat((values, value[head][None]))
                bias = torch.cat((bias, torch.zeros(1)))
            cut = slice(-window if window else None, None)
            heads.append(reference.Slots(keys[cut], values[cut], bias[cut] if self.biased else None))
        return heads


@dataclass
class Step:
    """A token of each of several sequences: ``queries [n, Hq, d]``, ``keys [n, Hkv, d]``, ``values [n, Hkv, dv]``."""

    sequences: list[Sequence]
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def attend(self, window: int | None = None, *, fresh: bool = True) -> torch.Tensor:
        """By the compiled call, ``[n, Hq, dv]``."""
        told = [(row, each.layout, each.lengths, each.biased) for row, each in enumerate(self.sequences)]
        output = self.queries.new_empty(*self.queries.shape[:2], self.values.shape[2])
        given = (self.keys, self.values) if fresh else None
        decode.attend_each(self.queries, told, SCALE, output, given, window)
        return output

    def truth(self, window: int | None = None, *, fresh: bool = True) -> torch.Tensor:
        """By the oracle, sequence by sequence, ``[n, Hq, dv]`` float64."""
        outputs = []
        for row, each in enumerate(self.sequences):
            new = (self.keys[row], self.values[row]) if fresh else (None, None)
            answer = reference.attention(self.queries[row][:, None], each.slots(window, *new), None, SCALE)
            outputs.append(answer.output[:, 0])
        return torch.stack(outputs)


def step(
    counts: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 2,
    group: int = 3,
    dims: tuple[int, int] = (32, 32),
    equal: bool = False,
) -> Step:
    """Random numbers; unless ``equal``, the heads of a sequence hold other numbers of slots, and every other has β."""
    draw = torch.Generator().manual_seed(len(counts) + sum(counts) + group)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    sequences = []
    for index, count in enumerate(counts):
        lengths = [count if equal else count + 5 * head for head in range(heads)]
        total = sum(lengths) + heads
        bias = 2 * torch.randn(total, generator=draw)
        made = Sequence(rows(total, dims[0]), rows(total, dims[1]), bias, lengths, biased=index % 2 == 0)
        for start, length in zip(made.starts, lengths, strict=True):
            made.bias[start + length] = 0.0  # of the slot that comes next, as in a store
        sequences.append(made)
    many = len(counts)
    return Step(sequences, rows(many, heads * group, dims[0]), rows(many, heads, dims[0]), rows(many, heads, dims[1]))


def error(output: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference as a share of what the dtype allows."""
    return float(((output.double() - truth).abs() / (1e-6 + DTYPES[output.dtype] * truth.abs().clamp(min=0.5))).max())


@pytest.mark.parametrize("counts", SOME, ids=len)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sequence_attends_to_its_own_slots_and_its_new_one(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Unequal sequences, unequal heads, with and without β."""
    given = step(counts, dtype)
    truth = given.truth()
    assert error(given.attend(), truth) < 1


@pytest.mark.parametrize("dims", [(16, 16), (48, 80), (64, 64), (128, 32)], ids=str)
@pytest.mark.parametrize("group", [1, 4, 5])
def test_dims_and_groups(dims: tuple[int, int], group: int) -> None:
    """Of keys and values, equal or not."""
    given = step((30, 200, 5), group=group, dims=dims)
    truth = given.truth()
    assert error(given.attend(), truth) < 1


@pytest.mark.parametrize("window", [1, 2, 40, 64, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_window_sees_the_last_slots_only(dtype: torch.dtype, window: int) -> None:
    """The new one included."""
    given = step((300, 39, 1), dtype, equal=True)
    truth = given.truth(window)
    assert error(given.attend(window), truth) < 1


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("counts", [(1,), (255,), (257, 700), (10, 1500, 10), (400,) * 5], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_answer(dtype: torch.dtype, counts: tuple[int, ...], count: int) -> None:
    """However the slots of all heads are shared out."""
    given = step(counts, dtype, heads=3, group=1, dims=(16, 16))
    truth = given.truth()
    with threads(count):
        assert error(given.attend(), truth) < 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_new_slots_are_written_and_nothing_else(dtype: torch.dtype) -> None:
    """Bit for bit, behind the last slot of each head."""
    given = step((70, 300, 2), dtype)
    before = [(each.keys.clone(), each.values.clone(), each.bias.clone()) for each in given.sequences]
    given.attend()
    for row, (each, (keys, values, bias)) in enumerate(zip(given.sequences, before, strict=True)):
        for head, (start, length) in enumerate(zip(each.starts, each.lengths, strict=True)):
            keys[start + length], values[start + length] = given.keys[row, head], given.values[row, head]
        assert torch.equal(each.keys, keys)
        assert torch.equal(each.values, values)
        assert torch.equal(each.bias, bias)


def test_without_fresh_keys_the_slots_are_attended_to_as_they_are() -> None:
    """Nothing is written."""
    given = step((70, 300))
    keys = [each.keys.clone() for each in given.sequences]
    assert error(given.attend(fresh=False), given.truth(fresh=False)) < 1
    assert all(torch.equal(each.keys, old) for each, old in zip(given.sequences, keys, strict=True))


def test_rows_may_lie_apart() -> None:
    """As a projection that makes queries, keys and values at once leaves them, or numbers with others in between."""
    given = step((70, 300), heads=2, group=2)
    joint = torch.cat((given.queries, given.keys, given.values), 1)
    split = Step(given.sequences, *joint.split((4, 2, 2), 1))
    assert not split.queries.is_contiguous()
    truth = given.truth()
    assert error(split.attend(), truth) < 1
    spread = (torch.stack((each, each + 1), -1)[..., 0] for each in (given.queries, given.keys, given.values))
    assert error(Step(given.sequences, *spread).attend(), truth) < 1


def test_rows_without_a_sequence_are_left_alone() -> None:
    """Of the queries, and of the output."""
    given = step((70, 300, 5))
    truth = given.truth()
    output = torch.full((3, 6, 32), 7.0)
    told = [(2, given.sequences[2].layout, given.sequences[2].lengths, True)]
    decode.attend_each(given.queries, told, SCALE, output, (given.keys, given.values))
    assert error(output[2:], truth[2:]) < 1
    assert bool((output[:2] == 7).all())


@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [(40,), (900, 3), (100,) * 16, (5000, 10, 10)], ids=str)
def test_its_allocations_are_in_the_plans(counts: tuple[int, ...], dtype: torch.dtype, count: int) -> None:
    """Those of a call for many are at most what each sequence's plan sets aside, together, or that of a batch."""
    given = step(counts, dtype, equal=True)
    spread = Step(
        given.sequences,
        *(torch.stack((each, each), -1)[..., 0] for each in (given.queries, given.keys, given.values)),
    )
    layer, item = LayerShape(2, 6, 32, 32), dtype.itemsize
    with threads(count):
        peak = peak_allocated(spread.attend) - given.queries.nbytes  # the output is as large
        assert peak <= decode.step_bytes(layer, len(counts), item) <= len(counts) * decode.step_bytes(layer, 1, item)
        assert decode.step_bytes(layer, len(counts), item) <= fused_bytes(layer, 1, 5000, item, rows=len(counts))


def refused(given: Step, told: list[Any], match: str, window: int = 0, size: int | None = None) -> None:
    """A call that raises and writes nothing, neither slots nor output."""
    slots = [each.keys.clone() for each in given.sequences]
    rows, heads, dim = given.keys.shape
    group, output = given.queries.shape[1] // heads, torch.full_like(given.queries, 7.0)
    if size is None:
        size = _decode.scratch_bytes(len(told), heads, group, dim, dim, 2)
    scratch = torch.empty(1 << 20, dtype=torch.uint8)
    places = [
        part for each in (given.queries, given.keys, given.values) for part in (each.data_ptr(), each.stride()[:2])
    ]
    shape = (rows, heads, group, dim, dim)
    with pytest.raises((ValueError, TypeError, OverflowError), match=match):
        _decode.attend(0, 0, 0, 2, SCALE, window, *shape, *places, output.data_ptr(), scratch.data_ptr(), size, told)
    assert bool((output == 7).all())
    assert all(torch.equal(each.keys, old) for each, old in zip(given.sequences, slots, strict=True))


def test_what_cannot_be_is_refused_before_anything_is_written() -> None:
    """Also where it is the last of several sequences."""
    given = step((70, 300))
    first, last = given.sequences
    good = (0, first.layout, first.lengths, True)
    full = [length + last.room for length in last.lengths]
    refused(given, [good, (1, last.layout, full, True)], "room")
    refused(given, [good, (1, last.layout, [-1, 3], True)], "no slots")
    refused(given, [good, (1, last.layout, [1, 1 << 63], True)], "too large")
    refused(given, [good, (1, last.layout, [1], True)], "number of heads")
    refused(given, [good, (1, (b"few",), [1, 1], True)], "number of heads")
    refused(given, [good, (1, (), [1, 1], True)], "number of heads")
    refused(given, [good, (2, last.layout, last.lengths, True)], "row")
    refused(given, [good, (-1, last.layout, last.lengths, True)], "row")
    refused(given, [good, (0, 1)], "a sequence")
    refused(given, [good], "window", window=-1)
    refused(given, [good], "scratch", size=_decode.scratch_bytes(1, 2, 3, 32, 32, 2) - 1)
