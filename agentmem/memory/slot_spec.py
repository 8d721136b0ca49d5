"""The layout of one slot of a layer: its dtypes and bytes, and how its rows are written, rounded and moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from agentmem.attention import quantised
from agentmem.contracts import blocks
from agentmem.memory.rotation import shift_keys

if TYPE_CHECKING:
    from agentmem.memory.rotation import Rotation
    from agentmem.planning.model_shape import LayerShape


Part = Literal["keys", "values"]


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """The layout of one slot of a layer; ``dtype`` is the dtype in which attention computes with keys and values."""

    shape: LayerShape
    dtype: torch.dtype
    device: torch.device
    scores: bool

    @property
    def slot_bytes(self) -> int:
        """The bytes of one slot: key, value, β, position, and the score if slots have scores."""
        return sum(self.shape.row_bytes(self.dtype.itemsize)) + 4 + 4 + (4 if self.scores else 0)

    @property
    def row_dtype(self) -> torch.dtype:
        """The dtype in which keys and values are stored: ``uint8`` if they are quantised, else ``dtype``."""
        return torch.uint8 if self.shape.quantised else self.dtype

    @property
    def row_sizes(self) -> tuple[int, int]:
        """The number of elements of ``row_dtype`` in a stored key and in a stored value."""
        key, value = self.shape.row_bytes(self.dtype.itemsize)
        return key // self.row_dtype.itemsize, value // self.row_dtype.itemsize

    def shift(self, keys: torch.Tensor, positions: torch.Tensor, deltas: torch.Tensor, rotation: Rotation) -> None:
        """Rotate ``n`` stored keys in place from ``positions`` to ``positions + deltas``.

        See :func:`agentmem.memory.rotation.shift_keys`. Keys whose delta is 0 are not changed. Quantised keys that move
        are decoded and encoded again, which adds an error of up to half a quantisation step.
        """
        if self.shape.formats is None:
            shift_keys(keys, positions, deltas, rotation)
            return
        form = self.shape.formats[0]
        for block in blocks(keys.shape[0], quantised.BLOCK):
            moved = deltas[block].nonzero()[:, 0]
            if moved.shape[0]:
                rows = form.decode(keys[block][moved])
                shift_keys(rows, positions[block][moved], deltas[block][moved], rotation)
                keys[block].index_copy_(0, moved, form.encode(rows))

    def rounded(self, rows: torch.Tensor, part: Part) -> torch.Tensor:
        """Return keys or values ``[n, d]`` as quantised slots would return them after storing, in ``dtype``.

        ``part`` states which of the two ``rows`` are. Without quantised slots, ``rows`` itself is returned.
        """
        form = self._format(part)
        if form is None:
            return rows
        found = rows.new_empty(rows.shape, dtype=self.dtype)
        for block in blocks(rows.shape[0], quantised.BLOCK):
            found[block] = form.decode(form.encode(rows[block]))
        return found

    def write(self, rows: torch.Tensor, sink: torch.Tensor, part: Part) -> None:
        """Write keys or values ``[…, n, d]`` into ``sink […, n, row_size]``; encode them if slots are quantised.

        ``part`` states which of the two ``rows`` are.
        """
        form = self._format(part)
        if form is None:
            sink.copy_(rows)
            return
        for block in blocks(rows.shape[-2], quantised.BLOCK):
            sink[..., block, :] = form.encode(rows[..., block, :])

    def _format(self, part: Part) -> quantised.Format | None:
        """Return the format of encoded keys or values; ``None`` if they are not encoded."""
        return None if self.shape.formats is None else self.shape.formats[part == "values"]
