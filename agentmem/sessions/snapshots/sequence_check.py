"""Checks of a sequence in a snapshot, made before a memory continues this sequence.

The sizes of the tensors are checked before the tensors are read. Their values are checked afterwards.

Checksums find damage but not forged values. Later code relies on every invariant checked here: if one were broken, an
index would be out of range, slots would not be accounted for, or positions would belong to no token. All checks raise
ValueError with the value and the limit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from agentmem.memory.pins import joined, size, within, without
from agentmem.memory.slot_spec import SlotSpec
from agentmem.memory.state import columns
from agentmem.planning.pricing import MIN_BUDGET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentmem.memory.memory import Memory
    from agentmem.memory.state import SavedLayer, SavedSample, SavedSequence
    from agentmem.planning.model_shape import LayerShape
    from agentmem.queries import Part

    Kind = tuple[torch.dtype, tuple[int, ...]]
    """Dtype and shape of a tensor."""

_DTYPES = {"bias": torch.float32, "positions": torch.int32, "scores": torch.float32}


# ---- sizes


def check_sizes(memory: Memory, saved: SavedSequence, kinds: Mapping[str, Kind], dtype: torch.dtype) -> None:
    """Refuse a sequence that the memory cannot hold, or whose counts contradict one another.

    This check comes before any tensor is allocated. ``kinds`` has the dtype and shape of each tensor by its name. Keys
    and values must have been computed in ``dtype``.
    """
    shapes = memory.shape.layers
    _hold(len(saved.layers) == len(shapes), f"it has {len(saved.layers)} layers, the model has {len(shapes)}")
    _hold(len(saved.scales) == len(shapes), f"it has {len(saved.scales)} scales for {len(shapes)} layers")
    _check_counts(memory, saved)
    wanted: dict[str, Kind] = {
        "ids": (torch.int64, (saved.tokens,)),
        "generator": (torch.uint8, tuple(torch.Generator().get_state().shape)),
    }
    held = 0
    for index, (layer, shape) in enumerate(zip(saved.layers, shapes, strict=True)):
        _hold((layer is None) == (saved.tokens == 0), f"layer {index} of {saved.tokens} tokens is not as it must be")
        if layer is not None:
            _check_slots(index, shape, kinds)
            _check_lengths(memory, saved, index, layer, shape)
            wanted |= _kinds(memory, index, layer, shape, dtype)
            held += _check_samples(memory, saved, index, layer, shape)
            scored = memory.scored and shape.window is None
            held += sum(layer.lengths) * memory.shape.slot_bytes(shape, scores=scored)
    most = memory.plan.resident_bytes
    _hold(held <= most, f"it needs {held} bytes, and a share of {memory.plan.cap_bytes} has room for {most}")
    _compare(kinds, wanted)


def _check_slots(index: int, shape: LayerShape, kinds: Mapping[str, Kind]) -> None:
    """Refuse keys and values that slots of this kind do not hold, as those with codes of another number of bits."""
    for which, part in enumerate(("keys", "values")):
        found = kinds.get(f"layer.{index}.head.0.{part}")
        if found is None:
            continue
        fits = found[0] != torch.uint8
        if shape.formats is not None:
            fits = found[0] == torch.uint8 and found[1][-1] == shape.formats[which].row_bytes
        _hold(
            fits,
            f"layer {index} has {part} of {found[1][-1]} {found[0]} each, which slot_dtype={shape.slot_dtype!r} does "
            "not hold; leave slot_dtype out, so that the snapshot's own is taken",
        )


def _check_counts(memory: Memory, saved: SavedSequence) -> None:
    plan, tokens = memory.plan, saved.tokens
    _hold(
        saved.next_position + saved.shift == tokens,
        f"next position {saved.next_position} + shift {saved.shift} are not its {tokens} tokens",
    )
    for name, value in (
        ("intact", saved.intact),
        ("headroom_at", saved.headroom_at or 0),
    ):
        _hold(value <= tokens, f"{name} at token {value} of {tokens}")
    _hold(saved.headroom_at is not None or saved.intact == 0, f"intact from {saved.intact} on, yet never compacted")
    for name, spans in (("pins", saved.pins), ("request", saved.request), ("front", saved.front)):
        _hold(spans == joined(spans), f"{name} {spans[:4]} are no spans in order")
    promoted = saved.promoted(plan.prefix)
    unmoved = size(without(within(joined(saved.pins, saved.request), plan.prefix, saved.intact), promoted))
    _hold(unmoved == 0, f"{unmoved} pinned tokens before {saved.intact} were compacted, not moved to the front")
    prefix, recent = min(plan.prefix, tokens), saved.recent(plan.prefix, plan.recent)
    led = prefix == 0 or within(saved.front, 0, prefix) == ((0, prefix),)
    _hold(not promoted or led, f"front {saved.front[:4]} does not begin with the first {prefix} tokens (keep_first)")
    _hold(
        not promoted or promoted[-1][1] <= tokens - recent,
        f"front ends at token {saved.front[-1:]} of {tokens}, of which {recent} are recent (keep_recent)",
    )
    _hold(
        recent <= tokens - saved.intact,
        f"tokens before {saved.intact} of {tokens} have been compacted, so keep_recent={plan.recent} cannot be kept; "
        f"give at most {tokens - saved.intact}",
    )
    pinned = size(within(saved.pins, plan.prefix, 1 << 60))
    needed = plan.prefix + pinned + plan.recent + MIN_BUDGET
    _hold(
        pinned == 0 or needed <= plan.target or memory.policy.compactor is None,
        f"{pinned} pinned tokens need {needed} slots per head, and a compaction under this share leaves {plan.target}",
    )


def _check_lengths(memory: Memory, saved: SavedSequence, index: int, layer: SavedLayer, shape: LayerShape) -> None:
    _hold(len(layer.lengths) == shape.kv_heads, f"layer {index} has {len(layer.lengths)} KV heads")
    low, high = min(layer.lengths), max(layer.lengths)
    if shape.window is not None:
        least, most = min(saved.tokens, shape.window - 1), min(saved.tokens, 2 * shape.window - 1)
        _hold(low == high and least <= low <= most, f"layer {index} holds {low} … {high} slots of its window")
        return
    least = _never_compacted(memory, saved)
    _hold(low >= least, f"layer {index} holds {low} slots in a head, of which {least} were never compacted")
    most = _fullest(memory) if saved.headroom_at is not None else saved.tokens
    _hold(high <= min(most, saved.tokens), f"layer {index} holds {high} slots in a head; {most} are the most here")


def _never_compacted(memory: Memory, saved: SavedSequence) -> int:
    """Return the number of slots that every head must have at least.

    These are the slots of the prefix, of the pinned tokens that were moved to directly behind the prefix, and of all
    other tokens that no compaction has reached.
    """
    prefix = min(memory.plan.prefix, saved.tokens)
    start = max(saved.intact, prefix)
    behind = saved.tokens - start - size(within(saved.promoted(memory.plan.prefix), start, saved.tokens))
    return saved.front_slots(memory.plan.prefix) + behind


def _fullest(memory: Memory) -> int:
    """Return the most slots that one head of a full sequence can hold according to the plan."""
    plan, budgets = memory.plan, memory.policy.budgets
    if budgets is None or budgets.head_ceiling == 1:
        return plan.capacity
    pinned = plan.prefix + plan.recent
    least = pinned if budgets.adaptive else plan.limit
    return pinned + plan.most_budget + max(0, plan.capacity - least) + 1


def _check_samples(memory: Memory, saved: SavedSequence, index: int, layer: SavedLayer, shape: LayerShape) -> int:
    """Check how many queries are stored for a layer, and return the bytes that they will take in the memory.

    The stored queries belong to past tokens; the memory's policy uses them as reference queries. A layer has one sample
    (an array of queries) for each part of the reference queries that the policy takes from past tokens. Layers with a
    sliding window have no samples.
    """
    parts = memory.policy.queries.stored if shape.window is None else ()
    _hold(len(layer.samples) == len(parts), f"layer {index} has {len(layer.samples)} samples instead of {len(parts)}")
    for sample, part in zip(layer.samples, parts, strict=True):
        filled = _filled(sample, part, saved.tokens)
        right = sample.filled == filled <= sample.size
        _hold(right, f"layer {index}: {sample.filled} of {sample.size} queries are stored instead of {filled}")
    sizes = (min(sample.size, size) for sample, size in zip(layer.samples, memory.plan.stored, strict=False))
    return sum(sizes) * shape.query_heads * shape.key_dim * memory.shape.itemsize


def _filled(sample: SavedSample, part: Part, tokens: int) -> int:
    return math.ceil(tokens / sample.stride) if part.source == "context" else min(sample.size, tokens)


def _kinds(memory: Memory, index: int, layer: SavedLayer, shape: LayerShape, dtype: torch.dtype) -> dict[str, Kind]:
    _hold(layer.torch_dtype == dtype, f"layer {index} is of {layer.torch_dtype} instead of {dtype}")
    spec = SlotSpec(shape, dtype, memory.device, memory.scored)
    rows = dict(zip(("keys", "values"), spec.row_sizes, strict=True))
    wanted: dict[str, Kind] = {
        f"layer.{index}.head.{head}.{name}": (
            (spec.row_dtype, (length, rows[name])) if name in rows else (_DTYPES[name], (length,))
        )
        for head, length in enumerate(layer.lengths)
        for name in columns(shape.window, scored=memory.scored)
    }
    for at, sample in enumerate(layer.samples):
        wanted[f"layer.{index}.sample.{at}"] = (dtype, (shape.query_heads, sample.filled, shape.key_dim))
    return wanted


def _compare(kinds: Mapping[str, Kind], wanted: Mapping[str, Kind]) -> None:
    _hold(set(kinds) == set(wanted), f"tensors {sorted(set(kinds) ^ set(wanted))[:4]} are missing or too many")
    for name, (dtype, sizes) in wanted.items():
        found = kinds[name]
        _hold(found[1] == sizes, f"{name} has shape {list(found[1])} instead of {list(sizes)}")
        _hold(found[0] == dtype, f"{name} is of {found[0]} instead of {dtype}")


# ---- values


def _check_scales(tensors: Mapping[str, torch.Tensor], name: str, shape: LayerShape) -> None:
    """Refuse quantised keys and values with a scale that is not finite."""
    for part, form in zip(("keys", "values"), shape.formats or (), strict=False):
        scales = form.scales(tensors[f"{name}.{part}"])
        _hold(bool(scales.isfinite().all()), f"{name}.{part} has a scale that is not finite")


def check_values(memory: Memory, saved: SavedSequence, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse values that no memory writes, such as ids beyond the vocabulary, NaN, and positions in a wrong order."""
    words = memory.shape.vocabulary
    _check_range("ids", tensors["ids"], 0, words - 1)
    try:
        torch.Generator().set_state(tensors["generator"])
    except RuntimeError as error:
        raise ValueError(f"its generator's state is none: {error}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(end) for end in tensor.aminmax())  # aminmax passes NaN on and allocates nothing
            _hold(math.isfinite(low) and math.isfinite(high), f"{name} is not finite: from {low} to {high}")
    for index, (layer, shape) in enumerate(zip(saved.layers, memory.shape.layers, strict=True)):
        for head in range(0 if layer is None else shape.kv_heads):
            name = f"layer.{index}.head.{head}"
            if layer is not None and not layer.biased:
                _hold(not tensors[f"{name}.bias"].any(), f"{name}.bias has a β, and layer {index} says it has none")
            if shape.quantised:
                _check_scales(tensors, name, shape)
            if shape.window is None:
                _check_positions(memory, saved, f"{name}.positions", tensors[f"{name}.positions"])


def _check_positions(memory: Memory, saved: SavedSequence, name: str, positions: torch.Tensor) -> None:
    """Refuse positions of one head that are out of place.

    The prefix must hold the first tokens, and the recent window must hold the last ones. The slots of a head begin with
    the front: the prefix and the pinned tokens that were moved to directly behind the prefix. The positions must ascend
    within the front, and also within the slots behind the front. No position may occur twice.
    """
    prefix, stop = min(memory.plan.prefix, saved.tokens), saved.next_position
    recent, front = saved.recent(memory.plan.prefix, memory.plan.recent), saved.front_slots(memory.plan.prefix)
    _check_range(name, positions, 0, stop - 1)
    first = torch.equal(positions[:prefix], torch.arange(prefix, dtype=torch.int32, device=positions.device))
    _hold(first, f"{name} does not begin with the first {prefix} tokens (keep_first), which were compacted or moved")
    last = torch.equal(
        positions[len(positions) - recent :],
        torch.arange(stop - recent, stop, dtype=torch.int32, device=positions.device),
    )
    _hold(last, f"{name} does not end with the last {recent} tokens (keep_recent), which were compacted or moved")
    _hold(len(set(positions.tolist())) == len(positions), f"{name} has one of them twice")
    for part, where in ((positions[:front], "before"), (positions[front:], "behind")):
        _hold(bool((part[1:] > part[:-1]).all()), f"{name} are not in order {where} slot {front}")


def _check_range(name: str, values: torch.Tensor, least: int, most: int) -> None:
    if values.numel():
        low, high = (int(end) for end in values.aminmax())
        _hold(least <= low and high <= most, f"{name} are from {low} to {high}; {least} to {most} are allowed")


def _hold(invariant: bool, broken: str) -> None:  # noqa: FBT001  # reads as a sentence
    if not invariant:
        raise ValueError(broken)
