"""Redundancy: measure how similar each key of a head is to the other keys of this head."""

from __future__ import annotations

import torch

_EPSILON = 1e-8
_FLOAT = 4
_LEAST_ROWS = 32


def redundancy(keys: torch.Tensor, *, threshold: float, spared: int, block_bytes: int) -> torch.Tensor:
    """Return the redundancy of each of ``keys [T, d]``, as ``[T]`` float32; the redundancies of all keys sum to 1.

    The redundancies come from a matrix of cosines in four steps:

    1. Row i, column j is the cosine of key i with key j; the diagonal is set to 0.
    2. Key j is similar to key i if this cosine is above ``threshold``. In every row i, the entries of the ``spared``
       newest keys that are similar to key i are replaced by 0.
    3. Each column is averaged.
    4. A softmax over the averages gives the redundancies.

    Because of step 2, the newest of several equal keys are the least redundant. Rows are visited in blocks of
    ``block_bytes`` bytes, at least 32 rows at a time; no T x T matrix is made.

    Source: R-KV, arXiv:2505.24133, section 3.3. Equation 6 of the paper does not say whether the mean is that of a row
    or of a column. The paper's code takes the mean of a column, and spares keys within each row, as done here.
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
    """Return the bytes that each key of a block takes.

    These bytes hold the key's cosines, a mask and the indices of large cosines, and a few numbers.
    """
    return slots * (2 * _FLOAT + 1) + 12 * _FLOAT
