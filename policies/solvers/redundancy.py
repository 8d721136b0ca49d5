"""Redundancy: how much every key repeats the others."""

from __future__ import annotations

import torch

_EPSILON = 1e-8
_FLOAT = 4
_LEAST_ROWS = 32


def redundancy(keys: torch.Tensor, *, threshold: float, spared: int, block_bytes: int) -> torch.Tensor:
    """The softmax ``[T]`` of every key's mean cosine with the other ``keys [T, d]``, float32.

    Keys with a cosine above ``threshold`` are similar. A key is not blamed for being similar to another while it is
    among the ``spared`` last of those that are: of equal keys the last ones are the least redundant. Keys are visited
    in blocks of ``block_bytes``, at least 32 at a time; no T x T matrix exists.

    Source: R-KV, arXiv:2505.24133, section 3.3. Where its equation 6 leaves open over which index the mean runs, its
    code says: over the keys that the others are similar to.
    """
    unit = keys / keys.norm(dim=-1, keepdim=True).add_(_EPSILON)
    total = keys.new_zeros(len(keys))
    order = torch.arange(len(keys), dtype=torch.int32, device=keys.device)
    start = 0
    for block in unit.split(max(_LEAST_ROWS, block_bytes // _row_bytes(len(keys)))):
        cosines = block @ unit.T
        cosines.diagonal(start).zero_()
        for _ in range(spared):
            last = torch.where(cosines > threshold, order, -1).amax(dim=-1)
            similar = (last >= 0).nonzero().squeeze(-1)
            cosines[similar, last[similar].long()] = 0
        total += cosines.sum(dim=0)
        start += len(block)
        del cosines  # before the next block is made
    return total.div_(len(keys)).softmax(dim=0)


def redundancy_bytes(slots: int, key_dim: int, block_bytes: int) -> int:
    """Bytes that :func:`redundancy` of so many keys allocates at most."""
    row = _row_bytes(slots)
    block = min(slots * row, max(_LEAST_ROWS * row, block_bytes))
    return block + slots * (key_dim + 5) * _FLOAT


def _row_bytes(slots: int) -> int:
    """One key in a block: its cosines, which of them are large, their places, and a few numbers."""
    return slots * (2 * _FLOAT + 1) + 12 * _FLOAT
