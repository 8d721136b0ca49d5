"""Segments for the tests of evictions, and what their oracles take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agentmem.contracts import HeadSegment, Policy, Reference, Segment
from agentmem.policies.compactors.eviction import Eviction
from oracles import matching


def eviction(policy: Policy) -> Eviction:
    """Its compactor."""
    assert isinstance(policy.compactor, Eviction)
    return policy.compactor


@dataclass(frozen=True)
class Problem:
    """A segment of ``heads`` KV heads, ``group`` query heads each."""

    name: str
    slots: int = 40
    tokens: int = 8
    heads: int = 2
    group: int = 3
    bias: float = 0.0
    duplicates: bool = False
    dtype: torch.dtype = torch.float32

    def segment(self, seed: int = 0) -> Segment:
        """Keys in clusters, so that some are similar; queries of about their length."""
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(6, 8, generator=generator) * 1.5
        heads = []
        for _ in range(self.heads):
            pick = torch.randint(6, (self.slots,), generator=generator)
            keys = centres[pick] + 0.6 * torch.randn(self.slots, 8, generator=generator)
            if self.duplicates:
                keys[self.slots // 2 :] = keys[: self.slots - self.slots // 2]
            values = torch.randn(self.slots, 5, generator=generator)
            bias = self.bias * torch.randn(self.slots, generator=generator)
            scores = torch.rand(self.slots, generator=generator)
            positions = torch.arange(self.slots, dtype=torch.int32)
            heads.append(HeadSegment(keys.to(self.dtype), values.to(self.dtype), bias, positions, scores))
        queries = torch.randn(self.heads * self.group, self.tokens, 8, generator=generator).to(self.dtype)
        return Segment(0, tuple(heads), (Reference(queries),), 8**-0.5, torch.Generator().manual_seed(seed), 0)


PROBLEMS = (
    Problem("clusters"),
    Problem("one query head, one token", group=1, tokens=1),
    Problem("old β", bias=2.0),
    Problem("duplicate keys", duplicates=True),
    Problem("more than one block of slots and tokens", slots=75, tokens=70, group=2, heads=1),
    Problem("one slot", slots=1),
    Problem("bfloat16", dtype=torch.bfloat16),
)
TINY = 1
"""Block bytes that leave the least block, 32 rows."""


def asked(segment: Segment, index: int) -> tuple[list[matching.Matrix], matching.Matrix, list[float], float]:
    """What the oracles take: queries by query head, keys, β, scale."""
    (part,) = segment.queries(index)
    head = segment.heads[index]
    return part.double().tolist(), head.keys.double().tolist(), head.bias.double().tolist(), segment.scale


def facing(slots: int, *, at: Sequence[int], scores: Sequence[float] | None = None) -> Segment:
    """One head of orthogonal keys and one query per slot in ``at``, which sees that slot almost alone."""
    keys = torch.eye(slots) * 4.0
    column = None if scores is None else torch.tensor(scores)
    head = HeadSegment(keys, torch.eye(slots), torch.zeros(slots), torch.arange(slots, dtype=torch.int32), column)
    queries = (keys[list(at)] * 5.0)[None]
    return Segment(0, (head,), (Reference(queries),), 1.0, torch.Generator(), 0)


def kept(compactor: Eviction, segment: Segment, count: int) -> list[int]:
    """The slots that a compaction of the only head keeps."""
    return compactor.compact(segment, [count]).heads[0].kept.tolist()
