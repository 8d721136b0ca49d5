"""Save a sequence as plain values (a JSON state and tensors), and restore an equal sequence into another memory.

Forks and snapshots use this module. Free slots are not saved: the memory that restores the sequence allocates free
slots by its own plan, which may differ. Values that can be computed from the saved values are not saved either.
"""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field

from agentmem.memory.pinning import promote, put, settle
from agentmem.memory.pins import Pins, Spans, joined, size, without
from agentmem.memory.reports import Reports
from agentmem.memory.sequence import Consumed
from agentmem.memory.slot_spec import SlotSpec
from agentmem.memory.store import LayerStore
from agentmem.reference_queries.stored import QuerySample
from agentmem.reporting.report import CompactionReport, RebaseReport

if TYPE_CHECKING:
    from agentmem.contracts import HeadSegment
    from agentmem.memory.memory import Memory
    from agentmem.memory.sequence import TokenSequence

COLUMNS = ("keys", "values", "bias", "positions", "scores")
Count = Annotated[int, Field(ge=0, lt=1 << 31)]


SavedSpans = Annotated[tuple[tuple[Count, Count], ...], FailFast()]


class _Image(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SavedSample(_Image):
    """The saved state of a sample of stored queries, without its tensors.

    The sample holds the queries of ``filled`` tokens, at most ``size``, and takes every ``stride``-th token.
    """

    size: Annotated[Count, Field(ge=1)]
    filled: Count
    stride: Annotated[Count, Field(ge=1)]


class SavedLayer(_Image):
    """The saved state of one layer's store, without its tensors."""

    lengths: Annotated[tuple[Count, ...], FailFast()]
    biased: bool
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    """The dtype in which attention computes with keys and values, which may be stored quantised."""
    samples: Annotated[tuple[SavedSample, ...], FailFast()] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype whose name is :attr:`dtype`."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


class SavedSequence(_Image):
    """The saved state of one sequence, without its tensors."""

    tokens: Count
    next_position: Count
    shift: Count
    moves: Count
    intact: Count
    compactions: Count
    headroom_at: Count | None
    pins: SavedSpans
    request: SavedSpans
    front: SavedSpans
    """The tokens whose slots come first in every head, in this order: the prefix and the promoted tokens."""
    prompt_tokens: Count
    new_tokens: Count
    scales: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], FailFast()]
    """The logit scale of each layer; a compaction before the next forward would need these values."""
    layers: Annotated[tuple[SavedLayer | None, ...], FailFast()]
    compaction_reports: Annotated[tuple[CompactionReport, ...], FailFast()]
    rebase_reports: Annotated[tuple[RebaseReport, ...], FailFast()]

    def plain(self) -> dict[str, Any]:
        """Return the state as a dict of JSON values.

        Numbers in reports that are not finite, such as the condition of a singular fit, become strings.
        """
        said: dict[str, Any] = _spelled(self.model_dump(mode="json"))
        return said

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which attention computes with keys and values; ``None`` if no layer holds slots."""
        return next((each.torch_dtype for each in self.layers if each is not None), None)

    def promoted(self, prefix: int) -> Spans:
        """Return the tokens that are promoted when a memory with a prefix of ``prefix`` tokens restores the sequence.

        The slots of promoted (pinned) tokens are at the front of each head, directly after the prefix. The sequence may
        have been saved with another prefix.
        """
        return without(self.front, ((0, prefix),))

    def front_slots(self, prefix: int) -> int:
        """Return how many slots at the front of every head are not compacted, in a memory with this prefix."""
        return min(prefix, self.tokens) + size(self.promoted(prefix))

    def recent(self, prefix: int, recent: int) -> int:
        """Return how many slots of every head are in the recent window, in a memory with these settings."""
        return min(recent, self.tokens - min(prefix, self.tokens))


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---- taking


def take(memory: Memory) -> tuple[SavedSequence, dict[str, torch.Tensor]]:
    """Return the state of a memory's only sequence, and views of its tensors by name.

    The sequence must have no unfinished compaction or re-basing.
    """
    (sequence,) = memory.sequences
    assert sequence.quiet  # noqa: S101  # Engine.finish comes first
    if not sequence.arranged:
        promote(memory, sequence)
    ids = torch.tensor(sequence.ids, dtype=torch.int64, device="cpu")
    tensors = {"ids": ids, "generator": sequence.generator.get_state()}
    for index, store in enumerate(sequence.stores):
        if store is not None:
            if store.spec.shape.window is None:  # sliding layers keep no positions
                settle(sequence, store)
            tensors |= _views(index, store)
            tensors |= {f"layer.{index}.sample.{at}": each.kept for at, each in enumerate(sequence.samples[index])}
    consumed = memory.progress.consumed
    saved = SavedSequence(
        tokens=sequence.seen,
        next_position=sequence.next_position,
        shift=sequence.shift,
        moves=sequence.moves,
        intact=sequence.intact,
        compactions=sequence.compactions,
        headroom_at=sequence.headroom_at,
        pins=sequence.pins.spans,
        request=sequence.pins.request,
        front=joined(((0, min(memory.plan.prefix, sequence.seen)),), sequence.promoted),
        prompt_tokens=consumed.prompt_tokens,
        new_tokens=consumed.new_tokens,
        scales=tuple(memory.scales),
        layers=tuple(_layer(sequence, index) for index in range(len(sequence.stores))),
        compaction_reports=tuple(memory.compactions),
        rebase_reports=tuple(memory.rebases),
    )
    return saved, tensors


def _layer(sequence: TokenSequence, index: int) -> SavedLayer | None:
    store = sequence.stores[index]
    if store is None:
        return None
    samples = (SavedSample(size=each.size, filled=each.filled, stride=each.stride) for each in sequence.samples[index])
    dtype = str(store.spec.dtype).removeprefix("torch.")
    return SavedLayer(lengths=tuple(store.lengths), biased=store.biased, dtype=dtype, samples=tuple(samples))  # type: ignore[arg-type]  # pydantic validates


def columns(window: int | None, *, scored: bool) -> tuple[str, ...]:
    """Return the names of the tensors that are saved for each head of a layer with this ``window``.

    Layers with full attention save scores only if ``scored`` is true. Sliding layers save neither positions nor scores.
    """
    return COLUMNS[:3] if window is not None else COLUMNS if scored else COLUMNS[:4]


def _views(index: int, store: LayerStore) -> dict[str, torch.Tensor]:
    names = columns(store.spec.shape.window, scored=store.spec.scores)
    heads = ((head, store.part(head, 0, 0)) for head in range(len(store.lengths)))
    return {f"layer.{index}.head.{head}.{name}": _column(segment, name) for head, segment in heads for name in names}


def _column(segment: HeadSegment, name: str) -> torch.Tensor:
    column: torch.Tensor = getattr(segment, name)
    return column


# ---- giving


def give(memory: Memory, saved: SavedSequence, tensors: dict[str, torch.Tensor]) -> None:
    """Restore a saved sequence into a memory that has read nothing.

    Each tensor is removed from ``tensors`` when it is copied, so that few bytes are held twice. The state is not
    checked; if it comes from outside the process, the caller must have checked it.

    Raises:
        MemoryCapExceeded: the sequence does not fit under the cap.

    """
    memory.bind(1)
    (sequence,) = memory.sequences
    sequence.write(tensors.pop("ids").tolist(), ())
    sequence.generator.set_state(tensors.pop("generator"))
    sequence.change(
        tail=array(
            "i", bytes(4 * (saved.tokens - (saved.headroom_at or 0)))
        ),  # in the stores all positions are settled
        shift=saved.shift,
        moves=saved.moves,
        intact=saved.intact,
        compactions=saved.compactions,
        headroom_at=saved.headroom_at,
    )
    memory.progress.consumed = Consumed(
        (saved.tokens,),
        (saved.next_position + saved.shift,),
        saved.tokens,
        saved.prompt_tokens,
        saved.new_tokens,
    )
    put(memory, sequence, Pins(saved.pins, saved.request))
    memory.reports = Reports(list(saved.compaction_reports), list(saved.rebase_reports))
    memory.scales = list(saved.scales)
    for index, layer in enumerate(saved.layers):
        if layer is not None:
            sequence.replace(index, _store(memory, sequence, index, saved, tensors))
            sequence.samples[index] = _samples(memory, sequence, index, layer, tensors)
    expand(memory, sequence)


def _store(
    memory: Memory, sequence: TokenSequence, index: int, saved: SavedSequence, tensors: dict[str, torch.Tensor]
) -> LayerStore:
    shape, layer = memory.shape.layers[index], saved.layers[index]
    assert layer is not None  # noqa: S101  # the caller has looked
    full = shape.window is None
    store = LayerStore(
        SlotSpec(shape, layer.torch_dtype, memory.device, memory.scored and full), layer.lengths, memory.ledger
    )
    for head, (start, length) in enumerate(zip(store.starts, layer.lengths, strict=True)):
        for name in columns(shape.window, scored=store.spec.scores):
            getattr(store, name)[start : start + length] = tensors.pop(f"layer.{index}.head.{head}.{name}")
    settled, promoted = (layer.lengths, saved.promoted(memory.plan.prefix)) if full else ([0] * shape.kv_heads, ())
    store.fill(layer.lengths, settled, seen=sequence.seen, promoted=promoted, moves=sequence.moves)
    store.biased = layer.biased
    return store


def _samples(
    memory: Memory, sequence: TokenSequence, index: int, layer: SavedLayer, tensors: dict[str, torch.Tensor]
) -> tuple[QuerySample, ...]:
    made = []
    parts = zip(layer.samples, memory.policy.queries.stored, memory.plan.stored, strict=False)
    for at, (saved, part, planned) in enumerate(parts):
        kept = tensors.pop(f"layer.{index}.sample.{at}").to(memory.device)
        # Not larger than the saved sample: the queries that a larger sample would also hold were never kept.
        sample = QuerySample(part, memory.shape.layers[index], min(saved.size, planned), kept, memory.ledger)
        _fill(sample, saved, kept, sequence.seen)
        made.append(sample)
    return tuple(made)


def _fill(sample: QuerySample, saved: SavedSample, kept: torch.Tensor, seen: int) -> None:
    """Copy saved queries into a sample that may be smaller than the saved sample.

    If not all tokens fit, a sample whose source is ``context`` drops every second token until they fit. Other samples
    take only the newest tokens. ``seen`` is the number of tokens that the sequence has consumed.
    """
    sample.filled, sample.stride = saved.filled, saved.stride
    if saved.size == sample.size:
        sample.queries[:, : saved.filled] = kept
    elif sample.part.source == "context":
        while sample.filled > sample.size:
            kept, sample.stride = kept[:, ::2], 2 * sample.stride
            sample.filled = kept.shape[1]
        sample.queries[:, : sample.filled] = kept
    else:
        sample.filled = min(saved.filled, sample.size)
        for token in range(seen - sample.filled, seen):
            sample.queries[:, token % sample.size] = kept[:, token % saved.size]


# ---- room


def trim(memory: Memory, sequence: TokenSequence) -> None:
    """Shrink every store of a sequence to its filled slots.

    Call :func:`expand` to allocate the free slots again.
    """
    for index, store in enumerate(sequence.stores):
        if store is not None:
            _resize(sequence, index, store, store.lengths)
    if sequence.headroom_at is not None:
        sequence.change(full_at=sequence.seen + _headroom(memory, sequence) - memory.plan.scratch)  # as after expand


def expand(memory: Memory, sequence: TokenSequence) -> None:
    """Allocate the free slots that the plan allows, as at the end of a compaction.

    Stores of a sequence that was never compacted stay as they are, because they grow when tokens are appended.
    """
    if sequence.headroom_at is not None:
        headroom = _headroom(memory, sequence)
        for index, store in sequence.full():
            _resize(sequence, index, store, [length + headroom for length in store.lengths])
    sequence.change(full_at=sequence.measured(memory.plan.capacity, memory.plan.scratch))


def filled(sequence: TokenSequence) -> int:
    """Return the slots per head that the filled slots take on average by bytes, rounded up; for plans' capacities."""
    kept, price = _kept(sequence)
    return -(-kept // max(1, price))


def _headroom(memory: Memory, sequence: TokenSequence) -> int:
    """Return the number of free slots that the plan allows in each head; all heads get the same number."""
    kept, price = _kept(sequence)
    return max(0, (memory.plan.capacity * price - kept) // max(1, price))


def _kept(sequence: TokenSequence) -> tuple[int, int]:
    """Return the bytes of all filled slots in layers with full attention, and the bytes of one slot in each head."""
    full = sequence.full()
    price = sum(len(store.lengths) * store.spec.slot_bytes for _, store in full)
    return sum(store.used_bytes for _, store in full), price


def _resize(sequence: TokenSequence, index: int, store: LayerStore, capacities: list[int]) -> None:
    if store.capacities != tuple(capacities):
        sequence.replace(index, store.resized(capacities))


def copy(memory: Memory, cap: int | None = None) -> Memory:
    """Return a new memory with a copy of the memory's only sequence, under ``cap`` bytes if that is given.

    The two memories share no tensors. The sequence must have no unfinished compaction or re-basing.
    """
    other = memory.empty(cap)
    saved, views = take(memory)
    give(other, saved, views)
    return other
