"""The nouns and the seams that a policy author needs. A leaf: it imports torch and nothing of agentmem.

A policy is a composition, so that an ablation changes one thing at a time:

    Policy = queries × budgets × compactor

- ``Queries`` says where the reference queries come from; the runtime obtains them.
- ``Budgets`` deals integer slots to every (layer, KV head).
- ``Compactor`` replaces the segment of one layer by that many slots. It only returns values; the memory
  alone validates and commits them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

QuerySource = Literal["none", "replay", "repeat", "live"]


@dataclass(frozen=True, slots=True)
class Queries:
    """Where reference queries come from.

    ``none``: the compactor needs none. ``replay``: the most recent ``tokens`` of the transcript run again at the
    following positions in a transient forward. ``repeat``: the same behind an instruction (needs a tokenizer).
    ``live``: a strided sample, bounded in bytes, of the queries that the model itself asked.
    """

    source: QuerySource = "none"
    tokens: int | None = None
    """Probe tokens (or live queries kept per row); ``None`` lets the plan choose."""
    instruction: str = "Repeat the previous context word for word."

    @property
    def probes(self) -> bool:
        """Whether a transient forward through the model is needed."""
        return self.source in ("replay", "repeat")


@dataclass(frozen=True, slots=True)
class SegmentShape:
    """The sizes that one call of :meth:`Compactor.compact` has to expect, for planning its workspace.

    ``slots`` and ``budget`` are per KV head: the most a head's segment holds before and keeps after.
    ``queries`` counts reference tokens; each gives ``group`` query vectors per KV head.
    """

    heads: int
    group: int
    slots: int
    budget: int
    queries: int
    key_dim: int
    value_dim: int
    itemsize: int


@dataclass(frozen=True, slots=True)
class HeadSegment:
    """The compactable slots of one KV head: views into the memory, to be read and never written.

    ``keys [T, d]`` and ``values [T, dv]`` in the model's dtype (keys carry their RoPE phase), ``bias [T]`` float32
    (β, added to the attention logit), ``positions [T]`` int32 ascending, ``scores [T]`` float32 (attention received
    so far, summed over queries) or ``None`` when the policy did not ask for score accumulators.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor | None = None

    @property
    def slots(self) -> int:
        """T, the number of slots in the segment."""
        return int(self.keys.shape[0])


@dataclass(frozen=True, slots=True)
class Segment:
    """One layer's segment: between prefix and recent, one :class:`HeadSegment` per KV head.

    ``reference`` is ``[heads * group, n, d]`` (query heads in the model's order, post-RoPE, in the model's dtype) or
    ``None``; ``scale`` multiplies the logits; ``generator`` is the only randomness a compactor may use.
    """

    layer: int
    heads: tuple[HeadSegment, ...]
    reference: torch.Tensor | None
    scale: float
    generator: torch.Generator
    workspace_bytes: int
    """What :meth:`Compactor.workspace` promised; block sizes may be chosen from it."""

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return 1 if self.reference is None else int(self.reference.shape[0]) // len(self.heads)

    def queries(self, head: int) -> torch.Tensor:
        """The reference queries of one KV head, ``[group, n, d]``: a view, in the model's dtype."""
        if self.reference is None:
            raise ValueError("this segment has no reference queries: the policy's Queries.source is 'none'")
        group = self.group
        return self.reference[head * group : (head + 1) * group]


@dataclass(frozen=True, slots=True)
class Numerics:
    """What a fit went through, for the report. ``condition`` is the worst condition number estimate."""

    condition: float = 1.0
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HeadCompaction:
    """The replacement slots of one KV head.

    ``kept [t]`` int64, strictly ascending: which segment slots stay (position, key and score come from there).
    ``bias [t]`` float32: the *total* new β, old bias included; ``None`` leaves the kept slots' bias.
    ``values [t, dv]`` in the segment's dtype or float32; ``None`` leaves the kept slots' values.
    ``keys [t, d]`` likewise; ``None`` leaves the kept keys (then they keep their RoPE phase exactly).
    """

    kept: torch.Tensor
    bias: torch.Tensor | None = None
    values: torch.Tensor | None = None
    keys: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compactor returns for one layer: one :class:`HeadCompaction` per KV head, in order."""

    heads: tuple[HeadCompaction, ...]
    numerics: Numerics = field(default_factory=Numerics)


@dataclass(frozen=True, slots=True)
class Survey:
    """What a survey of one layer found. ``scores`` has one ``[T]`` float32 tensor per KV head."""

    layer: int
    scores: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """What a :class:`Budgets` has to deal.

    ``held[layer][head]`` are the segment's slots now; ``total`` is the sum to hand out; ``floor`` the least per head.
    """

    held: tuple[tuple[int, ...], ...]
    total: int
    floor: int
    surveys: tuple[Survey, ...] = ()


class Budgets(ABC):
    """Deals integer slots to every (layer, KV head).

    Laws: the result has the shape of ``request.held``; no head gets more than it holds; the sum is
    ``min(total, sum of held)``; the same request gives the same result.
    """

    needs_survey: bool = False

    @abstractmethod
    def deal(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Integer slots per layer and KV head of the segment (prefix and recent are not in it)."""


class Compactor(ABC):
    """Replaces the segment of one layer by fewer slots.

    Laws, checked before every commit: head ``h`` gets exactly ``slots[h]`` slots; ``kept`` is strictly ascending and
    in range; all returned tensors are finite. Laws, checked by :func:`agentmem.testing.check_policy`: the segment is
    not written; the same segment gives the same result; permuting the KV heads permutes the result; what is
    allocated during the call stays within :meth:`workspace`.
    """

    scores: bool = False
    """Whether the memory must keep score accumulators (4 bytes a slot) for this compactor."""

    @abstractmethod
    def workspace(self, shape: SegmentShape) -> int:
        """Bytes that one call of :meth:`compact` may allocate at most, its result and torch's scratch included."""

    def survey(self, segment: Segment) -> Survey:
        """Scores for the budgets; only called when ``budgets.needs_survey``."""
        raise ValueError(f"layer {segment.layer}: {type(self).__name__} offers no survey, so budgets cannot use scores")

    @abstractmethod
    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """``slots[h]`` replacement slots for every KV head ``h`` of the segment."""


@dataclass(frozen=True)
class Policy:
    """A named composition of queries, budgets and compactor. ``compactor=None`` never compacts."""

    name: str
    summary: str
    source: str
    """Paper and section, or "-"."""
    compactor: Compactor | None
    budgets: Budgets | None = None
    queries: Queries = field(default_factory=Queries)

    def __post_init__(self) -> None:
        """Refuse a composition that cannot run."""
        if (self.compactor is None) != (self.budgets is None):
            raise ValueError(f"policy {self.name!r}: compactor and budgets come together, or neither (never compacts)")
        if self.compactor is not None and self.budgets is not None and self.budgets.needs_survey:
            surveyed = type(self.compactor).survey is not Compactor.survey
            if not surveyed:
                raise ValueError(
                    f"policy {self.name!r}: {type(self.budgets).__name__} deals by surveyed scores, "
                    f"but {type(self.compactor).__name__} has no survey; use uniform budgets or add a survey"
                )

    @property
    def scores(self) -> bool:
        """Whether score accumulators must be kept."""
        return self.compactor is not None and self.compactor.scores


PolicyFactory = Callable[..., Policy]
"""What an entry point of the group ``agentmem.policies`` names: called with keyword options, returns a Policy."""


def blocks(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(length)``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
