"""Quantise keys and values to rows of 8-bit codes, with one scale for each group of codes.

The row of a key or value with ``d`` numbers consists of ``d`` int8 codes, a byte of padding if ``d`` is odd, and the
scales of the groups in bfloat16. A number is its code times the scale of its group. Scales are rounded up, so that all
codes are within -127 … 127, and codes are rounded to the nearest integer. The error of a number is at most half a
scale, which is 0.4 % of the largest number in its group. If a number is not finite, its whole group decodes to NaN.
``decode.c`` reads and writes the same rows.
"""

from __future__ import annotations

import torch

GROUPS = (32, 16)
"""Sizes of a group: the first that divides the length of a row is used, or else the whole row is one group."""
BLOCK = 64
"""The number of tokens that are encoded at a time."""
_MOST = 127
_FLOAT, _SCALE = 4, 2  # bytes


def group(dim: int) -> int:
    """Return the size of a group, the numbers that share a scale, in a row of ``dim`` numbers."""
    return next((size for size in GROUPS if dim % size == 0), dim)


def row_bytes(dim: int) -> int:
    """Return the bytes of the row of ``dim`` numbers."""
    return dim + dim % 2 + _SCALE * (dim // group(dim))


def encode(rows: torch.Tensor) -> torch.Tensor:
    """Encode rows ``[..., d]`` of any floating dtype to uint8 ``[..., row_bytes(d)]``; see :func:`encode_bytes`."""
    dim = rows.shape[-1]
    groups = rows.float().reshape(*rows.shape[:-1], dim // group(dim), group(dim))
    scale = _rounded_up(groups.abs().amax(-1) / _MOST)
    codes = (groups / scale.unsqueeze(-1)).nan_to_num_(0.0, 0.0, 0.0).round_()
    encoded = rows.new_zeros(*rows.shape[:-1], row_bytes(dim), dtype=torch.uint8)
    encoded[..., :dim].view(torch.int8).copy_(codes.flatten(-2))
    scales(encoded, dim).copy_(scale)
    return encoded


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """Round float32 numbers of at least 0 up to the next number of bfloat16, in place."""
    scales.view(torch.int32).add_(0xFFFF).bitwise_and_(~0xFFFF)
    return scales


def decode(encoded: torch.Tensor, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode ``encoded [..., row_bytes(d)]`` to rows ``[..., d]`` of ``dtype``; see :func:`decode_bytes`."""
    rows = encoded[..., :dim].view(torch.int8).float()
    rows.view(*rows.shape[:-1], dim // group(dim), group(dim)).mul_(scales(encoded, dim).float().unsqueeze(-1))
    return rows.to(dtype)


def scales(encoded: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a view of the scales ``[..., groups]`` of encoded rows, in bfloat16."""
    return encoded[..., dim + dim % 2 :].view(torch.bfloat16)


def encode_bytes(rows: int, dim: int) -> int:
    """Return the most bytes that :func:`encode` allocates for ``rows`` rows, its result included."""
    groups = dim // group(dim)
    return rows * (2 * _FLOAT * dim + max(_FLOAT * dim, 2 * row_bytes(dim)) + 2 * _FLOAT * groups)


def decode_bytes(rows: int, dim: int, itemsize: int = _FLOAT) -> int:
    """Return the most bytes that :func:`decode` allocates for ``rows`` rows; ``itemsize`` is that of its dtype."""
    narrowed = dim * itemsize if itemsize != _FLOAT else 0
    return rows * (dim * _FLOAT + _FLOAT * (dim // group(dim)) + narrowed)
