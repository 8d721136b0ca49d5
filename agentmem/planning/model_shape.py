"""The sizes of a model that a memory needs to know: integers only, no tensors and no model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from agentmem.attention import quantised

if TYPE_CHECKING:
    from agentmem.settings import SlotDtype

BIAS_BYTES = 4
POSITION_BYTES = 4
SCORE_BYTES = 4
MIN_SPARE = 16
"""Positions that stay free at least, where rows are re-based."""


def spare_positions(positions: int) -> int:
    """Positions that stay free, so that rows which are nearly full are not re-based again and again."""
    return max(MIN_SPARE, positions // 8)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One attention layer. ``window`` is its sliding window in tokens, ``None`` for full attention.

    ``sinks`` says that each query head has one more logit in its denominators, which the fused paths cannot add.
    """

    kv_heads: int
    query_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    sinks: bool = False
    slot_dtype: SlotDtype = "auto"
    """What its slots hold: the model's own numbers, or those of :mod:`agentmem.attention.quantised`."""

    @property
    def quantised(self) -> bool:
        """Whether slots hold codes and scales instead of numbers."""
        return self.slot_dtype != "auto"

    def row_bytes(self, itemsize: int) -> tuple[int, int]:
        """Bytes of a slot's key and of its value, for a model with ``itemsize`` bytes a number."""
        if self.quantised:
            return quantised.row_bytes(self.key_dim), quantised.row_bytes(self.value_dim)
        return self.key_dim * itemsize, self.value_dim * itemsize

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All layers of a model, the bytes of one number in it, and what its forward needs besides."""

    name: str
    layers: tuple[LayerShape, ...]
    itemsize: int
    hidden: int
    intermediate: int
    vocabulary: int
    fused: bool = True
    """Whether attention has a fused path for the model's device (CPU); else its logits are materialised."""
    fingerprint: str | None = None
    """Tells models of one architecture apart by their weights; ``None`` where no weights are at hand."""
    positions: int | None = None
    """Positions that the model was made for; ``None`` where its config does not say."""

    def with_sinks(self) -> Self:
        """The same with attention sinks in every layer."""
        return replace(self, layers=tuple(replace(layer, sinks=True) for layer in self.layers))

    def with_slots(self, slot_dtype: SlotDtype) -> Self:
        """The same with such numbers in the slots of every layer."""
        return replace(self, layers=tuple(replace(layer, slot_dtype=slot_dtype) for layer in self.layers))

    def slot_bytes(self, layer: LayerShape, *, scores: bool) -> int:
        """Bytes of one slot: key row, value row, β, position, and a score accumulator where one is kept."""
        return sum(layer.row_bytes(self.itemsize)) + BIAS_BYTES + POSITION_BYTES + (SCORE_BYTES if scores else 0)

    @property
    def compactable(self) -> tuple[int, ...]:
        """Indices of the layers that a policy compacts (full attention)."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.window is None)

    def activation_bytes(self, tokens: int) -> int:
        """Estimate of A: what the model's own modules allocate in one forward of ``tokens`` tokens.

        The widest moment of a decoder layer is its MLP: residual, normed input, gate, up and their product; the
        logits of the last token and their float32 copy come on top.
        """
        widest = 3 * self.intermediate + 3 * self.hidden
        attention = max(2 * (layer.query_heads + layer.kv_heads) * layer.key_dim for layer in self.layers)
        return tokens * max(widest, attention + 3 * self.hidden) * self.itemsize + 3 * self.vocabulary * 4
