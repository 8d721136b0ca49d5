"""Quantise keys and values to rows of 8-bit or 4-bit codes, with one scale for each group of codes.

A key or value with ``d`` numbers is encoded as the codes of its groups, a byte of padding if their bytes are an odd
number, and the bfloat16 scales of the groups. A number decodes to its code times the scale of its group. Scales are
rounded up, so that all codes are within -127 … 127 or -7 … 7, and codes are rounded to the nearest integer. The error
of a number is at most half a scale, which is 0.4 % or 7 % of the largest number in its group.

Codes of 4 bits are those of the row after a Hadamard transform, which spreads large numbers over the whole row.
Decoding transforms the row back. The transform changes no inner product, so attention may also transform its queries
and sums instead. The codes of a group of ``g`` numbers take ``g / 2`` bytes, rounded up: byte ``i`` has code ``i`` in
its lower half and code ``i + g / 2`` in its upper half.

If a number is not finite, its whole group decodes to NaN, and with 4 bits the whole row. ``decode.c`` reads and writes
the same format.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from agentmem.settings import SlotDtype

GROUPS = (32, 16)
"""The sizes that a group may have: the first size that divides ``d`` is used; if none does, the row is one group."""
BLOCK = 64
"""The number of tokens that are encoded at a time."""
READ = 512
"""The number of rows that :meth:`Format.decode_rows` decodes at a time."""
BITS: dict[SlotDtype, tuple[int, int]] = {"int8": (8, 8), "k8v4": (8, 4), "int4": (4, 4)}
"""The bits of the codes of keys and of values, for each setting ``slot_dtype`` that quantises."""
_FLOAT, _SCALE = 4, 2  # bytes
_BYTE = 8  # bits


class Format(NamedTuple):
    """The format of encoded rows of ``dim`` numbers, with codes of ``bits`` bits: 8 or 4."""

    dim: int
    bits: int = 8

    @property
    def paired(self) -> bool:
        """True if a byte has two codes, of transformed numbers."""
        return self.bits < _BYTE

    @property
    def group(self) -> int:
        """Return how many numbers share one scale."""
        return next((size for size in GROUPS if self.dim % size == 0), self.dim)

    @property
    def row_bytes(self) -> int:
        """Return the bytes of an encoded row."""
        return self._scales_at + _SCALE * self._groups

    @property
    def _groups(self) -> int:
        return self.dim // self.group

    @property
    def _group_bytes(self) -> int:
        return (self.group + 1) // 2 if self.paired else self.group

    @property
    def _codes_bytes(self) -> int:
        return self._groups * self._group_bytes

    @property
    def _scales_at(self) -> int:
        return self._codes_bytes + self._codes_bytes % 2

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode rows ``[..., d]`` of any floating dtype, and return them as uint8 ``[..., row_bytes]``."""
        numbers = transform(rows.to(torch.float32, copy=True)) if self.paired else rows.float()
        groups = numbers.reshape(*rows.shape[:-1], self._groups, self.group)
        scale = _rounded_up(groups.abs().amax(-1) / (2 ** (self.bits - 1) - 1))
        codes = (groups / scale.unsqueeze(-1)).nan_to_num_(0.0, 0.0, 0.0).round_()
        del numbers, groups
        encoded = rows.new_zeros(*rows.shape[:-1], self.row_bytes, dtype=torch.uint8)
        self._pack(codes, _grouped(encoded[..., : self._codes_bytes].view(torch.int8), self._groups))
        self.scales(encoded).copy_(scale)
        return encoded

    def _pack(self, codes: torch.Tensor, to: torch.Tensor) -> None:
        """Write ``codes [..., groups, g]``, whole numbers, into the bytes ``to [..., groups, b]`` int8."""
        if not self.paired:
            to.copy_(codes)
            return
        half = self._group_bytes
        to.copy_(codes[..., :half]).bitwise_and_(15)
        to[..., : self.group - half] |= codes[..., half:].to(torch.int8) << 4

    def decode(self, encoded: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Decode ``encoded [..., row_bytes]``, and return the rows ``[..., d]`` in ``dtype``."""
        packed = encoded[..., : self._codes_bytes].view(torch.int8)
        rows = self._unpacked(packed) if self.paired else packed.float()
        groups = rows.view(*rows.shape[:-1], self._groups, self.group)
        groups.mul_(self.scales(encoded).float().unsqueeze(-1))
        return (transform(rows) if self.paired else rows).to(dtype)

    def _unpacked(self, packed: torch.Tensor) -> torch.Tensor:
        """Return codes of 4 bits as float32 ``[..., d]``; they are in the bytes ``packed [..., b]`` int8."""
        half, packed = self._group_bytes, _grouped(packed, self._groups)
        codes = packed.new_empty(*packed.shape[:-1], self.group, dtype=torch.float32)
        codes[..., :half] = (packed << 4) >> 4
        codes[..., half:] = packed[..., : self.group - half] >> 4
        return codes.flatten(-2)

    def decode_rows(self, encoded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Decode ``encoded [n, row_bytes]`` as :meth:`decode` does, :data:`READ` rows at a time."""
        rows = torch.empty(encoded.shape[0], self.dim, dtype=dtype, device=encoded.device)
        for start in range(0, encoded.shape[0], READ):
            rows[start : start + READ] = self.decode(encoded[start : start + READ])
        return rows

    def scales(self, encoded: torch.Tensor) -> torch.Tensor:
        """Return a bfloat16 view of the scales ``[..., groups]`` in encoded rows."""
        return encoded[..., self._scales_at :].view(torch.bfloat16)

    def encode_bytes(self, rows: int) -> int:
        """Return the most bytes that :meth:`encode` allocates for ``rows`` rows, including its result."""
        numbers = max(2 * _FLOAT * self.dim, _FLOAT * self.dim + self.row_bytes + 2 * self.dim)
        return rows * (numbers + 2 * _FLOAT * self._groups)

    def decode_bytes(self, rows: int, itemsize: int = _FLOAT) -> int:
        """Return the most bytes that :meth:`decode` allocates for ``rows`` rows, including its result.

        ``itemsize`` is the bytes of one number of the result.
        """
        narrowed = self.dim * itemsize if itemsize != _FLOAT else 0
        if self.paired:  # the transform needs half as many bytes as the numbers, and unpacking less
            narrowed = max(narrowed, self.dim * _FLOAT // 2)
        return rows * (self.dim * _FLOAT + _FLOAT * self._groups + narrowed)


def formats(slot_dtype: SlotDtype, key_dim: int, value_dim: int) -> tuple[Format, Format] | None:
    """Return the formats of keys and of values for a setting ``slot_dtype``; ``None`` if it does not quantise."""
    if slot_dtype == "auto":
        return None
    keys, values = BITS[slot_dtype]
    return Format(key_dim, keys), Format(value_dim, values)


def _grouped(packed: torch.Tensor, groups: int) -> torch.Tensor:
    """Return a view ``[..., groups, b]`` of the bytes ``packed [..., groups * b]``."""
    return packed.view(*packed.shape[:-1], groups, packed.shape[-1] // groups)


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """Round non-negative float32 numbers in place up to the next number that bfloat16 can hold, and return them."""
    scales.view(torch.int32).add_(0xFFFF).bitwise_and_(~0xFFFF)
    return scales


def _transform_size(dim: int) -> int:
    """Return the numbers that are transformed together: the largest power of two that divides ``dim``."""
    return dim & -dim


def transform(rows: torch.Tensor) -> torch.Tensor:
    """Transform contiguous rows ``[..., d]`` float32 in place by a Hadamard matrix, and return them.

    The transform is a rotation, and its own inverse. Numbers are added in the order in which ``decode.c`` adds them, so
    that both get the same bits.
    """
    block, step = _transform_size(rows.shape[-1]), 1
    while step < block:
        pairs = rows.view(*rows.shape[:-1], rows.shape[-1] // (2 * step), 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        total = first + second
        second.neg_().add_(first)
        first.copy_(total)
        del total  # before the next one is made
        step *= 2
    return rows.mul_(1 / math.sqrt(block))
