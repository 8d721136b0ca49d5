"""What ``chunk.c`` offers to ``ragged.py``."""

def attend(
    queries: int,
    output: int,
    scratch: int,
    scratch_bytes: int,
    threads: int,
    scale: float,
    query_strides: tuple[int, int],
    output_strides: tuple[int, int],
    tokens: int,
    heads: int,
    group: int,
    key_dim: int,
    value_dim: int,
    window: int,
    runs: list[tuple[int, int, int, int, int, int, int, int, int, int, int, bool]],
) -> None:
    """A chunk's queries over ragged runs; addresses of bfloat16 storage, strides of a head and a token in numbers.

    ``queries [heads * group, tokens, key_dim]``, ``output [heads * group, tokens, value_dim]``, rows of which lie
    together; ``scratch`` starts at a multiple of 64. ``window`` is 0 for none. A run is ``(first head, heads, slots,
    keys, values, float32 bias or 0,`` strides of a head in these three, of a slot in keys and values, and whether these
    are the queries' own keys, seen causally ``)``.

    Raises:
        ValueError: the scratch is less than ``threads * scratch_bytes(key_dim, value_dim)``, or a group more than 128.

    """

def scratch_bytes(key_dim: int, value_dim: int, /) -> int:
    """Bytes that a thread works in."""

def available() -> bool:
    """Whether this CPU and this build have AMX's bfloat16 tiles, and the system lets the process use them."""
