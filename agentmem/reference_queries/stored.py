"""Store samples of the queries of the model's own forwards, in buffers of fixed size that count under the cap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from agentmem.queries import Reference

if TYPE_CHECKING:
    from agentmem.memory.ledger import Ledger
    from agentmem.planning.model_shape import LayerShape
    from agentmem.queries import Part

NORMS = 16
"""The number of newest tokens whose queries a ``random`` part stores, for the norms of its random queries."""


class QuerySample:
    """Keep queries of one layer from the model's own forwards in a buffer of fixed size.

    The buffer ``[Hq, size, d]`` holds the queries of up to ``size`` tokens for ``Hq`` query heads. The sources ``live``
    and ``random`` keep the queries of the newest ``size`` tokens; ``random`` uses only the norms of these queries. The
    source ``context`` keeps the query of every ``stride``-th token. When the buffer is full, every other query is
    dropped and the stride doubles.
    """

    def __init__(self, part: Part, layer: LayerShape, size: int, like: torch.Tensor, ledger: Ledger) -> None:
        """Reserve the bytes in the ledger, then allocate the buffer.

        Args:
            part: the part of the policy's reference queries that the sample serves; its source says which queries to
                keep.
            layer: the shape of the layer.
            size: tokens that the buffer holds.
            like: a tensor with the dtype and device of the buffer.
            ledger: the ledger in which the bytes are reserved.

        """
        self.part, self.size, self.stride, self.filled = part, size, 1, 0
        ledger.hold(self, layer.query_heads * size * layer.key_dim * like.element_size(), "stored queries")
        with torch.inference_mode(mode=False):
            self.queries = torch.empty(layer.query_heads, size, layer.key_dim, dtype=like.dtype, device=like.device)

    @property
    def kept(self) -> torch.Tensor:
        """Return a view of the queries kept so far, ``[Hq, filled, d]``."""
        return self.queries[:, : self.filled]

    @property
    def held_bytes(self) -> int:
        """Return the bytes of the sample's buffer."""
        return int(self.queries.untyped_storage().nbytes())

    def tokens(self, seen: int) -> torch.Tensor:
        """Return the indices ``[filled]`` int32 of the tokens whose queries are kept; index 0 is the first token seen.

        ``seen`` is how many tokens have been seen so far.
        """
        if self.part.source == "context":
            return torch.arange(self.filled, dtype=torch.int32) * self.stride
        places = torch.arange(self.filled, dtype=torch.int32)
        return seen - 1 - (seen - 1 - places) % self.size

    def offer(self, queries: torch.Tensor, first: int) -> None:
        """Store those of the given queries that the sample keeps: the newest, or those of every ``stride``-th token.

        ``queries [Hq, q, d]`` are the queries of the tokens with indices ``first`` to ``first + q - 1``. Nothing is
        allocated. If a forward was undone and its tokens are offered again, the new queries overwrite the old queries.
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
        """Return the first multiple of the stride that is at least ``token``."""
        return -(-token // self.stride) * self.stride

    def _halve(self) -> None:
        kept = (self.size + 1) // 2
        for place in range(1, kept):
            self.queries[:, place] = self.queries[:, 2 * place]
        self.filled, self.stride = kept, 2 * self.stride

    def reference(self, generator: torch.Generator, tokens: int) -> Reference | None:
        """Return the sample as reference queries; ``None`` while it is empty.

        The reference has a view of the kept queries. For the source ``random`` it has a new tensor of ``tokens`` random
        queries per head with the norms of the kept queries.
        """
        if not self.filled:
            return None
        kept = self.queries[:, : self.filled]
        if self.part.source == "random":
            kept = _random_like(kept, tokens, generator)
        return Reference(kept, self.part.weight, self.part.source)


def _random_like(kept: torch.Tensor, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Draw random directions ``[Hq, tokens, d]``, scaled to each query head's root mean square norm in ``kept``."""
    heads, _, width = kept.shape
    drawn = torch.randn(heads, tokens, width, generator=generator, dtype=torch.float32).to(kept.device)
    norms = kept.float().square().sum(-1).mean(-1).sqrt_()
    drawn.mul_((norms[:, None] / drawn.norm(dim=-1)).unsqueeze_(-1))
    return drawn.to(kept.dtype)


def random_bytes(layer: LayerShape, tokens: int, itemsize: int) -> int:
    """Return the most bytes that drawing ``tokens`` random queries allocates."""
    numbers = layer.query_heads * tokens * layer.key_dim
    return numbers * (4 + itemsize) + layer.query_heads * (tokens * 8 + NORMS * layer.key_dim * 8 + 64)
