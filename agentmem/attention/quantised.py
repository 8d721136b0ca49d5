"""Rows of 8-bit numbers: a key or a value of ``d`` numbers as ``d`` codes and a scale for each group of them.

A row is ``d`` int8 codes, a byte of padding where ``d`` is odd, and the groups' scales in bfloat16. A number is its
code times its group's scale. Scales are rounded up, so that no code leaves -127 … 127, and codes are rounded to the
nearest: a number is off by half a scale at most, which is 0.4 % of the largest in its group. Numbers that are not
finite make their group NaN. ``decode.c`` reads and writes the same rows.
"""

from __future__ import annotations

import torch

GROUPS = (32, 16)
"""Numbers that share a scale: the first that divides a row, or else the whole row."""
BLOCK = 64
"""Tokens that are encoded at a time."""
_MOST = 127
_FLOAT, _SCALE = 4, 2  # bytes


def group(dim: int) -> int:
    """Numbers of a row of ``dim`` that share a scale."""
    return next((size for size in GROUPS if dim % size == 0), dim)


def row_bytes(dim: int) -> int:
    """Bytes of a row."""
    return dim + dim % 2 + _SCALE * (dim // group(dim))


def encode(rows: torch.Tensor) -> torch.Tensor:
    """Rows ``[..., d]`` of any floating dtype as uint8 ``[..., row_bytes(d)]``; allocates :func:`encode_bytes`."""
    dim = rows.shape[-1]
    groups = rows.float().reshape(*rows.shape[:-1], dim // group(dim), group(dim))
    scale = _rounded_up(groups.abs().amax(-1) / _MOST)
    codes = (groups / scale.unsqueeze(-1)).nan_to_num_(0.0, 0.0, 0.0).round_()
    encoded = rows.new_zeros(*rows.shape[:-1], row_bytes(dim), dtype=torch.uint8)
    encoded[..., :dim].view(torch.int8).copy_(codes.flatten(-2))
    scales(encoded, dim).copy_(scale)
    return encoded


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """Float32 numbers that are not negative, up to the next that bfloat16 has; in place."""
    scales.view(torch.int32).add_(0xFFFF).bitwise_and_(~0xFFFF)
    return scales


def decode(encoded: torch.Tensor, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The rows ``[..., d]`` that ``encoded [..., row_bytes(d)]`` stands for; allocates :func:`decode_bytes`."""
    rows = encoded[..., :dim].view(torch.int8).float()
    rows.view(*rows.shape[:-1], dim // group(dim), group(dim)).mul_(scales(encoded, dim).float().unsqueeze(-1))
    return rows.to(dtype)


def scales(encoded: torch.Tensor, dim: int) -> torch.Tensor:
    """The scales ``[…, groups]`` of encoded rows, bfloat16: a view."""
    return encoded[..., dim + dim % 2 :].view(torch.bfloat16)


def encode_bytes(rows: int, dim: int) -> int:
    """Bytes that :func:`encode` of so many rows allocates at most, its result included."""
    groups = dim // group(dim)
    return rows * (2 * _FLOAT * dim + max(_FLOAT * dim, 2 * row_bytes(dim)) + 2 * _FLOAT * groups)


def decode_bytes(rows: int, dim: int, itemsize: int = _FLOAT) -> int:
    """Bytes that :func:`decode` of so many rows allocates at most, its result of ``itemsize`` a number included."""
    narrowed = dim * itemsize if itemsize != _FLOAT else 0
    return rows * (dim * _FLOAT + _FLOAT * (dim // group(dim)) + narrowed)
