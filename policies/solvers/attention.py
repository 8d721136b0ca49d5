"""Attention of blocks of reference queries over one head's segment alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class LocalAttention:
    """Softmax attention of many queries over one segment and nothing else, visited in blocks of rows.

    ``queries`` are parts ``[group, n, d]``, any views in any float dtype; each block of at most ``rows`` is cast to
    float32. ``roots [N]`` float32 are the square roots of the queries' weights (``None``: all 1); a least-squares fit
    multiplies its rows by them. ``keys [T, d]`` and ``bias [T]`` are float32. The logits are ``scale * q @ k + bias``.

    *Local* matters: weights are relative to the segment's own mass, never to that of the whole context. Values fitted
    against the whole context's softmax would be shrunk by the segment's share of the mass twice.
    """

    queries: tuple[torch.Tensor, ...]
    keys: torch.Tensor
    bias: torch.Tensor
    scale: float
    rows: int
    roots: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """N, the number of query vectors: the group times the tokens of all parts."""
        return sum(part.shape[0] * part.shape[1] for part in self.queries)

    def weighted(self, weights: Sequence[float]) -> LocalAttention:
        """The same with a weight for each part's queries."""
        if len(set(weights)) <= 1:  # equal weights weigh nothing
            return replace(self, roots=None)
        roots = self.bias.new_empty(self.count)
        row = 0
        for part, weight in zip(self.queries, weights, strict=True):
            size = part.shape[0] * part.shape[1]
            roots[row : row + size] = weight**0.5
            row += size
        return replace(self, roots=roots)

    def over(self, keys: torch.Tensor, bias: torch.Tensor) -> LocalAttention:
        """The same queries over other slots."""
        return replace(self, keys=keys, bias=bias)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Every query once: its rows among the N, and the block ``[B, d]`` in float32."""
        row = 0
        for member in (member for part in self.queries for member in part):
            for block in member.split(self.rows):
                yield slice(row, row + len(block)), block.float()
                row += len(block)

    def scaled(self, matrix: torch.Tensor, rows: slice) -> torch.Tensor:
        """``matrix [B, k]`` with each row times the root of its query's weight, in place."""
        return matrix if self.roots is None else matrix.mul_(self.roots[rows, None])

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
