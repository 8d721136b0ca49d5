"""Random numbers for the slots of one head; they do not depend on the order of the heads in their layer."""

from __future__ import annotations

import torch


def lots(keys: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw a number uniform in 0 … 1 for each of ``keys [T, d]``; return ``[T]`` float32 on the keys' device.

    The numbers depend only on the seed and on the signs of the newest key. Heads therefore get independent numbers,
    permuting the heads permutes the numbers, and small rounding differences of the keys (as between batch sizes) change
    nothing. The working memory is two tensors of T numbers.
    """
    mark = hash((seed, *(keys[-1] > 0).tolist()))  # a hash of numbers is the same in every process
    drawn = torch.rand(len(keys), generator=torch.Generator().manual_seed(mark), dtype=torch.float32)
    return drawn.to(keys.device)
