"""Compute attention of one row's queries over slots with β; KV heads may hold different numbers of slots.

A row is one sequence of a batch; its queries are ``[Hq, q, d]``. A :class:`Run` holds consecutive KV heads with equal
numbers of slots. *Fresh* keys and values ``[Hkv, q, d]`` belong to the same tokens as the queries and are attended to
causally. The attention that slots receive (their scores) is summed in float32.

There are several code paths, chosen by device, dtype and arguments; the tests compare them with a reference. The
*explicit* path computes the attention weights themselves, and can add them to the scores of the slots. The *fused* path
calls torch's flash kernel or compiled code. Both of these compute the weights of only a part of the slots at a time, so
they cannot add weights to scores.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from agentmem.attention import decode, parts
from agentmem.attention.explicit import attend as explicit_path
from agentmem.attention.runs import FLOAT, Fresh, Run, wide, wide_bytes
from agentmem.contracts import blocks

try:
    from agentmem.attention import _chunk

    TILED = _chunk.available()
except ImportError:  # installed without a C compiler, or not on Linux
    TILED = False

TRITON = find_spec("triton") is not None
"""Whether attention on CUDA can use the kernel of :mod:`agentmem.attention.triton_kernel`."""

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentmem.planning.model_shape import LayerShape

# torch's CPU flash kernel is the only fused path that takes a broadcast float32 β and also returns the log-sum-exp. So
# attention over slots and over fresh keys can be computed separately and merged without a dense mask. The kernel gets
# float32 here, whatever dtype is stored: with 16 bits it would, depending on CPU and shape, copy keys and values for
# each query head or let MKL pack them into 4 MB per thread, and a plan could not count these bytes.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001  # no public name returns the lse

TOKENS = 128
"""The most tokens whose queries one call of torch's flash kernel gets; fewer if many query heads share a KV head."""
ROWS = 512
"""The most queries of one KV head, over tokens and query heads of its group, in one call of the kernel."""
SPAN = 512
"""The most slots that are converted to float32 for one call of the kernel; results are merged by log-sum-exp."""
_RUN_BYTES = 96  # bytes that chunk.c keeps for each run
_TILED_GROUP = 128  # the most query heads per KV head that chunk.c supports


def fused_bytes(layer: LayerShape, tokens: int, slots: int, itemsize: int, rows: int = 1) -> int:
    """Return the most bytes that :func:`attend` allocates besides its output if it calls a fused kernel.

    A fused kernel is torch's flash kernel or this package's C code. ``tokens`` is the number of tokens whose queries
    attend. ``slots`` is the largest number of slots of a KV head. ``itemsize`` is the number of bytes of one element of
    the queries. ``rows`` is the number of sequences of a batch. The sequences are computed one after the other, except
    in a decode step: there one call of the C code may compute all sequences.
    """
    chunk = _block_bytes(layer, layer.kv_heads, _tokens(layer.group, tokens), max(slots, tokens), itemsize)
    step = layer.query_heads * (layer.key_dim + layer.value_dim + 2) * itemsize + _kernel_bytes(
        layer, layer.group, slots, itemsize
    )
    compiled = decode.step_bytes(layer, rows, itemsize)
    return max(chunk, step, compiled, _tiled_bytes(layer) if itemsize < FLOAT else 0)


def cuda_bytes(layer: LayerShape, tokens: int, slots: int) -> int:
    """Return the most bytes that the kernel for CUDA allocates besides its output; 0 where Triton is missing.

    The arguments are those of :func:`fused_bytes`.
    """
    return parts.kernel_bytes(layer, tokens, slots) if TRITON else 0


def _block_bytes(layer: LayerShape, heads: int, tokens: int, keys: int, itemsize: int) -> int:
    """Return the most bytes that :func:`_attend_block` allocates for one block of tokens.

    The keys are visited in parts; a part is at most ``SPAN`` slots, or the block's own tokens. The bytes hold the
    result over all parts so far, the result over the next part, and the working memory to compute or merge the next
    part.
    """
    wide = max(FLOAT, itemsize)
    rows = heads * layer.group * tokens
    total, part = rows * (layer.value_dim + 1) * wide, rows * (layer.value_dim * wide + 8)
    merge = rows * (layer.value_dim + 3) * wide
    own = _kernel_bytes(layer, tokens, tokens, itemsize) + wide_bytes(layer, heads, tokens, itemsize)
    seen = _kernel_bytes(layer, layer.group * tokens, keys, itemsize) + wide_bytes(
        layer, heads, min(keys, SPAN), itemsize
    )
    asked = rows * layer.key_dim * wide  # a copy in float32, which has the kernel's layout, or one with that layout
    if itemsize < FLOAT:
        return asked + total + part + max(merge, own, seen)
    return total + part + max(merge, own, asked + seen)


def _tiled_bytes(layer: LayerShape) -> int:
    # chunk.c: scratch per thread, independent of slots and tokens, and one run for each head and for the fresh keys
    if not TILED:
        return 0
    threads = torch.get_num_threads()
    return threads * _chunk.scratch_bytes(layer.key_dim, layer.value_dim) + (layer.kv_heads + 1) * _RUN_BYTES


def _kernel_bytes(layer: LayerShape, rows: int, keys: int, itemsize: int) -> int:
    # aten/native/cpu/FlashAttentionKernel.cpp: per thread a [q_split, kv_split] tile and a [q_split, dv] accumulator
    split = 256 if rows >= 768 else 64 if rows >= 192 else 32  # noqa: PLR2004  # the kernel's own thresholds
    tile = min(512, keys)
    return torch.get_num_threads() * min(split, rows) * (tile + 2 + layer.value_dim) * max(FLOAT, itemsize)


def attend(
    queries: torch.Tensor,
    runs: Sequence[Run],
    fresh: Fresh | None,
    scale: float,
    *,
    window: int | None = None,
    explicit: bool = False,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the attention of one sequence's ``queries [Hq, q, d]`` over the slots in ``runs`` and over fresh keys.

    Args:
        queries: post-RoPE queries of ``q`` tokens.
        runs: the slots. Runs with ``scores`` need ``explicit``.
        fresh: keys and values of the queries' own tokens, attended to causally. With ``None`` every query attends to
            every slot, as in a decode step whose own slot has already been appended.
        scale: factor on the attention logits.
        window: the most tokens that a query attends to, its own token included. With ``fresh``, the slots must then be
            the consecutive tokens before the fresh tokens. Without ``fresh``, the caller must have cut the slots to the
            window.
        explicit: compute the attention weights as tensors, even if a fused kernel could be called. On the CPU with
            ``sinks``, and on devices other than CPU and CUDA, the weights are always computed as tensors. On CUDA they
            are where Triton is missing, and for tensors that its kernel cannot read.
        sinks: ``[Hq]``, an additional logit of each query head that only increases the denominator of its softmax.

    Returns:
        The output ``[Hq, q, dv]``, and the attention ``[Hkv, q]`` (float32) that each fresh key received. The latter is
        ``None`` without ``fresh``, and if a fused kernel was called.
    """
    if queries.is_cuda and TRITON and not explicit:
        from agentmem.attention import triton_kernel  # takes a second to import, and is needed on CUDA only

        if triton_kernel.supports(queries, runs, fresh):
            return triton_kernel.attend(queries, runs, fresh, scale, window, sinks)[0], None
    if not explicit and sinks is None:
        if fresh is None and queries.shape[1] == 1:
            if _compiled(queries, runs):
                return _decode_step(queries, runs, scale), None
        elif _tiles(queries, runs, fresh):
            return _chunk_step(queries, runs, fresh, scale, window), None
    longest = max((run.slots for run in runs), default=0) + queries.shape[1]
    if fresh is None or (window is not None and longest <= window):
        window = None
    equal_dims = queries.shape[-1] == _width(runs, fresh)
    if explicit or window is not None or sinks is not None or not equal_dims or queries.device.type != "cpu":
        return explicit_path(queries, runs, fresh, scale, window, sinks)
    return _fused(queries, runs, fresh, scale), None


def _fused(queries: torch.Tensor, runs: Sequence[Run], fresh: Fresh | None, scale: float) -> torch.Tensor:
    heads = sum(run.heads for run in runs) if fresh is None else fresh.keys.shape[0]
    group, tokens = queries.shape[0] // heads, queries.shape[1]
    if fresh is None and tokens == 1 and not any(run.copied for run in runs):
        return _step(queries, runs, scale)
    width = _width(runs, fresh)
    grouped = queries.view(heads, group, tokens, -1)
    output = queries.new_empty(tokens, heads, group, width).permute(1, 2, 0, 3)  # in the layout that the model reads
    for block in blocks(tokens, _tokens(group, tokens)):
        output[:, :, block] = _attend_block(grouped[:, :, block], runs, fresh, scale, block)[0]
    return output.flatten(0, 1)


def _width(runs: Sequence[Run], fresh: Fresh | None) -> int:
    """Return the number of elements of one value, ``dv``."""
    return runs[0].value_dim if fresh is None else int(fresh.values.shape[-1])


def _step(queries: torch.Tensor, runs: Sequence[Run], scale: float) -> torch.Tensor:
    """Attend with one token's queries ``[Hq, 1, d]`` over all slots, and return the output ``[Hq, 1, dv]``.

    Each run has consecutive KV heads with equal numbers of slots. The flash kernel is called once for each run.
    """
    group = queries.shape[0] // sum(run.heads for run in runs)
    rows = (queries[run.first * group : (run.first + run.heads) * group].view(run.heads, group, 1, -1) for run in runs)
    outputs = [_flash_rows(each, run, scale)[0] for each, run in zip(rows, runs, strict=True)]
    merged = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return merged.reshape(queries.shape[0], 1, -1)


def _tokens(group: int, tokens: int) -> int:
    """Return how many of ``tokens`` tokens to compute in one block, with ``group`` query heads per KV head."""
    return min(TOKENS, ROWS // group or 1, tokens)


def _compiled(queries: torch.Tensor, runs: Sequence[Run]) -> bool:
    """Return whether ``decode.c`` supports the dtype, the dims and the memory layout of this decode step."""
    form, coded = _form(queries, runs), runs[0].quantised
    dim, width, dtype = form.key_dim, form.value_dim, form.dtype
    if coded is not None:
        dim, width, dtype = coded[0].row_bytes, coded[1].row_bytes, torch.uint8
    return form.served and all(_plain(run, dim, width, dtype) for run in runs)


def _form(queries: torch.Tensor, runs: Sequence[Run]) -> decode.Form:
    return decode.Form(
        queries.dtype,
        sum(run.heads for run in runs),
        queries.shape[-1],
        runs[0].value_dim,
        (0, 0) if runs[0].quantised is None else (runs[0].quantised[0].bits, runs[0].quantised[1].bits),
    )


def _plain(run: Run, dim: int, width: int, dtype: torch.dtype) -> bool:
    """Return whether the tensors of ``run`` have the dtypes and the layout that ``decode.c`` needs.

    ``decode.c`` reads keys, values and β of consecutive KV heads by raw addresses.
    """
    keys, values, bias = run.keys, run.values, run.bias
    return (
        keys.dtype == values.dtype == dtype
        and keys.is_cpu
        and values.is_cpu
        and keys.shape[1] > 0
        and keys.stride()[1:] == (dim, 1)
        and values.stride()[1:] == (width, 1)
        and (bias is None or (bias.dtype == torch.float32 and bias.stride(1) == 1))
    )


def _decode_step(queries: torch.Tensor, runs: Sequence[Run], scale: float) -> torch.Tensor:
    """Attend with one token's queries ``[Hq, 1, d]`` over all slots in one call of ``decode.c``.

    Each run has the slots of consecutive KV heads. The runs must be in the order of their heads. The result is the
    output ``[Hq, 1, dv]``.
    """
    form = _form(queries, runs)
    output = queries.new_empty(1, queries.shape[0], form.value_dim)
    storages = [each for run in runs for each in (run.keys, run.values, run.bias)]
    layout = decode.layout([head for run in runs for head in _heads(run)], form, *storages)
    lengths = [run.slots for run in runs for _ in range(run.heads)]
    decode.attend_each(queries.transpose(0, 1), [(0, layout, lengths, True)], scale, output)
    return output.transpose(0, 1)


def _heads(run: Run) -> Iterator[tuple[int, int, int, int]]:
    """Yield for each KV head in ``run`` the memory addresses of keys, values and β, and the number of slots.

    The address of β is 0 if there is no β.
    """
    size = run.keys.element_size()
    for head in range(run.heads):
        bias = 0 if run.bias is None else run.bias.data_ptr() + head * run.bias.stride(0) * FLOAT
        keys = run.keys.data_ptr() + head * run.keys.stride(0) * size
        yield keys, run.values.data_ptr() + head * run.values.stride(0) * size, bias, run.slots


def _addresses(run: Run) -> tuple[int, int, int, int, int, int, int, int, int]:
    """Return what ``chunk.c`` must know to read the slots of consecutive KV heads.

    The nine numbers are the first KV head, the number of heads, the number of slots per head, the memory addresses of
    keys, values and β, and the strides of keys, values and β over heads. Both numbers for β are 0 if there is no β.
    """
    keys, values, bias = run.keys, run.values, run.bias
    heads, slots, _ = keys.shape
    place, stride = (0, 0) if bias is None else (bias.data_ptr(), bias.stride(0))
    return (
        run.first,
        heads,
        slots,
        keys.data_ptr(),
        values.data_ptr(),
        place,
        keys.stride(0),
        values.stride(0),
        stride,
    )


def _tiles(queries: torch.Tensor, runs: Sequence[Run], fresh: Fresh | None) -> bool:
    """Return whether ``chunk.c`` can compute attention with these tensors.

    The compiled code needs bfloat16 tensors with contiguous rows on a CPU with AMX, and at most 128 query heads per KV
    head.
    """
    if not TILED or queries.dtype != torch.bfloat16 or queries.device.type != "cpu":
        return False
    sources: list[Run | Fresh] = [*runs] if fresh is None else [*runs, fresh]
    heads = sum(run.heads for run in runs) if fresh is None else fresh.keys.shape[0]
    return queries.shape[0] <= _TILED_GROUP * heads and queries.stride(-1) == 1 and all(map(_rows, sources))


def _rows(source: Run | Fresh) -> bool:
    """Return whether keys, values and β have the dtypes and layout that ``chunk.c`` needs to read raw addresses."""
    keys, values, bias = source.keys, source.values, getattr(source, "bias", None)
    return (
        keys.dtype == values.dtype == torch.bfloat16
        and keys.device.type == values.device.type == "cpu"
        and keys.stride(-1) == values.stride(-1) == 1
        and (bias is None or (bias.dtype == torch.float32 and bias.stride(1) == 1))
    )


def _chunk_step(
    queries: torch.Tensor, runs: Sequence[Run], fresh: Fresh | None, scale: float, window: int | None
) -> torch.Tensor:
    """Attend with the queries ``[Hq, q, d]`` of several tokens in one call of ``chunk.c``.

    The queries attend to all slots in ``runs``, and causally to ``fresh`` (keys and values of the same tokens). The
    result is the output ``[Hq, q, dv]``.
    """
    query_heads, tokens, dim = queries.shape
    heads = sum(run.heads for run in runs) if fresh is None else fresh.keys.shape[0]
    width, threads = (runs[0] if fresh is None else fresh).values.shape[-1], torch.get_num_threads()
    output = queries.new_empty(tokens, query_heads, width).transpose(0, 1)  # in the layout that the model reads
    scratch = torch.empty(threads * _chunk.scratch_bytes(dim, width), dtype=torch.uint8)
    sources = [(*_addresses(run), run.keys.stride(1), run.values.stride(1), False) for run in runs]
    if fresh is not None:
        own = Run(0, fresh.keys, fresh.values)
        sources.append((*_addresses(own), own.keys.stride(1), own.values.stride(1), True))
    _chunk.attend(
        queries.data_ptr(),
        output.data_ptr(),
        scratch.data_ptr(),
        scratch.nbytes,
        threads,
        scale,
        (queries.stride(0), queries.stride(1)),
        (output.stride(0), output.stride(1)),
        tokens,
        heads,
        query_heads // heads,
        dim,
        width,
        window or 0,
        sources,
    )
    return output


def _attend_block(
    grouped: torch.Tensor, runs: Sequence[Run], fresh: Fresh | None, scale: float, block: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with the queries ``grouped [h, group, b, d]`` of ``b`` tokens over the slots in ``runs`` and ``fresh``.

    The queries are those of ``h`` KV heads, with ``group`` query heads each. ``fresh`` has keys and values of new
    tokens, attended to causally. ``block`` is the range of the ``b`` tokens among these new tokens.

    Attention is computed over parts of the keys. The results are averaged with their attention masses (sums of
    exponentials of logits) as weights.

    Returns:
        The output ``[h, group, b, dv]`` and the log-sum-exp ``[h, group, b]`` of the logits, both at least float32.
    """
    grouped = wide(grouped)
    output = grouped.new_zeros(*grouped.shape[:3], _width(runs, fresh))
    lse = grouped.new_full(grouped.shape[:3], -torch.inf)
    if fresh is not None:
        _merge(output, lse, *_flash_own(grouped, wide(fresh.keys[:, block]), wide(fresh.values[:, block]), scale))
        runs = [*runs, Run(0, fresh.keys[:, : block.start], fresh.values[:, : block.start])]
    for run in runs:
        heads = slice(run.first, run.first + run.heads)
        for part in _spans(run):
            _merge(output[heads], lse[heads], *_flash_rows(grouped[heads], part, scale))
    return output, lse


def _spans(run: Run) -> Iterator[Run]:
    """Yield the slots of ``run`` in parts of at most :data:`SPAN` slots per head, so that converted copies stay small.

    The slots come in a single part if keys and values need no conversion to float32.
    """
    for span in blocks(run.slots, SPAN if run.copied else max(1, run.slots)):
        yield run.part(span)


def _merge(output: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge the attention over one part of the keys into ``output`` and ``lse``, the result so far, in place.

    ``lse`` and ``part_lse`` are log-sum-exps of logits, the logarithms of the weights of the two results.
    """
    share = (part_lse - lse).sigmoid_().unsqueeze(-1)
    output.lerp_(part, share)
    torch.logaddexp(lse, part_lse, out=lse)


def _flash_rows(grouped: torch.Tensor, run: Run, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with the queries ``grouped [h, group, b, d]`` of ``b`` tokens over the slots of ``h`` KV heads.

    Each KV head has ``group`` query heads. The kernel gets the ``group * b`` queries of a KV head as queries of
    one query head, so that it reads keys and values only once.

    Returns:
        The output ``[h, group, b, dv]`` and the log-sum-exp ``[h, group, b]`` of the logits.

    """
    heads, group, tokens, _ = grouped.shape
    run = run.wide(grouped.dtype)
    output, lse = _flash(
        grouped.reshape(1, heads, group * tokens, -1),
        run.keys[None],
        run.values[None],
        0.0,
        attn_mask=None if run.bias is None else run.bias[None, :, None],
        scale=scale,
    )
    return output.reshape(heads, group, tokens, -1), lse.reshape(heads, group, tokens)


def _flash_own(
    grouped: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with the queries ``grouped [h, group, b, d]`` of ``b`` tokens causally over these tokens' own keys.

    The keys are ``[h, b, d]`` and the values ``[h, b, dv]``, for ``h`` KV heads with ``group`` query heads each.

    Returns:
        The output ``[h, group, b, dv]`` and the log-sum-exp ``[h, group, b]`` of the logits.

    """
    shared = (each.unsqueeze(1).expand(-1, grouped.shape[1], -1, -1) for each in (keys, values))
    output, lse = _flash(grouped, *shared, 0.0, True, scale=scale)  # noqa: FBT003  # takes no keyword
    return output, lse


def local(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with ``queries [group, n, d]`` over given slots of one head: ``keys [T, d]`` and ``values [T, dv]``.

    ``bias [T]`` float32 is β.

    Returns:
        The output ``[group, n, dv]``, and the log-mass ``[group, n]`` float32: ``log Σ exp(scale · q·k + β)``, which
        the mass equations of Attention Matching compare (arXiv:2602.16284, §3).
    """
    if queries.device.type == "cpu" and keys.shape[-1] == values.shape[-1]:
        return _local(queries, Run(0, keys[None], values[None], bias[None]), scale)
    logits = (queries.float() @ keys.float().T).mul_(scale).add_(bias)
    return logits.softmax(-1) @ values.float(), logits.logsumexp(-1)


def _local(queries: torch.Tensor, run: Run, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    output = queries.new_empty(*queries.shape[:2], run.values.shape[-1], dtype=torch.float32)
    mass = queries.new_empty(queries.shape[:2], dtype=torch.float32)
    for block in blocks(queries.shape[1], _tokens(*queries.shape[:2])):
        output[:, block], mass[:, block] = (
            each[0] for each in _attend_block(queries[None, :, block], [run], None, scale, block)
        )
    return output, mass


def local_bytes(layer: LayerShape, queries: int, before: int, after: int, itemsize: int, *, fused: bool) -> int:
    """Return the most bytes of a comparison of one head's attention before and after a compaction.

    The comparison calls :func:`local` twice: over the ``before`` slots that the head had, and over the ``after`` slots
    that it keeps. Both calls have the same queries, and ``queries`` is their number per query head. The bytes of the
    ``after`` slots are included. ``fused`` states whether :func:`local` calls torch's flash kernel.
    """
    outputs = 4 * layer.group * queries * (layer.value_dim * (itemsize + 4) + 8)
    slots = after * (layer.key_dim + layer.value_dim) * (itemsize + 4) + after * 12
    if fused:
        block = _tokens(layer.group, queries)
        return outputs + slots + _block_bytes(layer, 1, block, before, itemsize)
    casts = before * (layer.key_dim + layer.value_dim) * 4
    return outputs + slots + 3 * layer.group * queries * before * 4 + casts
