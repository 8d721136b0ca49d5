"""Stored queries: samples of what the model itself asked, bounded in bytes and counted in R."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from agentmem.queries import Reference

if TYPE_CHECKING:
    from agentmem.memory.ledger import Ledger
    from agentmem.planning.model_shape import LayerShape
    from agentmem.queries import Part

NORMS = 16
"""Live tokens that a ``random`` part keeps, for the norms of its directions."""


class QuerySample:
    """A sample of one layer's own queries, ``[Hq, n, d]``: bytes fixed at birth.

    ``live`` (and ``random``, which needs the norms) keeps the newest n tokens in a ring. ``context`` keeps every
    stride-th token of everything seen; when it is full, every other one is dropped and the stride doubles.
    """

    def __init__(self, part: Part, layer: LayerShape, size: int, like: torch.Tensor, ledger: Ledger) -> None:
        """Allocate in the dtype and on the device of ``like``; the ledger is charged first."""
        self.part, self.size, self.stride, self.filled = part, size, 1, 0
        ledger.hold(self, layer.query_heads * size * layer.key_dim * like.element_size(), "stored queries")
        with torch.inference_mode(mode=False):
            self.queries = torch.empty(layer.query_heads, size, layer.key_dim, dtype=like.dtype, device=like.device)

    @property
    def kept(self) -> torch.Tensor:
        """The queries that are kept, ``[Hq, filled, d]``: a view."""
        return self.queries[:, : self.filled]

    @property
    def held_bytes(self) -> int:
        """Bytes of the sample."""
        return int(self.queries.untyped_storage().nbytes())

    def tokens(self, seen: int) -> torch.Tensor:
        """Which tokens' queries are kept, ``[filled]`` int32, when ``seen`` tokens were offered so far."""
        if self.part.source == "context":
            return torch.arange(self.filled, dtype=torch.int32) * self.stride
        places = torch.arange(self.filled, dtype=torch.int32)
        return seen - 1 - (seen - 1 - places) % self.size

    def offer(self, queries: torch.Tensor, first: int) -> None:
        """Look at ``queries [Hq, q, d]`` of the tokens ``first, first + 1, …``; nothing is allocated.

        A token's place depends on the token alone: what a forward left that was taken back is written over when its
        tokens are offered again.
        """
        offered = self._offer_strided if self.part.source == "context" else self._offer_newest
        offered(queries, first)

    def _offer_newest(self, queries: torch.Tensor, first: int) -> None:
        stop = first + queries.shape[1]
        token = max(first, stop - self.size)
        while token < stop:
            place = token % self.size
            count = min(self.size - place, stop - token)
            self.queries[:, place : place + count] = queries[:, token - first : token - first + count]
            token += count
        self.filled = min(self.size, stop)

    def _offer_strided(self, queries: torch.Tensor, first: int) -> None:
        stop = first + queries.shape[1]
        token = self._from(first)
        self.filled = token // self.stride
        while token < stop:
            if self.filled == self.size:
                self._halve()
                token = self._from(token)
                continue
            wanted = queries[:, token - first :: self.stride][:, : self.size - self.filled]
            self.queries[:, self.filled : self.filled + wanted.shape[1]] = wanted
            self.filled += wanted.shape[1]
            token += wanted.shape[1] * self.stride

    def _from(self, token: int) -> int:
        """The first token from this one on that the stride wants."""
        return -(-token // self.stride) * self.stride

    def _halve(self) -> None:
        kept = (self.size + 1) // 2
        for place in range(1, kept):
            self.queries[:, place] = self.queries[:, 2 * place]
        self.filled, self.stride = kept, 2 * self.stride

    def reference(self, generator: torch.Generator, tokens: int) -> Reference | None:
        """What is kept so far (a view), or ``tokens`` random queries of its norms (new); ``None`` while it is empty."""
        if not self.filled:
            return None
        kept = self.queries[:, : self.filled]
        if self.part.source == "random":
            kept = _random_like(kept, tokens, generator)
        return Reference(kept, self.part.weight, self.part.source)


def _random_like(kept: torch.Tensor, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Random directions ``[Hq, tokens, d]`` with each query head's root mean square norm."""
    heads, _, width = kept.shape
    drawn = torch.randn(heads, tokens, width, generator=generator, dtype=torch.float32).to(kept.device)
    norms = kept.float().square().sum(-1).mean(-1).sqrt_()
    drawn.mul_((norms[:, None] / drawn.norm(dim=-1)).unsqueeze_(-1))
    return drawn.to(kept.dtype)


def random_bytes(layer: LayerShape, tokens: int, itemsize: int) -> int:
    """Bytes that drawing ``tokens`` random queries allocates at most."""
    numbers = layer.query_heads * tokens * layer.key_dim
    return numbers * (4 + itemsize) + layer.query_heads * (tokens * 8 + NORMS * layer.key_dim * 8 + 64)
