"""What ``decode.c`` offers to ``attention.py``."""

def attend(
    kind: int,
    queries: int,
    output: int,
    scratch: int,
    heads: int,
    pieces: int,
    length: int,
    threads: int,
    scale: float,
    group: int,
    key_dim: int,
    value_dim: int,
    runs: list[tuple[int, int, int, int, int, int, int, int, int]],
) -> None:
    """One token's queries over ragged runs; addresses of storage of one dtype, strides in numbers.

    ``kind`` of storage: 0 float32, 1 bfloat16, 2 float16. ``queries [heads * group, key_dim]``, ``output [heads *
    group, value_dim]``; ``scratch`` float32, ``heads * group * key_dim + pieces * group * (value_dim + 2)``; a run
    is ``(first head, heads, slots, keys, values, float32 bias or 0,`` and the strides of a head in these three ``)``.

    Raises:
        ValueError: the runs have more than ``pieces`` pieces of ``length`` slots.

    """

def use(level: int, /) -> bool:
    """Work with the instructions of any CPU (0), AVX2 (1) or AVX-512 (2); ``False`` if this CPU lacks them."""
