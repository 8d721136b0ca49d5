"""Compute the temporary bytes that :mod:`agentmem.memory.rotation` allocates. Integers only, no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.attention import quantised

if TYPE_CHECKING:
    from agentmem.planning.model_shape import LayerShape

BLOCK = quantised.BLOCK
"""The number of keys that are rotated at once; the temporary bytes of a rotation are proportional to this number."""


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

    ``width`` is the number of dims that rotate. Each slot needs its indices. Each pair of dims needs the bytes of one
    of two steps, whichever needs more. The first step computes two float64 angles and one float32 angle. The second
    step computes five numbers in the dtype of the computation (the cosine, the sine, both numbers of the pair and a
    rotated number), and rounds the rotated number to the dtype of the keys.
    """
    turn = max(itemsize, 4)
    pair = max(8 + 8 + 4, 5 * turn + (itemsize if itemsize < turn else 0))
    return min(slots, block) * (pair * (width // 2) + 32) + 12 * (width // 2)


def map_scratch(slots: int) -> int:
    """Return the most bytes that ``widest_gap`` or ``rebased`` allocates for a head with ``slots`` slots."""
    return 20 * slots + 64
