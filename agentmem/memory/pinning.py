"""Pinning: the slots of pinned tokens move to the front of every store, behind the prefix, where nothing compacts.

Every store says which tokens are promoted in it, and is replaced as a whole by one in which others are: those that are
pinned now and have left the recent window. What was unpinned goes back among the other slots, in the order of their
positions. Attention does not mind the order of slots, so any mixture of stores decodes alike, and a promotion that was
interrupted is finished by the next one.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from agentmem.errors import CapTooSmall, SettingsRefused
from agentmem.memory.pins import Pins, Spans, joined, size, within, without
from agentmem.planning.pricing import MIN_BUDGET

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentmem.memory.memory import Memory
    from agentmem.memory.sequence import TokenSequence
    from agentmem.memory.store import LayerStore

REQUEST_SHARE = 4
"""The newest request may take one part in this many of the slots that a compaction leaves of the segment."""

# ---- what is pinned


def pin(memory: Memory, sequence: TokenSequence, start: int, stop: int, *, coming: int = 0) -> None:
    """Never compact the tokens ``start .. stop`` of a sequence until they are unpinned; those of the prefix never are.

    ``coming`` tokens that the sequence has not read yet may be pinned, too.

    Raises:
        SettingsRefused: some of them have been compacted already, or are not known yet.
        CapTooSmall: with these pins a compaction could no longer reach its target.

    """
    _check_known(sequence, "pin", start, stop, coming)
    if not whole(memory, sequence, ((start, stop),)):
        raise SettingsRefused(
            f"pin: tokens before {sequence.intact} have been compacted, {start}..{stop} begin earlier; pin a text "
            "when it is appended"
        )
    pin_coming(memory, sequence, [(start, stop)])


def unpin(sequence: TokenSequence, start: int, stop: int, *, coming: int = 0) -> None:
    """Let the tokens ``start .. stop`` of a sequence be compacted again; those that are not pinned stay as they are.

    Raises:
        SettingsRefused: some of them are not known yet.

    """
    _check_known(sequence, "unpin", start, stop, coming)
    gone = ((start, stop),)
    sequence.pins = Pins(without(sequence.pins.spans, gone), without(sequence.pins.request, gone))


def _check_known(sequence: TokenSequence, call: str, start: int, stop: int, coming: int) -> None:
    known = sequence.seen + coming
    if not 0 <= start < stop <= known:
        raise SettingsRefused(f"{call}: tokens {start}..{stop} are not among the {known} that row {sequence.index} has")


def whole(memory: Memory, sequence: TokenSequence, spans: Spans) -> bool:
    """Whether every head still has a slot for each of these tokens, as it was appended."""
    behind = [part for low, high in spans for part in within(((memory.plan.prefix, sequence.intact),), low, high)]
    return not any(without(tuple(behind), store.promoted) for _, store in sequence.full())


def pin_coming(memory: Memory, sequence: TokenSequence, spans: Sequence[tuple[int, int]]) -> None:
    """Pin tokens that no compaction has reached, read yet or not.

    Raises:
        CapTooSmall: with these pins a compaction could no longer reach its target; nothing was changed.

    """
    wanted, prefix = joined(sequence.pins.spans, spans), memory.plan.prefix
    pinned = _behind(wanted, prefix)
    needed = prefix + pinned + memory.plan.recent + MIN_BUDGET
    if needed > memory.plan.target and memory.policy.compactor is not None:
        raise CapTooSmall(
            f"pins: {pinned} pinned tokens with keep_first={prefix} and keep_recent={memory.plan.recent} "
            f"need {needed} slots per head, and a compaction leaves {memory.plan.target}; pin less, or raise cap or "
            "target"
        )
    put(memory, sequence, replace(sequence.pins, spans=wanted))


def pin_request(memory: Memory, sequence: TokenSequence, spans: Spans) -> bool:
    """Pin the newest request instead of the one before it, where it fits and is still whole; whether it is pinned.

    It fits where its tokens, those aside that are pinned anyway, take no more than :func:`most_requested`.
    """
    put(memory, sequence, replace(sequence.pins, request=spans if whole(memory, sequence, spans) else ()))
    return sequence.pins.request == spans


def put(memory: Memory, sequence: TokenSequence, pins: Pins) -> None:
    """Have these pins instead, but for a request that does not fit beside the others."""
    fits = request_size(memory, pins) <= most_requested(memory, pins)
    sequence.pins = pins if fits else replace(pins, request=())


def request_size(memory: Memory, pins: Pins) -> int:
    """Tokens of a request that are neither the prefix's nor pinned anyway."""
    return _behind(without(pins.request, pins.spans), memory.plan.prefix)


def most_requested(memory: Memory, pins: Pins) -> int:
    """Tokens that the request may have: a part of what a compaction leaves between prefix, other pins and recent."""
    plan = memory.plan
    return max(0, plan.target - plan.prefix - _behind(pins.spans, plan.prefix) - plan.recent) // REQUEST_SHARE


def _behind(spans: Spans, prefix: int) -> int:
    return size(within(spans, prefix, 1 << 60))


# ---- where their slots are


def promote(memory: Memory, sequence: TokenSequence) -> None:
    """Promote the pins that have left the recent window, and no other tokens; one that was interrupted goes on.

    Each store that is replaced needs a new one beside it, which the plan has counted.
    """
    if sequence.job is not None:
        return  # a compaction that has begun has promoted
    prefix = min(memory.plan.prefix, sequence.seen)
    wanted = within(sequence.pins.all, prefix, sequence.seen - memory.plan.recent)
    for index, store in sequence.full():
        if store.promoted != wanted:
            settle(sequence, store)
            orders = [_order(store, head, prefix, wanted) for head in range(len(store.lengths))]
            sequence.replace(index, store.reordered(orders, wanted))


def _order(store: LayerStore, head: int, prefix: int, wanted: Spans) -> Spans:
    """The slots of a head, in spans, in the order in which the ``wanted`` tokens are promoted and no others."""

    def slots(tokens: Spans) -> Spans:
        return tuple(_slots(store, head, prefix, start, stop) for start, stop in tokens)

    old, front, length = store.promoted, prefix + size(store.promoted), store.lengths[head]
    stay = (part for low, high in wanted for part in within(old, low, high))
    coming = without(wanted, old)
    order, at = [(0, prefix), *slots(tuple(sorted((*stay, *coming))))], front
    moved = slots(coming)
    for place, span in _returning(store, head, front, slots(without(old, wanted))):
        order += [*without(((at, place),), moved), span]
        at = place
    return (*order, *without(((at, length),), moved))


def _slots(store: LayerStore, head: int, prefix: int, start: int, stop: int) -> tuple[int, int]:
    """The slots of tokens of which all or none are promoted; those of none have a slot each."""
    if within(store.promoted, start, stop):
        first = prefix + size(within(store.promoted, 0, start))
    else:
        behind = store.seen - start - size(within(store.promoted, start, store.seen))
        first = store.lengths[head] - behind
    return first, first + stop - start


def _returning(store: LayerStore, head: int, front: int, leaving: Spans) -> Iterator[tuple[int, tuple[int, int]]]:
    """Before which slot from ``front`` on the slots ``leaving`` the front are to stand, so that positions ascend."""
    if leaving:
        positions = store.part(head, 0, 0).positions.tolist()
        for start, stop in leaving:
            places = groupby(range(start, stop), key=lambda slot: bisect_left(positions, positions[slot], front))
            for place, group in places:
                first, *more = group
                yield place, (first, first + 1 + len(more))


def settle(sequence: TokenSequence, store: LayerStore) -> None:
    """Write the positions of what was appended since the last compaction into a store."""
    tail = sequence.tail[:]  # a copy: an array whose buffer some traceback keeps could not grow any more
    store.settle(torch.frombuffer(tail, dtype=torch.int32) if tail else torch.empty(0))
