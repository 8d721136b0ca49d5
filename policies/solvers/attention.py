"""Attention of reference queries over the slots of one head's segment alone, computed block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class LocalAttention:
    """Softmax attention of many queries over one segment alone, visited in blocks of query rows.

    ``queries`` is a tuple of tensors ``[group, n, d]``, called *parts*; ``n`` may differ from part to part. Parts may
    be views, and have any float dtype. Each block of at most ``rows`` rows is cast to float32. ``roots [N]`` float32
    are the square roots of the queries' weights (``None``: all 1); a least-squares fit multiplies its rows by these
    roots. ``keys [T, d]`` and ``bias [T]`` are float32. The logits are ``scale * q @ k + bias``.

    Attention is *local*: weights are relative to the segment's own mass, never to that of the whole context. Values
    fitted to a softmax over the whole context would contain the segment's share of the mass, and the model's attention
    would then apply that share a second time.
    """

    queries: tuple[torch.Tensor, ...]
    keys: torch.Tensor
    bias: torch.Tensor
    scale: float
    rows: int
    roots: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Return N, the number of query vectors in all tensors ``[group, n, d]`` of ``queries`` together."""
        return sum(part.shape[0] * part.shape[1] for part in self.queries)

    def weighted(self, weights: Sequence[float]) -> LocalAttention:
        """Return a copy in which every query of the tensor ``queries[i]`` has the weight ``weights[i]``.

        A query's weight is the factor by which its squared error counts in a least-squares fit. Equal weights change no
        fit, so they are not stored.
        """
        if len(set(weights)) <= 1:  # equal weights change no fit
            return replace(self, roots=None)
        roots = self.bias.new_empty(self.count)
        row = 0
        for part, weight in zip(self.queries, weights, strict=True):
            size = part.shape[0] * part.shape[1]
            roots[row : row + size] = weight**0.5
            row += size
        return replace(self, roots=roots)

    def over(self, keys: torch.Tensor, bias: torch.Tensor) -> LocalAttention:
        """Return the attention of the same queries over other slots, those with the given ``keys`` and ``bias``."""
        return replace(self, keys=keys, bias=bias)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield pairs: the range of a block's rows among all N queries, and the block's queries ``[B, d]`` float32.

        Parts with fewer queries than a block are copied into blocks that they share; there may be hundreds of them.
        """
        start, held = 0, 0
        small: list[torch.Tensor] = []
        for part in (*self.queries, None):
            size = self.rows if part is None else part.shape[0] * part.shape[1]
            if held and held + size > self.rows:
                yield slice(start, start + held), _copied(small, held)
                start, held, small = start + held, 0, []
            if part is None:
                return
            if size < self.rows:
                small.append(part)
                held += size
                continue
            for block in (block for member in part for block in member.split(self.rows)):
                yield slice(start, start + len(block)), block.float()
                start += len(block)

    def scaled(self, matrix: torch.Tensor, rows: slice) -> torch.Tensor:
        """Multiply each row of ``matrix [B, k]`` in place by the root of its query's weight, and return ``matrix``.

        ``rows`` is the range of these B queries among all N queries.
        """
        return matrix if self.roots is None else matrix.mul_(self.roots[rows, None])

    def logits(self, block: torch.Tensor) -> torch.Tensor:
        """Return the attention logits of a block of queries, as a new tensor ``[B, T]`` float32."""
        return torch.addmm(self.bias, block, self.keys.T, alpha=self.scale)

    def weights(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block's attention weights ``[B, T]`` and the log of each query's mass ``[B]``, both float32.

        A query's weights sum to 1; its mass is the sum of ``exp(logit)`` over the slots. The largest logit of each
        query is subtracted first, so that finite logits of any size give finite weights.
        """
        logits = self.logits(block)
        peak = logits.amax(dim=-1, keepdim=True)
        weights = logits.sub_(peak).exp_()
        mass = weights.sum(dim=-1, keepdim=True)
        return weights.div_(mass), peak.add_(mass.log_()).squeeze(-1)


def _copied(parts: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    """Return the queries of all ``parts [group, n, d]``, ``rows`` of them, as one new tensor ``[rows, d]`` float32."""
    dim = parts[0].shape[2]
    block = torch.empty(rows, dim, dtype=torch.float32, device=parts[0].device)
    row = 0
    for part in parts:
        group, count, _ = part.shape
        block[row : row + group * count].view(group, count, dim).copy_(part)
        row += group * count
    return block
