"""The temporary bytes that :mod:`agentmem.memory.rotation` allocates. Integers only, no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.attention import quantised

if TYPE_CHECKING:
    from agentmem.planning.model_shape import LayerShape

BLOCK = quantised.BLOCK
"""How many slots have their keys rotated at once; the temporary bytes are proportional to this number."""


def layer_scratch(layer: LayerShape, slots: int, itemsize: int) -> int:
    """Return the temporary bytes of re-basing a layer whose fullest head has ``slots`` slots, without the new store."""
    return _turned(layer, slots, itemsize) + 3 * map_scratch(slots)


def _turned(layer: LayerShape, slots: int, itemsize: int) -> int:
    dim, block = layer.key_dim, min(slots, BLOCK)
    if not layer.quantised:
        return shift_scratch(slots, dim, itemsize)
    rows = block * (quantised.row_bytes(dim) + 24)  # copies of the moving keys, their indices, positions and deltas
    return shift_scratch(block, dim, 4) + quantised.decode_bytes(block, dim) + quantised.encode_bytes(block, dim) + rows


def shift_scratch(slots: int, width: int, itemsize: int, *, block: int = BLOCK) -> int:
    """Return the most bytes that ``shift_keys`` allocates for ``slots`` keys with ``itemsize`` bytes per number.

    Each slot needs its indices. Each pair of dims needs the larger of two sums: two float64 angles and one float32
    angle; or the cosine, the sine, both halves of the key and a rotated half in the dtype of the computation, plus that
    half rounded to the dtype of the keys.
    """
    turn = max(itemsize, 4)
    pair = max(8 + 8 + 4, 5 * turn + (itemsize if itemsize < turn else 0))
    return min(slots, block) * (pair * (width // 2) + 32) + 12 * (width // 2)


def map_scratch(slots: int) -> int:
    """Return the most bytes that ``widest_gap`` or ``rebased`` allocates for a head of ``slots`` slots."""
    return 20 * slots + 64
