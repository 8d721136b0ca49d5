"""What ``decode.c`` offers to ``attention.py``."""

def attend(
    queries: int,
    output: int,
    scratch: int,
    pieces: int,
    length: int,
    threads: int,
    scale: float,
    group: int,
    key_dim: int,
    value_dim: int,
    runs: list[tuple[int, int, int, int, int, int, int, int, int]],
) -> None:
    """One token's queries over ragged runs; addresses of float32 storage, strides in floats.

    ``queries [heads * group, key_dim]``, ``output [heads * group, value_dim]``,
    ``scratch [pieces * group * (value_dim + 2)]``; a run is ``(first head, heads, slots, keys, values, bias or 0,`` and
    the strides of a head in these three ``)``.

    Raises:
        ValueError: the runs have more than ``pieces`` pieces of ``length`` slots.

    """

def use(level: int, /) -> bool:
    """Work with the instructions of any CPU (0), AVX2 (1) or AVX-512 (2); ``False`` if this CPU lacks them."""
