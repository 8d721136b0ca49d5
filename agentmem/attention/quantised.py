"""Quantise keys and values to rows of 8-bit codes, with one scale for each group of codes.

The row of a key or value with ``d`` numbers consists of ``d`` int8 codes, a byte of padding if ``d`` is odd, and the
bfloat16 scales of the groups. A number decodes to its code times the scale of its group. Scales are rounded up, so that
all codes are within -127 … 127, and codes are rounded to the nearest integer. The error of a number is at most half a
scale, which is 0.4 % of the largest number in its group. If a number is not finite, its whole group decodes to NaN.
``decode.c`` reads and writes the same format.
"""

from __future__ import annotations

import torch

GROUPS = (32, 16)
"""The sizes that a group may have: the first size that divides ``d`` is used; if none does, the row is one group."""
BLOCK = 64
"""The number of tokens that are encoded at a time."""
READ = 512
"""The number of rows that :func:`decode_rows` decodes at a time."""
_MOST = 127
_FLOAT, _SCALE = 4, 2  # bytes


def group(dim: int) -> int:
    """Return how many numbers share one scale in a row of ``dim`` numbers."""
    return next((size for size in GROUPS if dim % size == 0), dim)


def row_bytes(dim: int) -> int:
    """Return the bytes of an encoded row of ``dim`` numbers."""
    return dim + dim % 2 + _SCALE * (dim // group(dim))


def encode(rows: torch.Tensor) -> torch.Tensor:
    """Encode rows ``[..., d]`` of any floating dtype, and return them as uint8 ``[..., row_bytes(d)]``."""
    dim = rows.shape[-1]
    groups = rows.float().reshape(*rows.shape[:-1], dim // group(dim), group(dim))
    scale = _rounded_up(groups.abs().amax(-1) / _MOST)
    codes = (groups / scale.unsqueeze(-1)).nan_to_num_(0.0, 0.0, 0.0).round_()
    encoded = rows.new_zeros(*rows.shape[:-1], row_bytes(dim), dtype=torch.uint8)
    encoded[..., :dim].view(torch.int8).copy_(codes.flatten(-2))
    scales(encoded, dim).copy_(scale)
    return encoded


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """Round non-negative float32 numbers in place up to the next number that bfloat16 can hold, and return them."""
    scales.view(torch.int32).add_(0xFFFF).bitwise_and_(~0xFFFF)
    return scales


def decode(encoded: torch.Tensor, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode ``encoded [..., row_bytes(d)]``, and return the rows ``[..., d]`` in ``dtype``; ``dim`` is ``d``."""
    rows = encoded[..., :dim].view(torch.int8).float()
    rows.view(*rows.shape[:-1], dim // group(dim), group(dim)).mul_(scales(encoded, dim).float().unsqueeze(-1))
    return rows.to(dtype)


def decode_rows(encoded: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Decode ``encoded [n, row_bytes(d)]`` as :func:`decode` does, :data:`READ` rows at a time."""
    rows = torch.empty(encoded.shape[0], dim, dtype=dtype, device=encoded.device)
    for start in range(0, encoded.shape[0], READ):
        rows[start : start + READ] = decode(encoded[start : start + READ], dim)
    return rows


def scales(encoded: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a bfloat16 view of the scales ``[..., groups]`` in encoded rows of ``dim`` numbers."""
    return encoded[..., dim + dim % 2 :].view(torch.bfloat16)


def encode_bytes(rows: int, dim: int) -> int:
    """Return the most bytes that :func:`encode` allocates for ``rows`` rows, including its result."""
    groups = dim // group(dim)
    return rows * (2 * _FLOAT * dim + max(_FLOAT * dim, 2 * row_bytes(dim)) + 2 * _FLOAT * groups)


def decode_bytes(rows: int, dim: int, itemsize: int = _FLOAT) -> int:
    """Return the most bytes that :func:`decode` allocates for ``rows`` rows, including its result.

    ``itemsize`` is the bytes of one number of the result.
    """
    narrowed = dim * itemsize if itemsize != _FLOAT else 0
    return rows * (dim * _FLOAT + _FLOAT * (dim // group(dim)) + narrowed)
