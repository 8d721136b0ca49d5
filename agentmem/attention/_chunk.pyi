"""Declare the functions of ``chunk.c``, which ``ragged.py`` uses."""

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
    """Attend with the queries of several tokens over runs of KV heads with different numbers of slots.

    Tensors are addresses of bfloat16 storage with contiguous rows; strides, over heads and tokens, are in elements.

    Args:
        queries: address of ``[heads * group, tokens, key_dim]``.
        output: address of ``[heads * group, tokens, value_dim]``.
        scratch: address that is a multiple of 64.
        scratch_bytes: bytes at ``scratch``.
        threads: number of threads.
        scale: factor on the attention logits.
        query_strides: strides of ``queries`` over heads and tokens.
        output_strides: strides of ``output`` over heads and tokens.
        tokens: number of tokens.
        heads: number of KV heads.
        group: query heads per KV head.
        key_dim: elements of a key.
        value_dim: elements of a value.
        window: the most tokens that a query attends to, 0 for all.
        runs: for each run, in this order: first head, number of heads, number of slots; addresses of keys, values and
            float32 β (0 without β); their three strides over heads; the strides of keys and values over slots; whether
            these are the keys of the queries' own tokens, which are attended to causally.

    Raises:
        ValueError: ``scratch_bytes`` is less than ``threads * scratch_bytes(key_dim, value_dim)``, or ``group`` is more
            than 128.

    """

def scratch_bytes(key_dim: int, value_dim: int, /) -> int:
    """Return the bytes of working memory (scratch) that each thread needs."""

def available() -> bool:
    """Return whether this CPU and this build support AMX's bfloat16 tiles, and the system permits their use."""
