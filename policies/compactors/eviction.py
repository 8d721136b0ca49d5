"""Eviction: the common part of all policies that score every slot and keep the slots with the highest scores unchanged.

The papers of these policies drop one token per step, or compress a prompt once. Here many slots are dropped at once
when the memory fills, and every KV head chooses its own slots. The memory's ``keep_first`` and ``keep_recent`` set the
numbers of sinks and recent tokens. These tokens lie outside the segment: they are neither scored nor dropped, and
attention weights are relative to the segment alone.
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
"""Bytes per slot that choosing the top slots of one head takes: the score, its sorted copies and the sort indices."""
_INDEX = 8
_LEAST_ROWS = 32
_SMALL = 1024


class Eviction(Compactor):
    """Keeps unchanged the slots with the highest scores; of slots with equal scores, the newer stays.

    Invariants, besides those of :class:`Compactor`: scores are finite and at least 0, because budgets compare them with
    thresholds of at least 0; a head whose budget covers all its slots keeps them all unchanged.
    """

    fits = False
    reads_values = False

    @abstractmethod
    def score(self, segment: Segment, index: int) -> torch.Tensor:
        """Return the score of each slot of KV head ``index``, as a new tensor ``[T]`` float32."""

    @abstractmethod
    def scratch(self, shape: SegmentShape) -> int:
        """Return an upper bound of the bytes that one call of :meth:`score` allocates, its result included."""

    def workspace(self, shape: SegmentShape) -> int:
        """Return an upper bound of the bytes that one call of :meth:`compact` or :meth:`survey` allocates.

        The bound holds for both methods. It is the sum of two parts and a small constant. The first part is the
        temporary memory for one head: the bytes to score the slots or to rank them, whichever is larger. The second
        part is the results of all heads: the indices from :meth:`compact` or the scores from :meth:`survey`, whichever
        is larger.
        """
        results = shape.heads * max(shape.budget * _INDEX, shape.slots * FLOAT)
        return max(self.scratch(shape), shape.slots * RANKING) + results + _SMALL

    def survey(self, segment: Segment) -> Survey:
        """Return the scores of all slots, by which :meth:`compact` would choose."""
        pairs = enumerate(segment.heads)
        scores = (self.score(segment, index) if head.slots else head.bias.clone() for index, head in pairs)
        return Survey(segment.layer, tuple(scores))

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """Keep the ``slots[h]`` slots with the highest scores of every KV head ``h``."""
        return Compaction(tuple(self.keep(segment, index, count) for index, count in enumerate(slots)))

    def keep(self, segment: Segment, index: int, count: int) -> HeadCompaction:
        """Keep the ``count`` slots with the highest scores of KV head ``index``."""
        head = segment.heads[index]
        if count == 0 or count >= head.slots:
            return HeadCompaction(torch.arange(count, device=head.bias.device))
        return HeadCompaction(top(self.score(segment, index), count))


@dataclass(frozen=True)
class Observation(Eviction):
    """Base class of evictions that score slots by the attention of reference queries.

    The queries are visited in blocks, so that no queries x slots matrix is made.
    """

    needs_queries = True

    block_bytes: int = 2**19
    """Size in bytes of one block of queries with its weights; a block has at least 32 rows, even if that is larger."""

    def attention(self, segment: Segment, index: int) -> LocalAttention:
        """Return the attention of all reference queries over the slots of KV head ``index``; the logits include β."""
        head, queries = segment.heads[index], segment.queries(index)
        tokens = sum(part.shape[1] for part in queries)
        if tokens == 0:
            raise ValueError(f"0 reference queries: {type(self).__name__} needs at least 1; keep a token's queries")
        rows = max(_LEAST_ROWS, self.block_bytes // _row_bytes(head.slots, head.key_dim))
        keys = head.keys.float()
        return LocalAttention(queries, keys, head.bias, segment.scale, min(rows, tokens)).weighted(segment.weights)

    def attention_bytes(self, shape: SegmentShape, *, copies: int = 1, then: int = 0) -> int:
        """Return an upper bound of the bytes that scoring by :meth:`attention` allocates; :meth:`scratch` uses it.

        The bound covers the keys in float32, a few numbers per slot and query, and the larger of two phases. The first
        phase holds ``copies`` blocks of queries with their weights. The second begins after these blocks are freed, and
        takes ``then`` bytes.
        """
        row = _row_bytes(shape.slots, shape.key_dim)
        block = min(shape.queries * row, max(_LEAST_ROWS * row, self.block_bytes))
        casts = shape.slots * shape.key_dim * FLOAT if shape.itemsize < FLOAT else 0
        numbers = 2 * shape.slots + 2 * shape.group * shape.queries
        return casts + numbers * FLOAT + max(copies * block, then)


def _row_bytes(slots: int, key_dim: int) -> int:
    """Return the bytes that a block of queries takes, divided by the number of queries in the block.

    For each query, the block holds a float32 vector, the weights over the slots and a few numbers. The float32 vector
    is counted twice: the vectors of the previous block are freed only after the vectors of the new block are made.
    """
    return FLOAT * (slots + 2 * key_dim + 4)


def largest_of_group(
    attention: LocalAttention, weights: Sequence[float], view: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield a weight and a tensor of maxima ``[B, T]`` for each block of B reference tokens.

    The function ``view`` is called once for each query head of the KV head. It gets the head's queries ``[B, d]`` of
    the block, and returns numbers ``[B, T]``, such as logits over the T slots. The yielded tensor is the elementwise
    maximum of these results.

    ``weights`` has one weight for each tensor in ``attention.queries``. Each block is a part of one such tensor and has
    the weight of this tensor.
    """
    for part, weight in zip(attention.queries, weights, strict=True):
        for tokens in blocks(part.shape[1], attention.rows):
            largest = view(part[0, tokens].float())
            for member in part[1:, tokens]:
                torch.maximum(largest, view(member.float()), out=largest)
            yield weight, largest
            del largest  # before the next block is made


def pooled(scores: torch.Tensor, kernel: int, pool: Pool) -> torch.Tensor:
    """Return ``scores [..., T]`` with each score replaced by the maximum or mean of the ``kernel`` slots around it.

    The result is a new tensor. At both ends fewer slots are pooled. Neighbours are neighbouring slots; once slots have
    been dropped, these are not always neighbouring tokens.
    """
    rows = scores.reshape(-1, 1, scores.shape[-1])
    if pool == "max":
        return max_pool1d(rows, kernel, stride=1, padding=kernel // 2).view_as(scores)
    return avg_pool1d(rows, kernel, stride=1, padding=kernel // 2, count_include_pad=False).view_as(scores)


def check_pooling(kernel: int, pool: str = "max") -> None:
    """Check the arguments ``kernel`` and ``pool`` of :func:`pooled`.

    Raises:
        ValueError: ``kernel`` is not odd and positive, or ``pool`` is unknown.

    """
    if kernel < 1 or kernel % 2 != 1:
        raise ValueError(f"kernel: {kernel!r} is not an odd number of slots; give 1 (no pooling), 3, 5, …")
    if pool not in get_args(Pool):
        raise ValueError(f"pool: {pool!r} is unknown; choose one of {', '.join(get_args(Pool))}")


def check_window(window: int) -> None:
    """Check the option ``window``, the number of newest tokens whose queries score the slots.

    Raises:
        ValueError: ``window`` is not a whole number of at least 1.

    """
    if window % 1 or window < 1:
        raise ValueError(f"window: {window!r} tokens are too few or no whole number; give at least 1")


def check_share(name: str, value: float) -> None:
    """Check that ``value``, the value of the option ``name``, lies in 0 … 1.

    Raises:
        ValueError: ``value`` is outside 0 … 1.

    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: {value!r} is not a share; give a number from 0 to 1")
