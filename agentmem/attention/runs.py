"""The two sources of keys and values in attention: stored slots (:class:`Run`), and new tokens (:class:`Fresh`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from agentmem.attention.quantised import Format
    from agentmem.planning.model_shape import LayerShape

FLOAT = 4
"""Bytes of float32."""


@dataclass(slots=True)
class Run:
    """The slots of ``h`` consecutive KV heads, beginning with head ``first``, that hold ``n`` slots each.

    ``keys`` are ``[h, n, d]`` and ``values`` are ``[h, n, dv]``; both are uint8 ``[h, n, row_bytes]`` if quantised.
    ``bias [h, n]`` float32 holds β and is ``None`` while no slot has a β. If ``scores [h, n]`` float32 is given,
    attention adds to it the attention that each slot receives.
    """

    first: int
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    quantised: tuple[Format, Format] | None = None
    """The formats of keys and values if they are rows of :mod:`agentmem.attention.quantised`, else ``None``."""

    @property
    def value_dim(self) -> int:
        """The number of elements of a value, before quantisation if values are quantised."""
        return int(self.values.shape[2]) if self.quantised is None else self.quantised[1].dim

    @property
    def copied(self) -> bool:
        """True if keys and values are narrower than float32, so that torch's kernel needs a converted copy."""
        return self.keys.dtype.itemsize < FLOAT

    def part(self, span: slice) -> Run:
        """Return the slots in ``span`` of every head, as views; the ``scores`` of the result are ``None``."""
        bias = None if self.bias is None else self.bias[:, span]
        return Run(self.first, self.keys[:, span], self.values[:, span], bias, None, self.quantised)

    def wide(self, dtype: torch.dtype = torch.float32) -> Run:
        """Return the same slots with keys and values in float32 or wider.

        Quantised keys and values are decoded to ``dtype``. Others are converted to float32 if they are narrower. The
        ``scores`` of the result are ``None``.
        """
        if self.quantised is None:
            return Run(self.first, wide(self.keys), wide(self.values), self.bias)
        keys, values = (
            form.decode(rows, dtype) for rows, form in zip((self.keys, self.values), self.quantised, strict=True)
        )
        return Run(self.first, keys, values, self.bias)

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return int(self.keys.shape[0])

    @property
    def slots(self) -> int:
        """The number of slots per head."""
        return int(self.keys.shape[1])


@dataclass(frozen=True, slots=True)
class Fresh:
    """The keys ``[Hkv, q, d]`` and values ``[Hkv, q, dv]`` of the queries' own tokens, not yet stored in slots."""

    keys: torch.Tensor
    values: torch.Tensor


def wide(numbers: torch.Tensor) -> torch.Tensor:
    """Return ``numbers`` converted to float32, or unchanged if their dtype is wider."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def wide_bytes(layer: LayerShape, heads: int, keys: int, itemsize: int) -> int:
    """Return the bytes that copies of keys and values in float32 take.

    The result is 0 if keys and values are stored as float32 or wider. For quantised slots, the result is the bytes that
    decoding allocates.
    """
    if layer.formats is not None:
        return sum(form.decode_bytes(heads * keys, max(FLOAT, itemsize)) for form in layer.formats)
    return heads * keys * (layer.key_dim + layer.value_dim) * FLOAT if itemsize < FLOAT else 0
