"""The sizes of a model that a memory needs to know. Integers only: no tensors, and no code of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from agentmem.attention.quantised import BITS, Format, formats
from agentmem.errors import SettingsRefused

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agentmem.settings import SlotDtype

BIAS_BYTES = 4
POSITION_BYTES = 4
SCORE_BYTES = 4
_SHOWN = 4
MIN_SPARE = 16
"""The least number of positions that a re-basing leaves free."""


def spare_positions(positions: int) -> int:
    """Return how many of a model's positions a re-basing leaves free, so that the next re-basing is not due soon."""
    return max(MIN_SPARE, positions // 8)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The sizes of one attention layer.

    ``window`` is its sliding window in tokens, ``None`` for full attention. ``sinks`` is true if each query head has an
    attention sink: one more logit in the softmax denominator, which the fused attention paths cannot add.
    """

    kv_heads: int
    query_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    sinks: bool = False
    slot_dtype: SlotDtype = "auto"
    """How slots store keys and values: in the model's dtype (``auto``) or quantised."""

    @property
    def quantised(self) -> bool:
        """True if slots store keys and values as quantised codes and scales."""
        return self.slot_dtype != "auto"

    @property
    def formats(self) -> tuple[Format, Format] | None:
        """The formats of quantised keys and values; ``None`` if slots store them in the model's dtype."""
        return formats(self.slot_dtype, self.key_dim, self.value_dim)

    @property
    def bits(self) -> tuple[int, int]:
        """The bits of the codes of keys and of values; 0 and 0 if slots store numbers of the model's dtype."""
        return BITS.get(self.slot_dtype, (0, 0))

    def row_bytes(self, itemsize: int) -> tuple[int, int]:
        """Return the bytes of a slot's key and of its value; ``itemsize`` is the bytes of a number in the model."""
        if self.formats is not None:
            keys, values = self.formats
            return keys.row_bytes, values.row_bytes
        return self.key_dim * itemsize, self.value_dim * itemsize

    @property
    def group(self) -> int:
        """The number of query heads per KV head."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model: its layers, the bytes of one number (``itemsize``), and what its activations depend on."""

    name: str
    layers: tuple[LayerShape, ...]
    itemsize: int
    hidden: int
    intermediate: int
    vocabulary: int
    fused: bool = True
    """True if the model's device (such as the CPU) has a fused attention path; if not, attention stores all logits."""
    fingerprint: str | None = None
    """A value that differs between models with different weights; ``None`` if the weights are not loaded."""
    positions: int | None = None
    """The number of positions that the model was made for; ``None`` if its config does not state it."""

    def with_sinks(self) -> Self:
        """Return a copy of this shape with attention sinks in every layer."""
        return replace(self, layers=tuple(replace(layer, sinks=True) for layer in self.layers))

    def with_slots(self, slot_dtype: SlotDtype) -> Self:
        """Return a copy of this shape in which the slots of every layer have ``slot_dtype``."""
        return replace(self, layers=tuple(replace(layer, slot_dtype=slot_dtype) for layer in self.layers))

    def slot_bytes(self, layer: LayerShape, *, scores: bool) -> int:
        """Return the bytes of one slot: key, value, β, position, and a score if ``scores`` is true."""
        return sum(layer.row_bytes(self.itemsize)) + BIAS_BYTES + POSITION_BYTES + (SCORE_BYTES if scores else 0)

    def full_bytes(self, tokens: int) -> int:
        """Return the bytes of keys and values in a cache that compacts nothing, after so many tokens of one row.

        Layers with a sliding window hold no more than that.
        """
        dims = [(layer.kv_heads * (layer.key_dim + layer.value_dim), layer.window or tokens) for layer in self.layers]
        return sum(dim * min(tokens, window) for dim, window in dims) * self.itemsize

    @property
    def compactable(self) -> tuple[int, ...]:
        """The indices of the layers that policies compact: the layers with full attention."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.window is None)

    def check_ids(self, field: str, ids: Iterable[int]) -> None:
        """Check that the model has an embedding for each id; a forward of other ids would fail or use a wrong one.

        Raises:
            SettingsRefused: some ids are unknown; the message names ``field`` and the first of them.

        """
        wrong = [int(each) for each in ids if not 0 <= each < self.vocabulary]
        if wrong:
            raise SettingsRefused(
                f"{field}: {wrong[:_SHOWN]} are no ids of this model, which knows 0..{self.vocabulary - 1}; use the "
                "tokenizer that belongs to the model, or model.resize_token_embeddings(len(tokenizer)) first"
            )

    def activation_bytes(self, tokens: int) -> int:
        """Return an estimate of the model's own activations (A) in bytes, for a forward of ``tokens`` tokens.

        A decoder layer allocates most either in its MLP (residual, normed input, gate, up and their product) or in its
        attention; the larger of the two is counted. The logits of the last token and their float32 copy are added.
        """
        widest = 3 * self.intermediate + 3 * self.hidden
        attention = max(2 * (layer.query_heads + layer.kv_heads) * layer.key_dim for layer in self.layers)
        return tokens * max(widest, attention + 3 * self.hidden) * self.itemsize + 3 * self.vocabulary * 4
