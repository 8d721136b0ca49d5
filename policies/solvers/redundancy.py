"""Redundancy: measure how similar every key is to the other keys."""

from __future__ import annotations

import torch

_EPSILON = 1e-8
_FLOAT = 4
_LEAST_ROWS = 32


def redundancy(keys: torch.Tensor, *, threshold: float, spared: int, block_bytes: int) -> torch.Tensor:
    """Return the softmax ``[T]`` float32 of every key's mean cosine with the other ``keys [T, d]``.

    Two keys are similar if their cosine is above ``threshold``. For every key i, the cosines of i with the ``spared``
    last keys similar to i count as 0 in the means of those last keys. Of equal keys the last are therefore the least
    redundant. Keys are visited in blocks of ``block_bytes`` bytes, at least 32 keys at a time; no T x T matrix is made.

    Source: R-KV, arXiv:2505.24133, section 3.3. Equation 6 leaves open over which index of the cosine matrix the mean
    runs. As in the paper's code, the mean of a key j runs over the rows i, and keys are spared within each row i.
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
    """Return an upper bound of the bytes that :func:`redundancy` allocates for ``slots`` keys."""
    row = _row_bytes(slots)
    block = min(slots * row, max(_LEAST_ROWS * row, block_bytes))
    return block + slots * (key_dim + 5) * _FLOAT


def _row_bytes(slots: int) -> int:
    """Return the bytes of one key in a block: its cosines, the mask of large cosines, their indices, a few numbers."""
    return slots * (2 * _FLOAT + 1) + 12 * _FLOAT
