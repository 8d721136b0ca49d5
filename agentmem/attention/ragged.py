"""Attention of one row's queries over ragged slots with β. One path per backend; the oracle is in the tests.

Shapes: queries ``[Hq, q, d]``; a :class:`Run` holds KV heads whose slots lie alike; *fresh* keys and values
``[Hkv, q, d]`` belong to the same tokens as the queries and are seen causally. Scores are accumulated in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from agentmem.contracts import blocks

try:
    from agentmem.attention import _decode

    COMPILED = True
except ImportError:  # installed without a C compiler, or not on Linux
    COMPILED = False

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.planning.model_shape import LayerShape

# torch's CPU flash kernel: the one fused path that takes a broadcast float32 β for every input dtype and also
# returns the log-sum-exp, so that old slots and fresh keys are attended apart and merged without any dense mask.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001  # no public name returns the lse

OLD_BLOCK = 128
"""Queries that attend the old slots at a time: bounds the second output that the merge needs."""
TILE_BYTES = 1 << 19
"""Bytes of one tile of logits in the explicit path."""
PIECE = 256
"""Slots of one head that a thread of a compiled decode step takes at least."""
_VECTOR = 16  # floats that decode.c works on at a time


@dataclass(slots=True)
class Run:
    """KV heads ``first .. first + h`` of a layer: ``keys [h, n, d]``, ``values [h, n, dv]``, ``bias [h, n]`` float32.

    ``bias`` is ``None`` while no slot carries a β; ``scores [h, n]`` float32 is where received attention is summed.
    """

    first: int
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None
    scores: torch.Tensor | None = None

    @property
    def heads(self) -> int:
        """Number of KV heads in the run."""
        return int(self.keys.shape[0])

    @property
    def slots(self) -> int:
        """Slots per head."""
        return int(self.keys.shape[1])


@dataclass(frozen=True, slots=True)
class Fresh:
    """Keys ``[Hkv, q, d]`` and values ``[Hkv, q, dv]`` of the queries' own tokens, not in the store (yet)."""

    keys: torch.Tensor
    values: torch.Tensor


def fused_bytes(layer: LayerShape, tokens: int, slots: int, itemsize: int) -> int:
    """Bytes that the fused path of :func:`attend` allocates at most besides its output."""
    block = min(OLD_BLOCK, tokens)
    merge = layer.query_heads * (block * (layer.value_dim * itemsize + 4 * 4) + tokens * 4)
    packed = max(block, layer.group)  # a decode step's rows are its group
    flash = max(
        _flash_scratch(tokens, tokens, layer.value_dim, itemsize),
        _flash_scratch(packed, slots, layer.value_dim, itemsize),
    )
    return merge + max(flash, _decode_bytes(layer))


def _decode_bytes(layer: LayerShape) -> int:
    # decode.c: per piece and query an output, its peak and its mass; and the queries once more if they lie apart
    pieces = layer.kv_heads + 2 * torch.get_num_threads()
    return (pieces * layer.group * (layer.value_dim + 2) + layer.query_heads * layer.key_dim) * 4


def explicit_bytes(layer: LayerShape, tokens: int, slots: int, itemsize: int) -> int:
    """Bytes that the explicit path of :func:`attend` allocates at most besides its output."""
    span = slots + tokens
    rows = layer.query_heads * min(tokens, max(1, TILE_BYTES // (layer.query_heads * span * 4)))
    casts = 0 if itemsize == 4 else layer.kv_heads * span * (layer.key_dim + layer.value_dim) * 4  # noqa: PLR2004
    tiles = 3 * rows * span * 4 + 2 * (rows // layer.query_heads) * span * 9
    return tiles + casts + rows * (2 * layer.value_dim + layer.key_dim) * 4 + 4 * layer.kv_heads * span * 4


def _flash_scratch(tokens: int, slots: int, value_dim: int, itemsize: int) -> int:
    # aten/native/cpu/FlashAttentionKernel.cpp: per thread one [q_split, kv_split] tile (for 16-bit inputs another one
    # in their dtype) and one [q_split, dv] accumulator.
    split = 256 if tokens >= 768 else 64 if tokens >= 192 else 32  # noqa: PLR2004  # the kernel's own thresholds
    split = min(split, tokens)
    tile = min(512, slots) * (4 if itemsize >= 4 else 4 + itemsize)  # noqa: PLR2004  # float32 or wider
    return torch.get_num_threads() * split * (tile + (2 + value_dim) * 4)


def attend(
    queries: torch.Tensor,
    runs: Sequence[Run],
    fresh: Fresh | None,
    scale: float,
    *,
    window: int | None = None,
    explicit: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention output ``[Hq, q, dv]`` and, from the explicit path, what the fresh keys received ``[Hkv, q]``.

    Without ``fresh`` every query sees every slot (a decode step whose own slot was appended already). With it the
    queries see all slots and, causally, the fresh keys. ``window``: a query sees at most that many tokens, itself
    included; slots are then the consecutive tokens before it (without ``fresh`` the caller has cut them). Runs
    with ``scores`` need the explicit path, which
    also serves devices other than CPU.
    """
    longest = max((run.slots for run in runs), default=0) + queries.shape[1]
    if fresh is None or (window is not None and longest <= window):
        window = None
    equal_dims = queries.shape[-1] == (runs[0] if runs else fresh).values.shape[-1]  # type: ignore[union-attr]  # one of the two is there
    if explicit or window is not None or not equal_dims or queries.device.type != "cpu":
        return _explicit(queries, runs, fresh, scale, window)
    return _fused(queries, runs, fresh, scale), None


def _fused(queries: torch.Tensor, runs: Sequence[Run], fresh: Fresh | None, scale: float) -> torch.Tensor:
    tokens = queries.shape[1]
    if fresh is None and tokens == 1 and _compiled(queries, runs):
        return _decode_step(queries, runs, scale)
    if fresh is None:
        outputs = [_flash_run(_grouped(queries, run, runs), run, scale)[0] for run in runs]
        merged = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return merged.reshape(queries.shape[0], tokens, -1)
    kv_heads = fresh.keys.shape[0]
    group = queries.shape[0] // kv_heads
    grouped = queries.view(kv_heads, group, tokens, -1)
    output, lse = _flash_expanded(grouped, fresh.keys, fresh.values, scale, causal=True)
    for run in runs:
        if run.slots:
            _merge(output, lse, grouped, run, scale)
    return output.reshape(queries.shape[0], tokens, -1)


def _compiled(queries: torch.Tensor, runs: Sequence[Run]) -> bool:
    """Whether ``decode.c`` serves this decode step: float32 of whole vectors, slots one behind the other."""
    dim = queries.shape[-1]
    return COMPILED and queries.dtype == torch.float32 and dim % _VECTOR == 0 and all(_plain(run, dim) for run in runs)


def _plain(run: Run, dim: int) -> bool:
    """Whether a run lies in memory as ``decode.c`` reads it; it reads addresses, so nothing else may pass."""
    keys, values, bias = run.keys, run.values, run.bias
    return (
        run.slots > 0
        and keys.dtype == values.dtype == torch.float32
        and keys.device.type == values.device.type == "cpu"
        and keys.stride()[1:] == values.stride()[1:] == (dim, 1)
        and (bias is None or (bias.dtype == torch.float32 and bias.stride(1) == 1))
    )


def _decode_step(queries: torch.Tensor, runs: Sequence[Run], scale: float) -> torch.Tensor:
    """One token's queries ``[Hq, 1, d]`` over all runs at once, every head in pieces of like length."""
    query_heads, _, dim = queries.shape
    group = query_heads // sum(run.heads for run in runs)
    threads = torch.get_num_threads()
    length = max(PIECE, -(-sum(run.heads * run.slots for run in runs) // (2 * threads)))
    pieces = sum(run.heads * -(-run.slots // length) for run in runs)
    queries = queries.contiguous()
    output, scratch = torch.empty_like(queries), queries.new_empty(pieces * group * (dim + 2))
    _decode.attend(
        queries.data_ptr(),
        output.data_ptr(),
        scratch.data_ptr(),
        pieces,
        length,
        threads,
        scale,
        group,
        dim,
        dim,
        [_addresses(run) for run in runs],
    )
    return output


def _addresses(run: Run) -> tuple[int, int, int, int, int, int, int, int, int]:
    """A run as ``decode.c`` reads it; address 0 stands for no β."""
    bias, stride = (0, 0) if run.bias is None else (run.bias.data_ptr(), run.bias.stride(0))
    keys, values = run.keys, run.values
    return (
        run.first,
        run.heads,
        run.slots,
        keys.data_ptr(),
        values.data_ptr(),
        bias,
        keys.stride(0),
        values.stride(0),
        stride,
    )


def _merge(output: torch.Tensor, lse: torch.Tensor, grouped: torch.Tensor, run: Run, scale: float) -> None:
    """Fold the old slots of one run into ``output``, a block of queries at a time."""
    heads = slice(run.first, run.first + run.heads)
    for block in blocks(grouped.shape[2], OLD_BLOCK):
        _merge_block(output[heads, :, block], lse[heads, :, block], grouped[heads, :, block], run, scale)


def _merge_block(output: torch.Tensor, lse: torch.Tensor, grouped: torch.Tensor, run: Run, scale: float) -> None:
    """Weight both parts by their mass (log-sum-exp). A function of its own, so that no block outlives its turn."""
    old, old_lse = _flash_run(grouped, run, scale)
    share = (old_lse - lse).sigmoid_().unsqueeze(-1)
    output.lerp_(old, share.to(old.dtype))


def _flash_run(grouped: torch.Tensor, run: Run, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[h, group, q, dv]`` and log-sum-exp ``[h, group, q]`` of ``grouped [h, group, q, d]`` over one run."""
    heads, group, tokens, _ = grouped.shape
    if tokens == 1:  # the group as rows of one KV head: keys and values are read once for all of it
        output, lse = _flash(
            grouped.reshape(1, heads, group, -1),
            run.keys[None],
            run.values[None],
            0.0,
            attn_mask=None if run.bias is None else run.bias[None, :, None],
            scale=scale,
        )
        return output.reshape(heads, group, 1, -1), lse.reshape(heads, group, 1)
    return _flash_expanded(grouped, run.keys, run.values, scale, bias=run.bias)


def _flash_expanded(
    grouped: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    bias: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel over ``keys [h, n, d]``, each KV head seen by its whole group through a view."""
    group = grouped.shape[1]
    output, lse = _flash(
        grouped,
        keys.unsqueeze(1).expand(-1, group, -1, -1),
        values.unsqueeze(1).expand(-1, group, -1, -1),
        0.0,
        causal,
        attn_mask=None if bias is None else bias[:, None, None],
        scale=scale,
    )
    return output, lse


def _grouped(queries: torch.Tensor, run: Run, runs: Sequence[Run]) -> torch.Tensor:
    """The queries of one run's heads, ``[h, group, q, d]``."""
    group = queries.shape[0] // sum(each.heads for each in runs)
    return queries[run.first * group : (run.first + run.heads) * group].view(run.heads, group, *queries.shape[1:])


def _explicit(
    queries: torch.Tensor, runs: Sequence[Run], fresh: Fresh | None, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not runs and fresh is not None:
        runs = [Run(0, fresh.keys[:, :0], fresh.values[:, :0])]
    output = queries.new_empty(*queries.shape[:2], runs[0].values.shape[-1])
    received = None if fresh is None else fresh.keys.new_zeros(fresh.keys.shape[:2], dtype=torch.float32)
    group = queries.shape[0] // sum(run.heads for run in runs)
    for run in runs:
        heads = slice(run.first, run.first + run.heads)
        rows = slice(run.first * group, (run.first + run.heads) * group)
        own = None if fresh is None else Fresh(fresh.keys[heads], fresh.values[heads])
        span = run.slots + (0 if own is None else own.keys.shape[1])
        for block in blocks(queries.shape[1], max(1, TILE_BYTES // (run.heads * group * span * 4))):
            weights = _weights(queries[rows, block], run, own, scale, window, block.start)
            mixed = weights[..., : run.slots] @ run.values.float()
            if own is not None and received is not None:
                seen = weights.shape[-1] - run.slots
                mixed += weights[..., run.slots :] @ own.values[:, :seen].float()
                received[heads, :seen] += weights[..., run.slots :].sum(1)
            if run.scores is not None:
                run.scores.add_(weights[..., : run.slots].sum(1))
            output[rows, block] = mixed.view(run.heads * group, -1, mixed.shape[-1]).to(output.dtype)
    return output, received


def _weights(
    queries: torch.Tensor, run: Run, fresh: Fresh | None, scale: float, window: int | None, start: int
) -> torch.Tensor:
    """Weights ``[h, group * b, n + stop]`` float32 of the queries ``start .. start + b`` of a chunk."""
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
    return logits.softmax(-1)


def local(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``queries [group, n, d]`` over one head's slots alone: output ``[group, n, dv]`` and log-mass.

    ``keys [T, d]``, ``values [T, dv]``, ``bias [T]`` float32; the log-mass ``[group, n]`` float32 is
    ``log Σ exp(scale · q·k + β)``, what the mass equations of Attention Matching compare (arXiv:2602.16284, §3).
    """
    run = Run(0, keys[None], values[None], bias[None])
    if queries.device.type == "cpu" and keys.shape[-1] == values.shape[-1]:
        output, lse = _flash_run(queries[None], run, scale)
        return output[0].float(), lse[0]
    logits = (queries.float() @ keys.float().T).mul_(scale).add_(bias)
    return logits.softmax(-1) @ values.float(), logits.logsumexp(-1)


def local_bytes(layer: LayerShape, queries: int, before: int, after: int, itemsize: int, *, fused: bool) -> int:
    """Bytes of comparing :func:`local` before and after a compaction, the replacement slots included."""
    outputs = 4 * layer.group * queries * (layer.value_dim * (itemsize + 4) + 8)
    slots = after * (layer.key_dim + layer.value_dim) * (itemsize + 4) + after * 12
    if fused:
        return outputs + slots + _flash_scratch(queries, before, layer.value_dim, itemsize)
    casts = before * (layer.key_dim + layer.value_dim) * 4
    return outputs + slots + 3 * layer.group * queries * before * 4 + casts
