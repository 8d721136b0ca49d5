"""What ``decode.c`` offers to ``decode.py``."""

from typing import Any

def attend(
    kind: int,
    slots: int,
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
    """One token of each sequence over its slots; addresses of storage of one dtype, strides in numbers.

    ``kind`` of queries, fresh rows and output: 0 float32, 1 bfloat16, 2 float16; of ``slots`` the same, or 3 for rows
    of ``quantised.py``. ``queries [rows, heads * group, key_dim]``, fresh ``keys [rows, heads, key_dim]`` and ``values
    [rows, heads, value_dim]``, each with its strides of a row and of a head;
    ``output [rows, heads * group, value_dim]`` lies together. A sequence is ``(its row, (heads, …), slots that each
    head has filled, whether slots carry a β)``, where ``heads`` has four uint64 a head: the addresses of its keys,
    values and float32 β (0: none), and the slots that it has room for. The fresh rows become the slots behind those
    that are filled, and are attended to; where the address of ``keys`` is 0 there are none. ``window``: only so many of
    the last slots are attended to, 0 for all.

    Raises:
        ValueError: a head without slots, or without room for one more; a row that is not there; too little scratch; a
            shape that this code is not made for. Nothing was written.

    """

def scratch_bytes(sequences: int, heads: int, group: int, key_dim: int, value_dim: int, threads: int, /) -> int:
    """Bytes of scratch for so many sequences, whatever their slots."""

def use(level: int, /) -> bool:
    """Work with the instructions of any CPU (0), AVX2 (1) or AVX-512 (2); ``False`` if this CPU lacks them."""
