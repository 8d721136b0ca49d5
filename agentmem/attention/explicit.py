"""The explicit path of attention over slots with β: it computes the attention weights themselves.

The path can add to each slot's score the attention weights that the slot receives. It supports every device and dtype,
key and value dims that differ, sliding windows and attention sinks. Logits and weights are float32, in tiles of a
bounded size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from agentmem.attention.runs import FLOAT, Fresh, Run, wide_bytes
from agentmem.contracts import blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentmem.planning.model_shape import LayerShape

TILE_BYTES = 1 << 19
"""The most bytes of logits that :func:`attend` computes at once, unless one token needs more.

Converted copies of keys and values take as many bytes at most, unless one head needs more.
"""


def explicit_bytes(layer: LayerShape, tokens: int, slots: int, itemsize: int) -> int:
    """Return the most bytes that :func:`attend` allocates besides its output.

    ``tokens`` is the number of tokens whose queries attend. ``slots`` is the largest number of slots of a KV head.
    ``itemsize`` is the number of bytes of one element of the queries.
    """
    span = slots + tokens
    rows = layer.query_heads * min(tokens, max(1, TILE_BYTES // (layer.query_heads * span * 4)))
    one, all_heads = (wide_bytes(layer, heads, span, itemsize) for heads in (1, layer.kv_heads))
    casts = min(all_heads, max(one, TILE_BYTES * 5 // 4))  # decoding takes up to a quarter more than its result
    alone = min(tokens, max(1, TILE_BYTES // (layer.group * span * 4)))  # a head by itself takes more tokens at once
    masks = max(2 * (rows // layer.query_heads) * span * 9, (3 * alone + 16) * span)
    tiles = 3 * rows * span * 4 + masks
    return tiles + casts + rows * (2 * layer.value_dim + layer.key_dim) * 4 + 4 * layer.kv_heads * span * 4


def attend(
    queries: torch.Tensor,
    runs: Sequence[Run],
    fresh: Fresh | None,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the attention of one sequence's ``queries [Hq, q, d]`` over the slots in ``runs`` and over fresh keys.

    The attention weights are computed as tensors, unlike in a flash kernel. For each run that has ``scores``, the
    weights are summed over the queries and added to these scores.

    Args:
        queries: post-RoPE queries of ``q`` tokens.
        runs: the slots of all KV heads.
        fresh: keys and values of the queries' own tokens, attended to causally. With ``None``, every query attends to
            every slot.
        scale: factor on the attention logits.
        window: the most tokens that a query attends to, its own token included. The slots must then be the consecutive
            tokens before the fresh tokens. The window is ignored without ``fresh``.
        sinks: ``[Hq]``, an additional logit of each query head that only increases the denominator of its softmax.

    Returns:
        The output ``[Hq, q, dv]``, and the attention ``[Hkv, q]`` (float32) that each fresh key received. The latter is
        ``None`` without ``fresh``.

    """
    if not runs and fresh is not None:
        runs = [Run(0, fresh.keys[:, :0], fresh.values[:, :0])]
    output = queries.new_empty(*queries.shape[:2], runs[0].value_dim)
    received = None if fresh is None else fresh.keys.new_zeros(fresh.keys.shape[:2], dtype=torch.float32)
    group = queries.shape[0] // sum(run.heads for run in runs)
    tokens = 0 if fresh is None else fresh.keys.shape[1]
    for each in (part for run in runs for part in _parts(run, tokens)):
        run = replace(each.wide(), scores=each.scores) if each.quantised else each
        heads = slice(run.first, run.first + run.heads)
        rows = slice(run.first * group, (run.first + run.heads) * group)
        own = None if fresh is None else Fresh(fresh.keys[heads], fresh.values[heads])
        span = run.slots + (0 if own is None else own.keys.shape[1])
        for block in blocks(queries.shape[1], max(1, TILE_BYTES // (run.heads * group * span * 4))):
            weights = _weights(
                queries[rows, block], run, own, scale, window, block.start, None if sinks is None else sinks[rows]
            )
            mixed = weights[..., : run.slots] @ run.values.float()
            if own is not None and received is not None:
                seen = weights.shape[-1] - run.slots
                mixed += weights[..., run.slots :] @ own.values[:, :seen].float()
                received[heads, :seen] += weights[..., run.slots :].sum(1)
            if run.scores is not None:
                run.scores.add_(weights[..., : run.slots].sum(1))
            output[rows, block] = mixed.view(run.heads * group, -1, mixed.shape[-1]).to(output.dtype)
    return output, received


def _parts(run: Run, tokens: int) -> Iterator[Run]:
    """Yield the heads of ``run`` in parts, so that converted copies stay small; see :data:`TILE_BYTES`.

    ``tokens`` is the number of fresh keys. The heads come in a single part if keys and values need no conversion.
    """
    if not run.copied:
        yield run
        return
    numbers = (run.slots + tokens) * (run.keys.shape[2] + run.values.shape[2])
    if run.quantised is not None:
        numbers = (run.slots + tokens) * sum(form.dim for form in run.quantised)
    for heads in blocks(run.heads, max(1, TILE_BYTES // max(1, FLOAT * numbers))):
        bias, scores = (None if each is None else each[heads] for each in (run.bias, run.scores))
        yield Run(run.first + heads.start, run.keys[heads], run.values[heads], bias, scores, run.quantised)


def _weights(
    queries: torch.Tensor,
    run: Run,
    fresh: Fresh | None,
    scale: float,
    window: int | None,
    start: int,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return the attention weights ``[h, group * b, n + stop]`` (float32) of a block of ``b`` tokens.

    ``run`` has ``h`` KV heads with ``n`` slots each, and ``group`` is the number of query heads per KV head. The first
    token of the block is token number ``start`` of ``fresh``. The last dimension has the ``n`` slots first, then the
    first ``stop = start + b`` keys of ``fresh``. Without ``fresh``, ``stop`` is 0.
    """
    size, count = queries.shape[1], run.slots
    stop = 0 if fresh is None else start + size
    grouped = queries.reshape(run.heads, -1, queries.shape[-1]).float()
    logits = grouped @ run.keys.float().transpose(1, 2)
    if fresh is not None:
        logits = torch.cat((logits, grouped @ fresh.keys[:, :stop].float().transpose(1, 2)), -1)
    logits.mul_(scale)
    if run.bias is not None:
        logits[..., :count] += run.bias[:, None]
    if fresh is not None:
        order = torch.arange(count + stop, device=logits.device)
        own = torch.arange(count + start, count + stop, device=logits.device)[:, None]
        hidden = order > own
        if window is not None:
            hidden |= order <= own - window
        logits.view(run.heads, -1, size, count + stop).masked_fill_(hidden, -torch.inf)
    if sinks is None:
        return logits.softmax(-1)
    own_mass = logits.logsumexp(-1, keepdim=True)
    column = sinks.float().view(run.heads, -1, 1).expand(-1, -1, size).reshape_as(own_mass)
    return logits.softmax(-1).mul_((own_mass - column).sigmoid_())
