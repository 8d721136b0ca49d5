"""Random numbers for one head's slots, the same however its layer's heads are ordered."""

from __future__ import annotations

import torch


def lots(keys: torch.Tensor, seed: int) -> torch.Tensor:
    """Uniform in 0 … 1 for each of ``keys [T, d]``: ``[T]`` float32, on the keys' device.

    They follow from the seed and the signs of the newest key alone: heads draw independently, permuting them permutes
    the result, and what rounding changes in a key (in a batch, say) changes nothing. Working memory: two tensors of T.
    """
    mark = hash((seed, *(keys[-1] > 0).tolist()))  # of numbers: the same in every process
    drawn = torch.rand(len(keys), generator=torch.Generator().manual_seed(mark), dtype=torch.float32)
    return drawn.to(keys.device)
