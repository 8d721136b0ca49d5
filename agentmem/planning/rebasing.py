"""What :mod:`agentmem.memory.rotation` allocates besides the stores: integers only, no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.attention import quantised

if TYPE_CHECKING:
    from agentmem.planning.model_shape import LayerShape

BLOCK = quantised.BLOCK
"""Slots whose keys are turned at once: what scratch is proportional to."""


def layer_scratch(layer: LayerShape, slots: int, itemsize: int) -> int:
    """Bytes that moving a layer whose fullest head has so many slots takes beside its new store."""
    return _turned(layer, slots, itemsize) + 3 * map_scratch(slots)


def _turned(layer: LayerShape, slots: int, itemsize: int) -> int:
    dim, block = layer.key_dim, min(slots, BLOCK)
    if not layer.quantised:
        return shift_scratch(slots, dim, itemsize)
    rows = block * (quantised.row_bytes(dim) + 24)  # copies of what moves, its indices, positions and deltas
    return shift_scratch(block, dim, 4) + quantised.decode_bytes(block, dim) + quantised.encode_bytes(block, dim) + rows


def shift_scratch(slots: int, width: int, itemsize: int, *, block: int = BLOCK) -> int:
    """Bytes that ``shift_keys`` allocates at most for so many keys of ``itemsize`` bytes a number.

    Per slot: its indices, and per pair of dims either two float64 angles and one in float32, or cosine, sine, both
    halves and the turned one in the dtype of the turn, with the last rounded.
    """
    turn = max(itemsize, 4)
    pair = max(8 + 8 + 4, 5 * turn + (itemsize if itemsize < turn else 0))
    return min(slots, block) * (pair * (width // 2) + 32) + 12 * (width // 2)


def map_scratch(slots: int) -> int:
    """Bytes that ``widest_gap`` and ``rebased`` allocate at most for a head of so many slots."""
    return 20 * slots + 64
