"""Attention of blocks of reference queries over one head's segment alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class LocalAttention:
    """Softmax attention of many queries over one segment and nothing else, visited in blocks of rows.

    ``queries [group, n, d]`` may be any view in any float dtype; each block of at most ``rows`` is cast to float32.
    ``keys [T, d]`` and ``bias [T]`` are float32. The logits are ``scale * q @ k + bias``.

    *Local* matters: weights are relative to the segment's own mass, never to that of the whole context. Values fitted
    against the whole context's softmax would be shrunk by the segment's share of the mass twice.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    bias: torch.Tensor
    scale: float
    rows: int

    @property
    def count(self) -> int:
        """N = group * n, the number of query vectors."""
        return int(self.queries.shape[0] * self.queries.shape[1])

    def over(self, keys: torch.Tensor, bias: torch.Tensor) -> LocalAttention:
        """The same queries over other slots."""
        return replace(self, keys=keys, bias=bias)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Every query once: its rows among the N, and the block ``[B, d]`` in float32."""
        row = 0
        for member in self.queries:
            for block in member.split(self.rows):
                yield slice(row, row + len(block)), block.float()
                row += len(block)

    def logits(self, block: torch.Tensor) -> torch.Tensor:
        """``[B, T]`` float32, a new tensor."""
        return torch.addmm(self.bias, block, self.keys.T, alpha=self.scale)

    def weights(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention weights ``[B, T]``, rows summing to 1, and the log of each row's mass ``[B]``, float32.

        The row maximum is taken out first, so that logits of any finite size give finite weights.
        """
        logits = self.logits(block)
        peak = logits.amax(dim=-1, keepdim=True)
        weights = logits.sub_(peak).exp_()
        mass = weights.sum(dim=-1, keepdim=True)
        return weights.div_(mass), peak.add_(mass.log_()).squeeze(-1)
