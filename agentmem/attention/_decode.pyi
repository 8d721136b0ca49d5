"""Declare the functions of ``decode.c``, which ``decode.py`` uses."""

from typing import Any

def attend(
    kind: int,
    key_kind: int,
    value_kind: int,
    threads: int,
    scale: float,
    window: int,
    rows: int,
    heads: int,
    group: int,
    key_dim: int,
    value_dim: int,
    queries: int,
    query_strides: tuple[int, ...],
    keys: int,
    key_strides: tuple[int, ...],
    values: int,
    value_strides: tuple[int, ...],
    output: int,
    scratch: int,
    scratch_bytes: int,
    sequences: list[tuple[int, Any, list[int], bool]],
) -> None:
    """Attend with one token of each of several sequences over the slots of its own sequence.

    Tensors are addresses of storage; strides, over rows and heads, are in elements.

    Args:
        kind: dtype of queries, fresh rows and output: 0 float32, 1 bfloat16, 2 float16.
        key_kind: dtype of the slots' keys: the same number as ``kind``, or 3 or 4 for rows of ``quantised.py`` with
            codes of 8 or 4 bits.
        value_kind: the same of their values. Both are quantised or none.
        threads: number of threads.
        scale: factor on the attention logits.
        window: the number of last slots that are attended to, 0 for all.
        rows: number of rows of queries and output.
        heads: number of KV heads.
        group: query heads per KV head.
        key_dim: elements of a key.
        value_dim: elements of a value.
        queries: address of ``[rows, heads * group, key_dim]``.
        query_strides: strides of ``queries``.
        keys: address of the fresh keys ``[rows, heads, key_dim]``, or 0 if there are no fresh rows. Fresh rows are
            written to the slots after the filled ones, and are attended to.
        key_strides: strides of ``keys``.
        values: address of the fresh values ``[rows, heads, value_dim]``.
        value_strides: strides of ``values``.
        output: address of ``[rows, heads * group, value_dim]``, contiguous.
        scratch: address of scratch memory.
        scratch_bytes: bytes at ``scratch``.
        sequences: for each sequence its row, its layout, the filled slots of each head, and whether slots have a β. The
            first item of the layout has four uint64 per head: the addresses of its keys, values and float32 β (0
            without β), and its capacity in slots.

    Raises:
        ValueError: a head has no slots, or no room for one more; a row does not exist; the scratch is too small; or the
            code does not support the shape. Nothing was written.

    """

def scratch_bytes(sequences: int, heads: int, group: int, key_dim: int, value_dim: int, threads: int, /) -> int:
    """Return the bytes of working memory (scratch) that :func:`attend` needs, whatever the number of slots."""

def use(level: int, /) -> bool:
    """Choose the instruction set: that of any CPU (0), AVX2 (1) or AVX-512 (2).

    Return ``False``, and change nothing, if this CPU lacks these instructions.
    """
