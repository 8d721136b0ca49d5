"""Define the classes and interfaces that the author of a policy needs.

This module imports only torch and :mod:`agentmem.queries`.

A policy is a composition, so that an ablation can change one part at a time:

    Policy = queries × budgets × compactor (× rewrite)

- ``Queries`` names the sources of the reference queries, which the runtime obtains and passes to the compactor.
- ``Budgets`` allocates an integer number of slots to every (layer, KV head).
- ``Rewrite`` is optional: the model replaces the segment by a summary. The compactor then compacts the summary's slots.
- ``Compactor`` replaces the segment of one layer by the allocated number of slots. It only returns values; the memory
  validates and commits them.
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
    """The largest sizes of one layer's segment, from which :meth:`Compactor.workspace` computes temporary bytes.

    ``heads`` is the number of KV heads. ``slots`` is the most slots of one head's segment before a compaction, and
    ``budget`` the most after the compaction. ``queries`` is the number of reference tokens; each token gives ``group``
    query vectors per KV head. ``itemsize`` is the number of bytes of one element of the keys and values.
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
    """The segment's slots of one KV head. The tensors may be views into the memory and must not be written.

    ``keys [T, d]`` and ``values [T, dv]`` have the model's dtype; keys are post-RoPE. ``bias [T]`` (float32) is β,
    which is added to the attention logits. ``positions [T]`` (int32) are the slots' positions in ascending order.
    ``scores [T]`` (float32) has the score of each slot; it is ``None`` if :attr:`Compactor.scores` is ``"none"``.

    If slots are quantised, reading ``keys`` or ``values`` decodes them to a new tensor. The plan has bytes for the keys
    and values of one head at a time: finish with a head, and drop what was read of it, before the next is read.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor | None = None

    @property
    def slots(self) -> int:
        """Return T, the number of this head's slots in the segment."""
        return int(self.bias.shape[0])

    @property
    def key_dim(self) -> int:
        """Return d, the dimension of a key; unlike :attr:`keys`, it decodes nothing."""
        return int(self.keys.shape[1])

    @property
    def value_dim(self) -> int:
        """Return dv, the dimension of a value; unlike :attr:`values`, it decodes nothing."""
        return int(self.values.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of keys and values; unlike them, it decodes nothing."""
        return self.keys.dtype


@dataclass(frozen=True, slots=True)
class Segment:
    """The segment of one layer, the slots between prefix and recent window: one :class:`HeadSegment` per KV head.

    ``references`` holds the reference queries, and is empty if the policy uses none. One part of the policy's
    :class:`Queries` may give several entries of ``references``. A logit is ``scale`` times the product of query and
    key, plus β. ``generator`` is the only source of randomness that a compactor may use.
    """

    layer: int
    heads: tuple[HeadSegment, ...]
    references: tuple[Reference, ...]
    scale: float
    generator: torch.Generator
    workspace_bytes: int
    """The temporary bytes planned for the compactor, by which it may choose the sizes of its blocks."""

    @property
    def group(self) -> int:
        """Return the number of query heads per KV head; 1 if the segment has no reference queries."""
        return 1 if not self.references else int(self.references[0].queries.shape[0]) // len(self.heads)

    def queries(self, head: int) -> tuple[torch.Tensor, ...]:
        """Return the reference queries of one KV head: one view ``[group, n, d]`` for each entry of ``references``."""
        if not self.references:
            raise ValueError("this segment has no reference queries: the policy's Queries has no parts")
        rows = slice(head * self.group, (head + 1) * self.group)
        return tuple(part.queries[rows] for part in self.references)

    @property
    def weights(self) -> tuple[float, ...]:
        """Return one weight for each entry of ``references``; the weight applies to every query of the entry."""
        return tuple(part.weight for part in self.references)


@dataclass(frozen=True, slots=True)
class Numerics:
    """Numerical properties of a compactor's fits in one layer, which the report of a compaction includes.

    ``condition`` is the largest estimated condition number of the solved equations. ``fallbacks`` names the simpler
    methods that the compactor used where its usual method failed.
    """

    condition: float = 1.0
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HeadCompaction:
    """The replacement slots of one KV head.

    ``kept [t]`` int64, strictly ascending: indices of the segment's slots that stay at their positions. Each of the
    other fields replaces one property of the kept slots; if a field is ``None``, the slots keep what they have.
    ``bias [t]`` float32: the new β. It replaces the old β and is not added to the old β.
    ``values [t, dv]``: new values, in the segment's dtype or float32.
    ``keys [t, d]``: new keys, in the segment's dtype or float32.
    ``scores [t]`` float32: new scores, only if the policy keeps a score column.
    """

    kept: torch.Tensor
    bias: torch.Tensor | None = None
    values: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    scores: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Compaction:
    """The result of a compactor for one layer: one :class:`HeadCompaction` per KV head, in the order of the heads."""

    heads: tuple[HeadCompaction, ...]
    numerics: Numerics = field(default_factory=Numerics)


@dataclass(frozen=True, slots=True)
class Curve:
    """The error curve of one head: errors for several numbers of kept slots.

    The errors are measured on held-out queries, which the compactor has not seen. ``slots`` ascend. If ``slots[i]``
    slots are kept, ``output[i]`` is the relative L2 error of the attention output over the segment alone.
    ``log_mass[i]`` is the mean absolute error of the log-mass: the log of the sum of ``exp(logit)`` over the segment.
    """

    slots: tuple[int, ...]
    output: tuple[float, ...]
    log_mass: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What budgets learn about one layer before they allocate slots: scores or error curves of its heads.

    ``scores`` holds one tensor ``[T]`` float32 per KV head, with a score of each slot. It is empty unless
    :attr:`Budgets.needs_survey` is true. ``curves`` holds one :class:`Curve` per KV head. It is empty unless
    :attr:`Budgets.needs_curves` is true.
    """

    layer: int
    scores: tuple[torch.Tensor, ...] = ()
    curves: tuple[Curve, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The identity of the model that budgets are allocated for.

    ``kv_heads`` holds the number of KV heads of each layer that is compacted. ``fingerprint`` distinguishes models of
    one architecture by their weights; it is ``None`` if no weights are available.
    """

    name: str
    fingerprint: str | None
    kv_heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """The argument of :meth:`Budgets.allocate`. All numbers of slots are without prefix and recent window.

    - ``held[layer][head]``: the slots that the head's segment holds now.
    - ``total``: the number of slots to allocate to all heads together.
    - ``floor``: the fewest slots that a head should get; a head that holds fewer should keep all of its slots.
    - ``surveys``: one :class:`Survey` per layer; empty if the budgets need neither scores nor curves.
    - ``ceiling``: the most slots that one head may get.
    - ``layer_ceiling``: the most slots that the heads of one layer may get together. The plan has reserved temporary
      bytes only for allocations within both ceilings.
    - ``limit``: the most slots that adaptive budgets may allocate to all heads together, so that slots stay free for
      new tokens.
    """

    held: tuple[tuple[int, ...], ...]
    total: int
    floor: int
    surveys: tuple[Survey, ...] = ()
    ceiling: int = 1 << 40
    layer_ceiling: int = 1 << 40
    limit: int = 1 << 40


class Budgets(ABC):
    """Allocate an integer number of slots to every (layer, KV head).

    Invariants:

    - The result has the shape of ``request.held``.
    - No head gets more slots than it holds or than ``ceiling``; no layer gets more than ``layer_ceiling``.
    - The sum is ``total``; if the held slots and the ceilings do not allow so much, the sum is the most that they
      allow. Adaptive budgets (:attr:`adaptive`) may choose any sum up to ``limit`` within these bounds.
    - Equal requests give equal results.
    """

    needs_survey: bool = False
    """True if :meth:`allocate` needs scores of all slots. They take one more forward of the probe, before the fits."""
    needs_curves: bool = False
    """True if :meth:`allocate` needs a :class:`Curve` of every head. To measure curves, every layer is fitted several
    times."""
    adaptive: bool = False
    """True if the sum of the allocated slots depends on an error target and may differ from ``total``."""
    head_ceiling: float = 1.0
    """The most slots of one head, as a multiple of an equal share; the plan reserves temporary bytes accordingly."""
    layer_ceiling: float = 1.0
    """The most slots of the heads of one layer together, as a multiple of a layer's equal share."""

    def check(self, model: ModelIdentity) -> None:  # noqa: B027  # most budgets fit every model
        """Raise ValueError if these budgets do not fit ``model``; called once, before any work."""

    @abstractmethod
    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Return how many segment slots each KV head may keep, as ``[layer][head]``."""


ScoreColumn = Literal["none", "received", "carried"]


class Compactor(ABC):
    """Replace the segment of one layer by fewer slots.

    The memory checks before every commit that head ``h`` gets exactly ``slots[h]`` slots, that ``kept`` is strictly
    ascending and in range, and that all returned tensors are finite. :func:`agentmem.testing.check_policy` checks that
    the segment is not written, that equal segments give equal results, that permuting the KV heads permutes the result,
    and that the bytes allocated during the call stay within :meth:`workspace`.
    """

    scores: ScoreColumn = "none"
    """The kind of score that the memory keeps for each slot, in 4 bytes. ``received``: the attention that the slot has
    received so far, summed over queries. ``carried``: the score that the last compaction returned for the slot; 0 for
    newer slots. ``none``: no scores are kept."""
    needs_queries: bool = False
    """True if :meth:`compact` needs reference queries."""
    fits: bool = True
    """True if :meth:`compact` fits its result to the reference queries. The runtime then withholds some of the queries
    from the compactor and measures errors on the withheld queries."""
    reads_keys: bool = True
    """False if neither :meth:`compact` nor :meth:`survey` reads :attr:`HeadSegment.keys`. The plan then reserves no
    bytes to decode quantised keys."""
    reads_values: bool = True
    """The same for :attr:`HeadSegment.values`."""

    @abstractmethod
    def workspace(self, shape: SegmentShape) -> int:
        """Return the most bytes that one call of :meth:`compact` or :meth:`survey` allocates, the result included.

        The bytes of decoding quantised keys and values are not part of it. Each tensor of the result must own its
        storage: a view of a larger tensor would keep bytes that the plan has for the new store.
        """

    def survey(self, segment: Segment) -> Survey:
        """Return a score of every slot for the budgets; called only if :attr:`Budgets.needs_survey` is true."""
        raise ValueError(f"layer {segment.layer}: {type(self).__name__} offers no survey, so budgets cannot use scores")

    @abstractmethod
    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """Return ``slots[h]`` replacement slots for every KV head ``h`` of the segment."""


@dataclass(frozen=True)
class Policy:
    """A named composition of queries, budgets and compactor. A policy with ``compactor=None`` never compacts."""

    name: str
    summary: str
    source: str
    """Paper and section that the method comes from, or "-"."""
    compactor: Compactor | None
    budgets: Budgets | None = None
    queries: Queries = field(default_factory=Queries)
    rewrite: Rewrite | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if the parts do not work together."""
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
        """Return the kind of score that the memory must keep for each slot."""
        return "none" if self.compactor is None else self.compactor.scores


@dataclass(frozen=True)
class Rewrite:
    """The optional part of a policy that lets the model replace the segment by a summary.

    ``instruction`` is the text that asks the model for the summary. ``lead`` is the text that stands before the summary
    in the memory. ``tokens`` is the most tokens of the summary; ``None`` lets the plan choose. After the summary has
    replaced the segment, the compactor keeps the fraction ``keep`` of the summary's slots. It never keeps more slots
    than the compaction's target allows.
    """

    instruction: str = (
        "Summarise everything so far in its own language, briefly: facts, names, numbers, decisions, open questions, "
        "next steps. Write the summary alone."
    )
    lead: str = "\nSummary of what came before: "
    tokens: int | None = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        """Raise ValueError if a field has a value that cannot work."""
        if not self.instruction.strip():
            raise ValueError("instruction: it is empty; write what the summary must keep")
        if self.tokens is not None and self.tokens < MIN_SUMMARY:
            raise ValueError(
                f"summary_tokens: a summary of {self.tokens} tokens says nothing; give at least {MIN_SUMMARY}, or None"
            )
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep: {self.keep} is no fraction of the summary's slots; give one above 0, 1 at most")


MIN_SUMMARY = 8
"""The fewest tokens of a summary that may replace a segment."""

PolicyFactory = Callable[..., Policy]
"""A function that makes a Policy from keyword options; entry points of the group ``agentmem.policies`` name it."""


def blocks(length: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of at most ``size`` elements that cover ``range(length)``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


_FILES: ContextVar[bool] = ContextVar("files", default=True)


@contextmanager
def without_files() -> Iterator[None]:
    """Forbid policy factories to open files inside this ``with`` block, because the options are not trusted."""
    token = _FILES.set(False)
    try:
        yield
    finally:
        _FILES.reset(token)


def check_file(path: object) -> None:
    """Check that a policy factory may open the file at ``path``; call this before opening a file that an option names.

    Raises:
        ValueError: the call is inside a block of :func:`without_files`.

    """
    if not _FILES.get():
        raise ValueError(f"file {str(path)[:80]!r} is named by a snapshot, which alone must not have files opened")
