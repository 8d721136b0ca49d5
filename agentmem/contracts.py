"""The nouns and the seams that a policy author needs. It imports torch and queries.

A policy is a composition, so that an ablation changes one thing at a time:

    Policy = queries × budgets × compactor (× rewrite)

- ``Queries`` says where the reference queries come from, a mixture of parts; the runtime obtains them.
- ``Budgets`` allocates integer slots to every (layer, KV head).
- ``Rewrite``, where there is one, has the model summarise the segment first.
- ``Compactor`` replaces the segment of one layer by that many slots. It only returns values; the memory
  alone validates and commits them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import torch

from agentmem.queries import Part, Queries, Reference, Source

__all__ = [
    "BudgetRequest",
    "Budgets",
    "Compaction",
    "Compactor",
    "Curve",
    "HeadCompaction",
    "HeadSegment",
    "ModelIdentity",
    "Numerics",
    "Part",
    "Policy",
    "PolicyFactory",
    "Queries",
    "Reference",
    "Rewrite",
    "ScoreColumn",
    "Segment",
    "SegmentShape",
    "Source",
    "Survey",
    "blocks",
]


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
    (β, added to the attention logit), ``positions [T]`` int32 ascending, ``scores [T]`` float32 or ``None`` when the
    policy keeps no score column (see :attr:`Compactor.scores`).
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

    ``references`` are the reference queries in parts (none where the policy has no queries); ``scale`` multiplies the
    logits; ``generator`` is the only randomness a compactor may use.
    """

    layer: int
    heads: tuple[HeadSegment, ...]
    references: tuple[Reference, ...]
    scale: float
    generator: torch.Generator
    workspace_bytes: int
    """What :meth:`Compactor.workspace` promised; block sizes may be chosen from it."""

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return 1 if not self.references else int(self.references[0].queries.shape[0]) // len(self.heads)

    def queries(self, head: int) -> tuple[torch.Tensor, ...]:
        """The reference queries of one KV head, ``[group, n, d]`` for each part: views, in the model's dtype."""
        if not self.references:
            raise ValueError("this segment has no reference queries: the policy's Queries has no parts")
        rows = slice(head * self.group, (head + 1) * self.group)
        return tuple(part.queries[rows] for part in self.references)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each part's queries."""
        return tuple(part.weight for part in self.references)


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
    ``scores [t]`` float32, only with a score column; ``None`` leaves the kept slots' scores.
    """

    kept: torch.Tensor
    bias: torch.Tensor | None = None
    values: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    scores: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compactor returns for one layer: one :class:`HeadCompaction` per KV head, in order."""

    heads: tuple[HeadCompaction, ...]
    numerics: Numerics = field(default_factory=Numerics)


@dataclass(frozen=True, slots=True)
class Curve:
    """The errors of one head on held-out queries against the slots it keeps, ``slots`` ascending.

    ``output[i]`` is the relative L2 error of the local output and ``log_mass[i]`` the mean absolute error of the log of
    the segment's attention mass, with ``slots[i]`` slots left.
    """

    slots: tuple[int, ...]
    output: tuple[float, ...]
    log_mass: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What a survey of one layer found. ``scores`` has one ``[T]`` float32 tensor per KV head, ``curves`` one each.

    Each is empty unless the budgets need it.
    """

    layer: int
    scores: tuple[torch.Tensor, ...] = ()
    curves: tuple[Curve, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model budgets are allocated for. ``kv_heads`` has one count per layer that is compacted.

    ``fingerprint`` tells models of one architecture apart by their weights; ``None`` where no weights are at hand.
    """

    name: str
    fingerprint: str | None
    kv_heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """What a :class:`Budgets` has to allocate, in slots of the segment (prefix and recent are not in it).

    ``held[layer][head]`` are the segment's slots now; ``total`` is the sum to hand out; ``floor`` the least per head
    that holds so many. ``ceiling`` is the most for any head and ``layer_ceiling`` for the heads of one layer together:
    the plan has counted workspace for no more. ``limit`` is the sum that still lets the memory go on; only adaptive
    budgets may allocate more than ``total``, and never more than ``limit``.
    """

    held: tuple[tuple[int, ...], ...]
    total: int
    floor: int
    surveys: tuple[Survey, ...] = ()
    ceiling: int = 1 << 40
    layer_ceiling: int = 1 << 40
    limit: int = 1 << 40


class Budgets(ABC):
    """Allocates integer slots to every (layer, KV head).

    Invariants: the result has the shape of ``request.held``; no head gets more than it holds or than ``ceiling``, no
    layer more than ``layer_ceiling``; the sum is ``total``, or the most that held slots and ceilings allow if that is
    less (for adaptive budgets: anything up to ``limit``); the same request gives the same result.
    """

    needs_survey: bool = False
    """Whether scores of all layers are needed first: a pass of the probe before the fitting pass."""
    needs_curves: bool = False
    """Whether the survey must carry error curves; the runtime measures them, with several fits of every layer."""
    adaptive: bool = False
    """Whether the sum follows an error target instead of ``total``."""
    head_ceiling: float = 1.0
    """The most that one head can get, in equal shares. Workspace is planned for it."""
    layer_ceiling: float = 1.0
    """The most that the heads of one layer can get together, in equal shares."""

    def check(self, model: ModelIdentity) -> None:  # noqa: B027  # most budgets fit every model
        """Raise ValueError where these budgets are not for that model; called once, before any work."""

    @abstractmethod
    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Integer slots per layer and KV head of the segment (prefix and recent are not in it)."""


ScoreColumn = Literal["none", "received", "carried"]


class Compactor(ABC):
    """Replaces the segment of one layer by fewer slots.

    Invariants, checked before every commit: head ``h`` gets exactly ``slots[h]`` slots; ``kept`` is strictly ascending
    and in range; all returned tensors are finite. Invariants, checked by :func:`agentmem.testing.check_policy`: the
    segment is not written; the same segment gives the same result; permuting the KV heads permutes the result; what is
    allocated during the call stays within :meth:`workspace`.
    """

    scores: ScoreColumn = "none"
    """A score per slot (4 bytes), for this compactor: ``received`` is the attention that the slot has received so far,
    summed over queries by the runtime; ``carried`` is what the last compaction gave it, 0 for newer slots."""
    needs_queries: bool = False
    """Whether :meth:`compact` needs reference queries."""
    fits: bool = True
    """Whether it fits anything to them. Only then are some held out from it, to measure errors on."""

    @abstractmethod
    def workspace(self, shape: SegmentShape) -> int:
        """Bytes that one call of :meth:`compact` or :meth:`survey` allocates at most, result and scratch included."""

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
    rewrite: Rewrite | None = None

    def __post_init__(self) -> None:
        """Refuse a composition that cannot run."""
        if self.rewrite is not None and self.compactor is None:
            raise ValueError(
                f"policy {self.name!r}: a summary that fails is made up for by a compactor, and this policy has none; "
                "give it one"
            )
        if (self.compactor is None) != (self.budgets is None):
            raise ValueError(f"policy {self.name!r}: compactor and budgets come together, or neither (never compacts)")
        if self.compactor is not None and self.compactor.needs_queries and not self.queries.parts:
            raise ValueError(
                f"policy {self.name!r}: {type(self.compactor).__name__} fits to reference queries, but Queries has no "
                "parts; use Queries.of('replay') or another source"
            )
        if self.budgets is not None and self.budgets.needs_curves and not self.queries.parts:
            raise ValueError(
                f"policy {self.name!r}: {type(self.budgets).__name__} budgets measure errors on reference queries, but "
                "Queries has no parts; use other budgets, or a policy with a probe"
            )
        if self.compactor is not None and self.budgets is not None and self.budgets.needs_survey:
            surveyed = type(self.compactor).survey is not Compactor.survey
            if not surveyed:
                raise ValueError(
                    f"policy {self.name!r}: {type(self.budgets).__name__} allocates by surveyed scores, "
                    f"but {type(self.compactor).__name__} has no survey; use uniform budgets or add a survey"
                )

    @property
    def scores(self) -> ScoreColumn:
        """The score column that must be kept."""
        return "none" if self.compactor is None else self.compactor.scores


@dataclass(frozen=True)
class Rewrite:
    """The segment in fewer words: before a compaction the model writes a summary, whose slots replace the segment's.

    ``instruction`` asks for it, in the language of the text; ``lead`` stands before it in the memory. ``tokens`` is the
    most that it may have, ``None`` lets the plan choose. ``keep`` is the fraction of its slots that the compactor then
    leaves; 1 leaves them all.
    """

    instruction: str = (
        "Summarise everything so far in its own language, briefly: facts, names, numbers, decisions, open questions, "
        "next steps. Write the summary alone."
    )
    lead: str = "\nSummary of what came before: "
    tokens: int | None = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not self.instruction.strip():
            raise ValueError("instruction: it is empty; write what the summary must keep")
        if self.tokens is not None and self.tokens < MIN_SUMMARY:
            raise ValueError(f"tokens: a summary of {self.tokens} tokens says nothing; give at least {MIN_SUMMARY}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep: {self.keep} is no fraction of the summary's slots; give one above 0, 1 at most")


MIN_SUMMARY = 8
"""Fewest tokens of a summary that is accepted."""

PolicyFactory = Callable[..., Policy]
"""What an entry point of the group ``agentmem.policies`` names: called with keyword options, returns a Policy."""


def blocks(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(length)``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


_FILES: ContextVar[bool] = ContextVar("files", default=True)


@contextmanager
def without_files() -> Iterator[None]:
    """In the block a policy is made from words that nobody vouches for: its factory must open no file they name."""
    token = _FILES.set(False)
    try:
        yield
    finally:
        _FILES.reset(token)


def check_file(path: object) -> None:
    """Refuse to open a file that an option names, where that is not allowed.

    Raises:
        ValueError: the policy is made from what a snapshot says.

    """
    if not _FILES.get():
        raise ValueError(f"file {str(path)[:80]!r} is named by a snapshot, which alone must not have files opened")
