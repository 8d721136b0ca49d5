"""A row as plain values: a JSON state and tensors, from which an equal row can be made in another memory.

Forks and snapshots use it. Room is not part of it: it is dealt anew under the plan of the memory that takes the row,
which gives the same room under the same plan, and what there is under another.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from agentmem.arena import LayerStore, SlotSpec
from agentmem.pins import Pins
from agentmem.report import CompactionReport, RebaseReport
from agentmem.samples import QuerySample

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentmem.contracts import HeadSegment
    from agentmem.memory import Memory
    from agentmem.row import Row
    from agentmem.shape import LayerShape

_COLUMNS = ("keys", "values", "bias", "positions", "scores")
_DTYPES = {"bias": torch.float32, "positions": torch.int32, "scores": torch.float32}


class _Image(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SampleImage(_Image):
    """How full one stored sample of queries is."""

    filled: NonNegativeInt
    stride: int = Field(ge=1)


class LayerImage(_Image):
    """One layer's store without its tensors."""

    lengths: tuple[NonNegativeInt, ...]
    settled: tuple[NonNegativeInt, ...]
    promoted: NonNegativeInt
    biased: bool
    samples: tuple[SampleImage, ...] = ()


class RowImage(_Image):
    """One row without its tensors."""

    tokens: NonNegativeInt
    tail: NonNegativeInt
    next_position: NonNegativeInt
    shift: NonNegativeInt
    moves: NonNegativeInt
    intact: NonNegativeInt
    compactions: NonNegativeInt
    dealt_at: NonNegativeInt | None
    pins: tuple[tuple[NonNegativeInt, NonNegativeInt], ...]
    promoted_until: int
    prompt_tokens: NonNegativeInt
    new_tokens: NonNegativeInt
    layers: tuple[LayerImage | None, ...]
    compaction_reports: tuple[CompactionReport, ...]
    rebase_reports: tuple[RebaseReport, ...]


# ---- taking


def take(memory: Memory) -> tuple[RowImage, dict[str, torch.Tensor]]:
    """The only row of a memory: its values, and views of its tensors by name. What has begun is finished first.

    Raises:
        CompactionFailed: a compaction had begun and cannot be finished.

    """
    (row,) = memory.rows
    memory.finish(row)
    tensors = {
        "ids": torch.tensor(row.ids, dtype=torch.int64),
        "tail": torch.tensor(row.tail, dtype=torch.int32),
        "generator": row.generator.get_state(),
    }
    for index, store in enumerate(row.stores):
        if store is not None:
            tensors |= _views(index, store)
            tensors |= {f"layer.{index}.sample.{at}": each.kept for at, each in enumerate(row.samples[index])}
    counts = memory.counted
    image = RowImage(
        tokens=row.seen,
        tail=len(row.tail),
        next_position=row.next_position,
        shift=row.shift,
        moves=row.moves,
        intact=row.intact,
        compactions=row.compactions,
        dealt_at=row.dealt_at,
        pins=tuple(row.pins.spans),
        promoted_until=row.pins.until,
        prompt_tokens=counts[0],
        new_tokens=counts[1],
        layers=tuple(_layer(row, index) for index in range(len(row.stores))),
        compaction_reports=tuple(memory.compactions),
        rebase_reports=tuple(memory.rebases),
    )
    return image, tensors


def _layer(row: Row, index: int) -> LayerImage | None:
    store = row.stores[index]
    if store is None:
        return None
    return LayerImage(
        lengths=tuple(store.lengths),
        settled=tuple(store.settled),
        promoted=store.promoted,
        biased=store.biased,
        samples=tuple(SampleImage(filled=each.filled, stride=each.stride) for each in row.samples[index]),
    )


def _views(index: int, store: LayerStore) -> dict[str, torch.Tensor]:
    heads = ((head, store.segment(head, 0, 0)) for head in range(len(store.lengths)))
    return {
        f"layer.{index}.head.{head}.{name}": tensor
        for head, segment in heads
        for name in _COLUMNS
        if (tensor := _column(segment, name)) is not None
    }


def _column(segment: HeadSegment, name: str) -> torch.Tensor | None:
    column: torch.Tensor | None = getattr(segment, name)
    return column


# ---- giving


def check(memory: Memory, image: RowImage, kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Refuse an image that a memory cannot hold, before anything is allocated; ``kinds`` are dtypes and shapes.

    Raises:
        ValueError: what is wrong, with the value and the limit.

    """
    wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
        "ids": (torch.int64, (image.tokens,)),
        "tail": (torch.int32, (image.tail,)),
        "generator": (torch.uint8, kinds.get("generator", (torch.uint8, ()))[1][:1]),
    }
    shapes = memory.shape.layers
    _hold(len(image.layers) == len(shapes), f"it has {len(image.layers)} layers, the model has {len(shapes)}")
    _hold(image.tail == image.tokens - (image.dealt_at or 0), f"{image.tail} positions for {image.tokens} tokens")
    _hold(image.intact <= image.tokens, f"intact from token {image.intact} of {image.tokens}")
    _hold(all(low < high <= image.tokens for low, high in image.pins), f"pins {image.pins} of {image.tokens} tokens")
    for index, (layer, shape) in enumerate(zip(image.layers, shapes, strict=True)):
        if layer is not None:
            wanted |= _layer_kinds(memory, index, layer, shape)
    _hold(set(kinds) == set(wanted), f"tensors {sorted(set(kinds) ^ set(wanted))[:4]} are missing or too many")
    for name, (dtype, sizes) in wanted.items():
        found = kinds[name]
        _hold(found[1] == sizes, f"{name} has shape {list(found[1])} instead of {list(sizes)}")
        floating = found[0].is_floating_point and found[0].itemsize == memory.shape.itemsize
        _hold(found[0] == dtype or (dtype is None and floating), f"{name} is of {found[0]}")


def _layer_kinds(
    memory: Memory, index: int, layer: LayerImage, shape: LayerShape
) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    _hold(len(layer.lengths) == len(layer.settled) == shape.kv_heads, f"layer {index} has {len(layer.lengths)} heads")
    pairs = zip(layer.settled, layer.lengths, strict=True)
    _hold(all(settled <= length for settled, length in pairs), f"layer {index}: more positions than slots")
    most = memory.plan.slots_of(shape)
    _hold(
        sum(layer.lengths) <= most * shape.kv_heads,
        f"layer {index} holds {sum(layer.lengths)} slots, and the cap has room for {most * shape.kv_heads}",
    )
    _hold(len(layer.samples) in (0, len(memory.plan.stored)), f"layer {index} has {len(layer.samples)} samples")
    full = shape.window is None
    names = _COLUMNS if full and memory.scored else _COLUMNS[:-1]
    dims = {"keys": (shape.key_dim,), "values": (shape.value_dim,)}
    wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
        f"layer.{index}.head.{head}.{name}": (_DTYPES.get(name), (length, *dims.get(name, ())))
        for head, length in enumerate(layer.lengths)
        for name in names
    }
    for at, (sample, size) in enumerate(zip(layer.samples, memory.plan.stored, strict=False)):
        _hold(sample.filled <= size, f"layer {index}: {sample.filled} stored queries, {size} at most")
        wanted[f"layer.{index}.sample.{at}"] = (None, (shape.query_heads, sample.filled, shape.key_dim))
    return wanted


def _hold(law: bool, broken: str) -> None:  # noqa: FBT001  # reads as a sentence
    if not law:
        raise ValueError(broken)


def give(memory: Memory, image: RowImage, tensors: dict[str, torch.Tensor]) -> None:
    """Fill a memory that has read nothing with a row; ``tensors`` is emptied on the way, so that little is held twice.

    Raises:
        MemoryCapExceeded: it does not fit under the cap.

    """
    memory.bind(1)
    (row,) = memory.rows
    row.ids = array("q", tensors.pop("ids").tolist())
    row.tail = array("i", tensors.pop("tail").tolist())
    row.generator.set_state(tensors.pop("generator"))
    row.next_position, row.shift, row.moves = image.next_position, image.shift, image.moves
    row.intact, row.compactions, row.dealt_at = image.intact, image.compactions, image.dealt_at
    row.pins = Pins([(low, high) for low, high in image.pins], image.promoted_until)
    memory.compactions[:], memory.rebases[:] = image.compaction_reports, image.rebase_reports
    memory.counted = (image.prompt_tokens, image.new_tokens)
    for index, layer in enumerate(image.layers):
        if layer is not None:
            row.stores[index] = _store(memory, row, index, layer, tensors)
            row.samples[index] = _samples(memory, index, layer, tensors)
    expand(memory, row)


def _store(memory: Memory, row: Row, index: int, layer: LayerImage, tensors: dict[str, torch.Tensor]) -> LayerStore:
    shape = memory.shape.layers[index]
    like = tensors[f"layer.{index}.head.0.keys"]
    spec = SlotSpec(shape, like.dtype, memory.device, memory.scored and shape.window is None)
    store = LayerStore(spec, layer.lengths, memory.ledger)
    for head, (start, length) in enumerate(zip(store.starts, layer.lengths, strict=True)):
        for name in _COLUMNS:
            sink, source = getattr(store, name), tensors.pop(f"layer.{index}.head.{head}.{name}", None)
            if sink is not None and source is not None:
                sink[start : start + length] = source
    store.fill(layer.lengths, layer.settled, seen=row.seen, promoted=layer.promoted, moves=row.moves)
    store.biased = layer.biased
    return store


def _samples(
    memory: Memory, index: int, layer: LayerImage, tensors: dict[str, torch.Tensor]
) -> tuple[QuerySample, ...]:
    made = []
    parts = zip(layer.samples, memory.policy.queries.stored, memory.plan.stored, strict=False)
    for at, (image, part, size) in enumerate(parts):
        kept = tensors.pop(f"layer.{index}.sample.{at}")
        sample = QuerySample(part, memory.shape.layers[index], size, kept, memory.ledger)
        sample.filled, sample.stride = image.filled, image.stride
        sample.queries[:, : image.filled] = kept
        made.append(sample)
    return tuple(made)


# ---- room


def trim(memory: Memory, row: Row) -> None:
    """Give back all room: every store is as large as what it holds. :func:`expand` brings it back."""
    memory.finish(row)
    for index, store in enumerate(row.stores):
        if store is not None and store.capacities != tuple(store.lengths):
            row.stores[index] = store.resized(store.lengths)
            store.free()


def expand(memory: Memory, row: Row) -> None:
    """Deal out the room that the plan pays for, as after a compaction; a row never compacted grows by itself."""
    if row.dealt_at is not None:
        full = [(index, store) for index in memory.shape.compactable if (store := row.stores[index]) is not None]
        price = sum(len(store.lengths) * store.spec.slot_bytes for _, store in full)
        kept = sum(store.used_bytes for _, store in full)
        headroom = max(0, (memory.plan.capacity * price - kept) // max(1, price))
        for index, store in full:
            row.stores[index] = store.resized([length + headroom for length in store.lengths])
            store.free()
    row.recount(memory.plan.capacity, memory.plan.scratch)


def copy(memory: Memory) -> Memory:
    """Another memory with an equal row; the bytes are its own."""
    other = memory.empty()
    image, views = take(memory)
    give(other, image, views)
    return other
