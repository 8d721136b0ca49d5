"""Where reference queries come from: the ids of a probe, or a sample of the queries that the model itself asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.ledger import Ledger
    from agentmem.shape import LayerShape


def probe_ids(transcript: Sequence[int], tokens: int, instruction: Sequence[int]) -> list[int]:
    """The ids of a transient forward: an instruction (``repeat``; empty for ``replay``), then the newest tokens."""
    recent = max(1, tokens - len(instruction))
    return [*instruction[: tokens - 1], *transcript[-recent:]]


class LiveSample:
    """A strided ring of one layer's own queries, ``[Hq, n, d]``: bytes fixed at birth, all counted in R.

    Token ``t`` is kept when ``t`` is a multiple of ``stride``, in place ``(t // stride) % n``; so the sample covers the
    last ``n × stride`` tokens evenly.
    """

    def __init__(self, layer: LayerShape, size: int, stride: int, like: torch.Tensor, ledger: Ledger) -> None:
        """Allocate the ring in the dtype and on the device of ``like``; the ledger is asked first."""
        self.size, self.stride, self.filled = size, stride, 0
        ledger.hold(layer.query_heads * size * layer.key_dim * like.element_size(), "live queries")
        with torch.inference_mode(mode=False):
            self.queries = torch.empty(layer.query_heads, size, layer.key_dim, dtype=like.dtype, device=like.device)

    def offer(self, queries: torch.Tensor, first: int) -> None:
        """Look at ``queries [Hq, q, d]`` of the tokens ``first, first + 1, …`` and keep those on the stride."""
        start = -first % self.stride
        for index in range(start, queries.shape[1], self.stride):
            place = (first + index) // self.stride % self.size
            self.queries[:, place] = queries[:, index]
            self.filled = max(self.filled, place + 1)

    def sample(self) -> torch.Tensor:
        """What has been kept so far: a view ``[Hq, ≤ n, d]``."""
        return self.queries[:, : self.filled]
