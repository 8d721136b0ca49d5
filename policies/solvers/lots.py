"""Random numbers for one head's slots, the same however its layer's heads are ordered."""

from __future__ import annotations

import torch


def lots(keys: torch.Tensor, seed: int) -> torch.Tensor:
    """Uniform in 0 … 1 for each of ``keys [T, d]``: ``[T]`` float32, on the keys' device.

    They follow from the seed and the newest key alone, so heads draw independently and permuting them permutes the
    result. Working memory: two tensors of T and the key in float64.
    """
    mark = hash((seed, float(keys[-1].double().sum())))  # of numbers: the same in every process
    drawn = torch.rand(len(keys), generator=torch.Generator().manual_seed(mark))
    return drawn.to(keys.device)
