"""Eviction: what the policies share that score every slot and keep the best as they are.

Their papers drop one token a step, or compress a prompt once. Here slots leave in one go when the memory fills, every
KV head chooses for itself, and sinks and recent tokens are the memory's ``keep_first`` and ``keep_recent``: they lie
outside the segment, so they are neither scored nor dropped, and attention weights are relative to the segment alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

from agentmem.contracts import Compaction, Compactor, HeadCompaction, Segment, SegmentShape, Survey, blocks
from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.selection import top

Pool = Literal["max", "mean"]

FLOAT = 4
"""Bytes of a score."""
RANKING = 28
"""Bytes a slot that choosing the top of one head takes: the score, its copies in order and the order itself."""
_INDEX = 8
_LEAST_ROWS = 32
_SMALL = 1024


class Eviction(Compactor):
    """Keeps the slots with the highest scores as they are; of equal ones, the newer.

    Invariants, besides those of :class:`Compactor`: scores are finite and at least 0, so that budgets can take them for
    prices; a head that may keep all it holds keeps it as it is.
    """

    fits = False

    @abstractmethod
    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """``[T]`` float32, new: what each slot of KV head ``index`` is worth."""

    @abstractmethod
    def scratch(self, shape: SegmentShape) -> int:
        """Bytes that one call of :meth:`score` allocates at most, its result included."""

    def workspace(self, shape: SegmentShape) -> int:
        """One head's scoring, or its ranking, and all heads' kept indices or surveyed scores."""
        results = shape.heads * max(shape.budget * _INDEX, shape.slots * FLOAT)
        return max(self.scratch(shape), shape.slots * RANKING) + results + _SMALL

    def survey(self, segment: Segment) -> Survey:
        """The scores that :meth:`compact` would keep slots by."""
        pairs = enumerate(segment.heads)
        scores = (self.score(segment, index) if head.slots else head.bias.clone() for index, head in pairs)
        return Survey(segment.layer, tuple(scores))

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """The ``slots[h]`` best slots of every head."""
        return Compaction(tuple(self.keep(segment, index, count) for index, count in enumerate(slots)))

    def keep(self, segment: Segment, index: int, count: int) -> HeadCompaction:
        """The ``count`` best slots of KV head ``index``."""
        head = segment.heads[index]
        if count == 0 or count >= head.slots:
            return HeadCompaction(torch.arange(count, device=head.keys.device))
        return HeadCompaction(top(self.score(segment, index), count))


@dataclass(frozen=True)
class Observation(Eviction):
    """An eviction by the attention of reference queries, visited in blocks: never queries x slots."""

    needs_queries = True

    block_bytes: int = 2**19
    """Bytes of one block of queries with its weights; a block has at least 32 rows."""

    def attention(self, segment: Segment, index: int) -> LocalAttention:
        """All reference queries over the slots of KV head ``index``; old β counts."""
        head, queries = segment.heads[index], segment.queries(index)
        longest = max(part.shape[1] for part in queries)
        if longest == 0:
            raise ValueError(f"0 reference queries: {type(self).__name__} needs at least 1; keep a token's queries")
        rows = max(_LEAST_ROWS, self.block_bytes // _row_bytes(head.slots, head.keys.shape[1]))
        keys = head.keys.float()
        return LocalAttention(queries, keys, head.bias, segment.scale, min(rows, longest)).weighted(segment.weights)

    def attention_bytes(self, shape: SegmentShape, *, copies: int = 1, then: int = 0) -> int:
        """Bytes of :meth:`attention`, of a few numbers for each slot and query, and of the larger of two phases.

        First a block of queries with ``copies`` of its weights; when that is gone, ``then``.
        """
        row = _row_bytes(shape.slots, shape.key_dim)
        block = min(shape.queries * row, max(_LEAST_ROWS * row, self.block_bytes))
        casts = shape.slots * shape.key_dim * FLOAT if shape.itemsize < FLOAT else 0
        numbers = 2 * shape.slots + 2 * shape.group * shape.queries
        return casts + numbers * FLOAT + max(copies * block, then)


def _row_bytes(slots: int, key_dim: int) -> int:
    """One query in a block: its cast and the last block's, its weights over the slots, a few numbers."""
    return FLOAT * (slots + 2 * key_dim + 4)


def largest_of_group(
    attention: LocalAttention, weights: Sequence[float], view: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[tuple[float, torch.Tensor]]:
    """Blocks of reference tokens: their weight, and the largest ``view(block) [B, T]`` of the group's query heads."""
    for part, weight in zip(attention.queries, weights, strict=True):
        for tokens in blocks(part.shape[1], attention.rows):
            largest = view(part[0, tokens].float())
            for member in part[1:, tokens]:
                torch.maximum(largest, view(member.float()), out=largest)
            yield weight, largest
            del largest  # before the next block is made


def pooled(scores: torch.Tensor, kernel: int, pool: Pool) -> torch.Tensor:
    """``scores [..., T]``, each replaced by the maximum or mean of the ``kernel`` slots around it; a new tensor.

    Fewer at the ends. Neighbours are neighbouring slots: once slots have been dropped, not always neighbouring tokens.
    """
    rows = scores.reshape(-1, 1, scores.shape[-1])
    if pool == "max":
        return max_pool1d(rows, kernel, stride=1, padding=kernel // 2).view_as(scores)
    return avg_pool1d(rows, kernel, stride=1, padding=kernel // 2, count_include_pad=False).view_as(scores)


def check_pooling(kernel: int, pool: str = "max") -> None:
    """Refuse a pooling that :func:`pooled` cannot do.

    Raises:
        ValueError: ``kernel`` is not odd and positive, or ``pool`` is unknown.

    """
    if kernel < 1 or kernel % 2 != 1:
        raise ValueError(f"kernel: {kernel!r} is not an odd number of slots; give 1 (no pooling), 3, 5, …")
    if pool not in get_args(Pool):
        raise ValueError(f"pool: {pool!r} is unknown; choose one of {', '.join(get_args(Pool))}")


def check_window(window: int) -> None:
    """Refuse an observation window without a token.

    Raises:
        ValueError: ``window`` is below 1.

    """
    if window % 1 or window < 1:
        raise ValueError(f"window: {window!r} tokens are too few or no whole number; give at least 1")


def check_share(name: str, value: float) -> None:
    """Refuse a share outside 0 … 1.

    Raises:
        ValueError: it is.

    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: {value!r} is not a share; give a number from 0 to 1")
