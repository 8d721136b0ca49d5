"""Compute attention over ragged slots with β in one launch on CUDA; the module needs Triton.

A program computes the attention of a block of queries of one KV head over one part of its keys. Parts are equal splits
of the head's slots, and the fresh keys. A second kernel merges the parts by their log-sum-exps and adds attention sinks
to the denominator. Heads may have any numbers of slots: a table on the device has one row for each head and source.

Logits, weights and sums are float32; products of float32 are not rounded to TensorFloat-32. Source of the split and the
merge: Flash-Decoding (arXiv:2311.01282, section 2.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from agentmem.attention.parts import COLUMNS, TOKENS, block_rows, split_count
from agentmem.attention.runs import FLOAT, Fresh, Run
from agentmem.contracts import blocks

if TYPE_CHECKING:
    from collections.abc import Sequence


_KEYS = 32  # keys that a program reads at a time
_NO_WINDOW = 1 << 30
_LEAST = 16  # the smallest side of a tile that ``tl.dot`` takes
_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _attend_parts(
    queries, table, outputs, masses,
    query_head_stride, query_token_stride, heads, splits, group, tokens, start, window, scale,
    KIND: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write the attention over each part, ``outputs [parts, Hq, q, dv]``, and log-sum-exps ``masses [parts, Hq, q]``.

    Program ``(h, r, p)`` computes the ``r``-th ``ROWS`` queries of KV head ``h`` over part ``p``. Part ``splits`` is
    the fresh keys. A row of ``table`` has the addresses of keys, values and β, the number of keys, the strides of keys
    and values, and the number of keys that lie before the first fresh key.
    """
    head, part = tl.program_id(0), tl.program_id(2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    present = rows < group * tokens
    query_heads, row_tokens = head * group + rows // tokens, rows % tokens
    dims, widths = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_WIDTH)
    own = query_heads.to(tl.int64) * query_head_stride + row_tokens.to(tl.int64) * query_token_stride
    inside = present[:, None] & (dims < DIM)[None, :]
    query = tl.load(queries + own[:, None] + dims[None, :], mask=inside, other=0.0).to(FACTOR)

    is_fresh = (part >= splits).to(tl.int32)
    entry = table + (is_fresh * heads + head) * 7
    keys = tl.load(entry).to(tl.pointer_type(KIND))
    values = tl.load(entry + 1).to(tl.pointer_type(KIND))
    address = tl.load(entry + 2)
    bias = address.to(tl.pointer_type(tl.float32))
    count = tl.load(entry + 3).to(tl.int32)
    biased = tl.where(address == 0, 0, count)
    key_stride, value_stride = tl.load(entry + 4), tl.load(entry + 5)
    origin = tl.load(entry + 6).to(tl.int32)
    share = tl.cdiv(count, tl.where(is_fresh > 0, 1, splits))
    begin = tl.where(is_fresh > 0, 0, part * share)
    end = tl.minimum(begin + share, count)

    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, PADDED_WIDTH), tl.float32)
    for first in range(begin, end, KEYS):
        index = first + tl.arange(0, KEYS)
        held = index < end
        places = index.to(tl.int64)
        key = tl.load(
            keys + places[:, None] * key_stride + dims[None, :], mask=held[:, None] & (dims < DIM)[None, :], other=0.0
        )
        logits = tl.dot(query, tl.trans(key.to(FACTOR)), input_precision=PRECISION) * scale
        logits += tl.load(bias + places, mask=held & (index < biased), other=0.0)[None, :]
        position, token = (index - origin)[None, :], (start + row_tokens)[:, None]
        seen = held[None, :] & (position <= token) & (position > token - window)
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key of the part is seen so far
        weights = tl.exp(logits - base[:, None])
        shrink = tl.exp(most - base)
        value = tl.load(
            values + places[:, None] * value_stride + widths[None, :],
            mask=held[:, None] & (widths < WIDTH)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(
            weights.to(KIND).to(FACTOR), value.to(FACTOR), input_precision=PRECISION
        )
        most = higher

    where = (part * heads * group + query_heads).to(tl.int64) * tokens + row_tokens
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(masses + where, most + tl.log(divisor), mask=present)
    tl.store(
        outputs + where[:, None] * WIDTH + widths[None, :],
        mixed / divisor[:, None],
        mask=present[:, None] & (widths < WIDTH)[None, :],
    )


@triton.jit
def _merge_parts(
    outputs, masses, sinks, output, lse, head_stride, token_stride, lse_stride, parts, query_heads, tokens,
    SINKS: tl.constexpr, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write ``output [Hq, q, dv]`` and ``lse [Hq, q]``, merged over parts and sinks; a program merges one query."""
    head, token = tl.program_id(0), tl.program_id(1)
    widths = tl.arange(0, PADDED_WIDTH)
    most = tl.full((), float("-inf"), tl.float32)
    if SINKS:
        most = tl.load(sinks + head).to(tl.float32)
    for part in range(parts):
        most = tl.maximum(most, tl.load(masses + (part * query_heads + head) * tokens + token))
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.zeros((), tl.float32)
    if SINKS:
        total += tl.exp(tl.load(sinks + head).to(tl.float32) - base)
    mixed = tl.zeros((PADDED_WIDTH,), tl.float32)
    for part in range(parts):
        where = ((part * query_heads + head) * tokens + token).to(tl.int64)
        weight = tl.exp(tl.load(masses + where) - base)
        mixed += weight * tl.load(outputs + where * WIDTH + widths, mask=widths < WIDTH, other=0.0)
        total += weight
    divisor = tl.where(total > 0, total, 1.0)
    place = output + head.to(tl.int64) * head_stride + token.to(tl.int64) * token_stride
    tl.store(place + widths, (mixed / divisor).to(output.dtype.element_ty), mask=widths < WIDTH)
    tl.store(lse + head * lse_stride + token, most + tl.log(divisor))


def supports(queries: torch.Tensor, runs: Sequence[Run], fresh: Fresh | None) -> bool:
    """Return whether the kernel can read these tensors: float32, bfloat16 or float16 numbers in contiguous rows."""
    tensors = [queries, *(each for run in runs for each in (run.keys, run.values))]
    tensors += [] if fresh is None else [fresh.keys, fresh.values]
    plain = all(each.dtype == queries.dtype and each.stride(-1) == 1 for each in tensors)
    biases = [run.bias for run in runs if run.bias is not None]
    flat = all(each.dtype == torch.float32 and each.stride(1) == 1 for each in biases)
    return plain and flat and queries.dtype in _KINDS and all(run.quantised is None for run in runs)


def attend(
    queries: torch.Tensor,
    runs: Sequence[Run],
    fresh: Fresh | None,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the attention of one sequence's ``queries [Hq, q, d]`` over the slots in ``runs`` and over fresh keys.

    The arguments are those of :func:`agentmem.attention.ragged.attend`; :func:`supports` must be true of them. If
    there are runs, they have all KV heads, in order.

    Returns:
        The output ``[Hq, q, dv]`` in the dtype of the queries, and the log-sum-exp ``[Hq, q]`` float32 of the logits,
        sinks included. ``q`` tokens are computed at most ``TOKENS`` at a time.
    """
    width = (runs[0] if fresh is None else fresh).values.shape[-1]
    heads = sum(run.heads for run in runs) if fresh is None else fresh.keys.shape[0]
    output = queries.new_empty(queries.shape[1], queries.shape[0], width).transpose(0, 1)  # as the model reads it
    lse = queries.new_empty(queries.shape[:2], dtype=torch.float32)
    entries = [entry for run in runs for entry in _entries(run, run.slots)] or [(0,) * COLUMNS] * heads
    slots = max((run.slots for run in runs), default=0)
    for block in blocks(queries.shape[1], TOKENS):
        own = [] if fresh is None else _entries(_seen(fresh, block.stop), 0)
        table = torch.tensor([*entries, *own], dtype=torch.int64).to(queries.device)
        splits = split_count(heads, queries.shape[0] // heads * (block.stop - block.start), slots)
        launch = _Launch(table, heads, splits, splits + (fresh is not None), block.start, window or _NO_WINDOW, scale)
        with torch.cuda.device_of(queries):  # Triton launches on the current device
            launch.run(queries[:, block], output[:, block], lse[:, block], sinks)
    return output, lse


class _Launch(NamedTuple):
    """What both kernels must know of one block of tokens; see :func:`_attend_parts`."""

    table: torch.Tensor
    heads: int
    splits: int
    parts: int
    start: int
    window: int
    scale: float

    def run(self, queries: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> None:
        """Attend with ``queries [Hq, b, d]``, and write ``output [Hq, b, dv]`` and ``lse [Hq, b]``."""
        (query_heads, tokens, dim), width = queries.shape, output.shape[2]
        group = query_heads // self.heads
        rows, wide = block_rows(group * tokens), max(_LEAST, triton.next_power_of_2(width))
        outputs = queries.new_empty(self.parts, query_heads, tokens, width, dtype=torch.float32)
        masses = queries.new_empty(self.parts, query_heads, tokens, dtype=torch.float32)
        _attend_parts[self.heads, triton.cdiv(group * tokens, rows), self.parts](
            queries, self.table, outputs, masses, queries.stride(0), queries.stride(1),
            self.heads, self.splits, group, tokens, self.start, self.window, self.scale,
            KIND=_KINDS[queries.dtype], FACTOR=_factor(queries.dtype), PRECISION="ieee", DIM=dim, WIDTH=width,
            PADDED_DIM=max(_LEAST, triton.next_power_of_2(dim)), PADDED_WIDTH=wide, ROWS=rows, KEYS=_KEYS,
        )  # fmt: skip
        _merge_parts[query_heads, tokens](
            outputs, masses, masses if sinks is None else sinks, output, lse, output.stride(0), output.stride(1),
            lse.stride(0), self.parts, query_heads, tokens,
            SINKS=sinks is not None, WIDTH=width, PADDED_WIDTH=wide,
        )  # fmt: skip


def _factor(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which numbers are multiplied: their own, but float32 for bfloat16 in the interpreter."""
    interpreted = not isinstance(_attend_parts, triton.JITFunction)
    return tl.float32 if interpreted and dtype == torch.bfloat16 else _KINDS[dtype]


def _seen(fresh: Fresh, stop: int) -> Run:
    return Run(0, fresh.keys[:, :stop], fresh.values[:, :stop])


def _entries(run: Run, origin: int) -> list[tuple[int, ...]]:
    """Return a row of the table of :func:`_attend_parts` for each KV head of ``run``."""
    keys, values, bias, size = run.keys, run.values, run.bias, run.keys.element_size()
    return [
        (
            keys.data_ptr() + head * keys.stride(0) * size,
            values.data_ptr() + head * values.stride(0) * size,
            0 if bias is None else bias.data_ptr() + head * bias.stride(0) * FLOAT,
            run.slots,
            keys.stride(1),
            values.stride(1),
            origin,
        )
        for head in range(run.heads)
    ]
