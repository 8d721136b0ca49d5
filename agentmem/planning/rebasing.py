"""Compute the temporary bytes that :mod:`agentmem.memory.rotation` allocates. Integers only, no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.attention import quantised

if TYPE_CHECKING:
    from agentmem.planning.model_shape import LayerShape

BLOCK = quantised.BLOCK
"""The number of keys that are rotated at once; the temporary bytes of a rotation are proportional to this number."""


def layer_scratch(layer: LayerShape, slots: int, itemsize: int) -> int:
    """Return the temporary bytes that re-basing one layer needs.

    ``slots`` is the number of slots of the head that holds the most. ``itemsize`` is the bytes per number of an
    unquantised key. The keys are rotated in a new store of the layer. The bytes of this store are not included.
    """
    return _turned(layer, slots, itemsize) + 3 * map_scratch(slots)


def _turned(layer: LayerShape, slots: int, itemsize: int) -> int:
    dim, block = layer.key_dim, min(slots, BLOCK)
    if layer.formats is None:
        return shift_scratch(slots, dim, itemsize)
    form = layer.formats[0]
    rows = block * (form.row_bytes + 24)  # copies of the moving keys, their indices, positions and deltas
    return shift_scratch(block, dim, 4) + form.decode_bytes(block) + form.encode_bytes(block) + rows


def shift_scratch(slots: int, width: int, itemsize: int, *, block: int = BLOCK) -> int:
    """Return the most bytes that ``shift_keys`` allocates while it rotates ``slots`` keys.

    ``shift_keys`` rotates at most ``block`` keys at once. The first ``width`` dims of a key rotate, in pairs. Each
    number of a key has ``itemsize`` bytes.

    A key needs bytes for its index and its positions. In addition, each pair of the key's dims takes two steps, one
    after the other. The result counts the step that needs more bytes:

    - The first step computes two angles in float64 and one in float32.
    - The second step computes the cosine, the sine, both numbers of the pair and a rotated number, in at least float32.
      If the keys have a smaller dtype, the rotated number is also rounded to this dtype.
    """
    turn = max(itemsize, 4)
    pair = max(8 + 8 + 4, 5 * turn + (itemsize if itemsize < turn else 0))
    return min(slots, block) * (pair * (width // 2) + 32) + 12 * (width // 2)


def map_scratch(slots: int) -> int:
    """Return the most bytes that are allocated to compute the new positions of one head with ``slots`` slots.

    Two functions compute these positions: ``widest_gap`` and ``rebased`` of :mod:`agentmem.memory.rotation`. Each of
    them allocates at most this number of bytes.
    """
    return 20 * slots + 64
