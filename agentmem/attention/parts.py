"""Divide attention among the programs of the kernel for CUDA, and count the bytes that this takes; no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentmem.planning.model_shape import LayerShape

TOKENS = 128
"""The most tokens whose queries one launch of the kernel gets."""
PROGRAMS = 256
"""Slots are split further until a launch has about this many programs, so that every multiprocessor has work."""
LEAST_SPLIT = 128
"""A split has at least this many slots, unless a head has fewer."""
COLUMNS = 7
"""Numbers of 8 bytes that describe a KV head's slots, or its fresh keys, to the kernel."""
BLOCK = 512
"""The caching allocator of torch rounds the bytes of every CUDA tensor up to a multiple of this."""
_ROWS = (16, 64)


def block_rows(queries: int) -> int:
    """Return how many of the ``queries`` of one KV head (tokens x query heads) a program computes."""
    return _ROWS[queries > _ROWS[0]]


def split_count(heads: int, queries: int, slots: int) -> int:
    """Return into how many splits the slots of each of ``heads`` KV heads are divided.

    ``queries`` is the number of queries of one KV head. ``slots`` is the largest number of slots of a head.
    """
    programs = heads * -(-queries // block_rows(queries))
    return max(1, min(PROGRAMS // programs, -(-slots // LEAST_SPLIT)))


def kernel_bytes(layer: LayerShape, tokens: int, slots: int) -> int:
    """Return the most bytes that :func:`agentmem.attention.triton_kernel.attend` allocates besides its output.

    These are outputs and log-sum-exps (float32) of all parts, the log-sum-exps of the result, and the table of heads,
    each rounded up as torch's caching allocator does. ``tokens`` is the number of tokens whose queries attend, and
    ``slots`` the largest number of slots of a KV head. Keys, values and queries are not copied.
    """
    most = max(_part_rows(layer, count, slots) for count in {1, *_edges(layer, min(tokens, TOKENS))})
    sizes = (most * layer.value_dim * 4, most * 4, layer.query_heads * tokens * 4, 2 * layer.kv_heads * COLUMNS * 8)
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)


def _edges(layer: LayerShape, tokens: int) -> set[int]:
    """Return the numbers of tokens, up to ``tokens``, behind which a program more is needed for a KV head."""
    edges = {rows // layer.group for size in _ROWS for rows in range(size, layer.group * tokens + 1, size)}
    return {each for each in edges if 1 <= each <= tokens} | {tokens}


def _part_rows(layer: LayerShape, tokens: int, slots: int) -> int:
    splits = split_count(layer.kv_heads, layer.group * tokens, slots)
    return (splits + 1) * layer.query_heads * tokens
