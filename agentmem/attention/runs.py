"""What attention sees: slots of KV heads that lie alike, and the keys and values of the queries' own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agentmem.attention import quantised

FLOAT = 4
"""Bytes of float32."""


@dataclass(slots=True)
class Run:
    """KV heads ``first .. first + h`` of a layer: ``keys [h, n, d]``, ``values [h, n, dv]``, ``bias [h, n]`` float32.

    Quantised keys and values are uint8 ``[h, n, row_bytes]``. ``bias`` is ``None`` while no slot carries a β; ``scores
    [h, n]`` float32 is where received attention is summed.
    """

    first: int
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    quantised: tuple[int, int] | None = None
    """The key and value dims where keys and values are rows of :mod:`agentmem.attention.quantised`, uint8."""

    @property
    def value_dim(self) -> int:
        """Numbers in a value."""
        return int(self.values.shape[2]) if self.quantised is None else self.quantised[1]

    @property
    def copied(self) -> bool:
        """Whether keys and values must be copied to be float32."""
        return self.keys.dtype.itemsize < FLOAT

    def part(self, span: slice) -> Run:
        """Some of the slots, without their scores."""
        bias = None if self.bias is None else self.bias[:, span]
        return Run(self.first, self.keys[:, span], self.values[:, span], bias, None, self.quantised)

    def wide(self) -> Run:
        """The same with keys and values in float32, or as they are if that holds less."""
        if self.quantised is None:
            return Run(self.first, wide(self.keys), wide(self.values), self.bias)
        keys, values = (quantised.decode(*each) for each in zip((self.keys, self.values), self.quantised, strict=True))
        return Run(self.first, keys, values, self.bias)

    @property
    def heads(self) -> int:
        """Number of KV heads in the run."""
        return int(self.keys.shape[0])

    @property
    def slots(self) -> int:
        """Slots per head."""
        return int(self.keys.shape[1])


@dataclass(frozen=True, slots=True)
class Fresh:
    """Keys ``[Hkv, q, d]`` and values ``[Hkv, q, dv]`` of the queries' own tokens, not in the store (yet)."""

    keys: torch.Tensor
    values: torch.Tensor


def wide(numbers: torch.Tensor) -> torch.Tensor:
    """As float32, or as they are if that holds less."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))
