"""Pinning: move the slots of pinned tokens to the front of each KV head, where compactions leave them alone.

This move is called *promotion*. The slots of promoted tokens directly follow the prefix. A token is promoted when it is
pinned and has left the recent window. The slots of tokens that are no longer pinned move back to the other slots, in
the order of their positions.

A *store* is the object that keeps the slots of one layer. It also records which tokens are promoted. A promotion builds
a new store for each layer with full attention, and puts it in the place of the old store. An interrupt may stop a
promotion after some of the layers. The sequence stays usable, because attention does not depend on the order of slots.
The next promotion finishes the remaining layers.
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
    from agentmem.planning.pricing import Plan

REQUEST_SHARE = 4
"""The newest user request may take ``1 / REQUEST_SHARE`` of the segment slots that a compaction leaves."""

# ---- what is pinned


def pin(memory: Memory, sequence: TokenSequence, start: int, stop: int, *, coming: int = 0) -> None:
    """Pin the tokens ``start .. stop`` of a sequence: they are not compacted until they are unpinned.

    The prefix is never compacted, pinned or not. ``coming`` is the number of tokens that the sequence is about to read;
    the range may include these.

    Raises:
        SettingsRefused: some of the tokens have been compacted, or lie beyond the ``coming`` tokens.
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
    """Unpin the tokens ``start .. stop`` of a sequence; tokens in this range that are not pinned are ignored.

    ``coming`` is the number of tokens that the sequence is about to read; the range may include these.

    Raises:
        SettingsRefused: some of the tokens lie beyond the ``coming`` tokens.

    """
    _check_known(sequence, "unpin", start, stop, coming)
    gone = ((start, stop),)
    sequence.pins = Pins(without(sequence.pins.spans, gone), without(sequence.pins.request, gone))


def _check_known(sequence: TokenSequence, call: str, start: int, stop: int, coming: int) -> None:
    known = sequence.seen + coming
    if not 0 <= start < stop <= known:
        raise SettingsRefused(f"{call}: tokens {start}..{stop} are not among the {known} that row {sequence.index} has")


def whole(memory: Memory, sequence: TokenSequence, spans: Spans) -> bool:
    """Return whether every head still has the original slots of all tokens in ``spans``: none has been compacted."""
    behind = [part for low, high in spans for part in within(((memory.plan.prefix, sequence.intact),), low, high)]
    return not any(without(tuple(behind), store.promoted) for _, store in sequence.full())


def pin_coming(memory: Memory, sequence: TokenSequence, spans: Sequence[tuple[int, int]]) -> None:
    """Pin tokens that the sequence has read or will read; none of them may have been compacted.

    Raises:
        CapTooSmall: with these pins a compaction could no longer reach its target; nothing was changed.

    """
    wanted, prefix = joined(sequence.pins.spans, spans), memory.plan.prefix
    needed = least_target(wanted, memory.plan)
    if needed > memory.plan.target and memory.policy.compactor is not None:
        raise CapTooSmall(
            f"pins: {_behind(wanted, prefix)} pinned tokens with keep_first={prefix} and "
            f"keep_recent={memory.plan.recent} "
            f"need {needed} slots per head, and a compaction leaves {memory.plan.target}; pin less, or raise cap or "
            "target"
        )
    put(memory, sequence, replace(sequence.pins, spans=wanted))


def least_target(spans: Spans, plan: Plan) -> int:
    """Return the least slots per head that a compaction can leave while the tokens ``spans`` are pinned."""
    return plan.prefix + _behind(spans, plan.prefix) + plan.recent + MIN_BUDGET


def pin_request(memory: Memory, sequence: TokenSequence, spans: Spans) -> bool:
    """Unpin the previous user request and pin the newest user request; return whether the newest is pinned now.

    ``spans`` are the tokens of the newest user request: the user's last messages. A request is pinned only if none
    of its tokens has been compacted and it is small enough: :func:`request_size` must be at most
    :func:`most_requested`.
    """
    put(memory, sequence, replace(sequence.pins, request=spans if whole(memory, sequence, spans) else ()))
    return sequence.pins.request == spans


def put(memory: Memory, sequence: TokenSequence, pins: Pins) -> None:
    """Replace the pins of a sequence by ``pins``, but do not pin a user request that is too large.

    ``pins.request`` has the tokens of the newest user request: the user's last messages. These tokens are not pinned if
    :func:`request_size` is greater than :func:`most_requested`.
    """
    fits = request_size(memory, pins) <= most_requested(memory, pins)
    sequence.pins = pins if fits else replace(pins, request=())


def request_size(memory: Memory, pins: Pins) -> int:
    """Return how many tokens the newest user request would pin in addition to the prefix and the other pins.

    These are the tokens of ``pins.request`` that are neither in the prefix nor in ``pins.spans``.
    """
    return _behind(without(pins.request, pins.spans), memory.plan.prefix)


def most_requested(memory: Memory, pins: Pins) -> int:
    """Return the most tokens that the newest user request may have in order to be pinned.

    Tokens of the prefix and of the other pins (``pins.spans``) are not counted; see :func:`request_size`. A compaction
    leaves ``target`` slots per head. The slots of the prefix, of the other pins and of the recent window are subtracted
    from ``target``, and the difference is divided by ``REQUEST_SHARE``.
    """
    plan = memory.plan
    return max(0, plan.target - plan.prefix - _behind(pins.spans, plan.prefix) - plan.recent) // REQUEST_SHARE


def _behind(spans: Spans, prefix: int) -> int:
    return size(within(spans, prefix, 1 << 60))


# ---- the slots of pinned tokens


def promote(memory: Memory, sequence: TokenSequence) -> None:
    """Move the slots of pinned tokens to the front of each head, where compactions leave them alone.

    Only slots of tokens that have left the recent window are moved. These slots then directly follow the prefix in each
    head, and their tokens are called *promoted*. Slots of tokens that are no longer pinned move back to the other
    slots. Layers with a sliding window are not changed. Nothing is done while a compaction is unfinished.

    The object that keeps a layer's slots is its *store*. If the order of the slots must change, a new store replaces
    the layer's old store. For a short time both exist; the plan has counted the bytes of both.
    """
    if sequence.job is not None:
        return  # a compaction promotes before it begins
    prefix = min(memory.plan.prefix, sequence.seen)
    wanted = within(sequence.pins.all, prefix, sequence.seen - memory.plan.recent)
    for index, store in sequence.full():
        if store.promoted != wanted:
            settle(sequence, store)
            orders = [_order(store, head, prefix, wanted) for head in range(len(store.lengths))]
            sequence.replace(index, store.reordered(orders, wanted))


def _order(store: LayerStore, head: int, prefix: int, wanted: Spans) -> Spans:
    """Return a new order of a head's slots, as a sequence of spans of their present indices.

    First come the slots of the prefix, then the slots of the ``wanted`` tokens, which are pinned. All other slots
    follow, in the order of their positions.
    """

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
    """Return the span of a head's slots that hold the tokens ``start .. stop``.

    The caller makes sure that one of two cases holds. In the first case, the slots of all these tokens were moved to
    the front of the head, after the prefix, because the tokens were pinned. In the second case, no such slot was moved,
    and none of the tokens has been compacted.
    """
    if within(store.promoted, start, stop):
        first = prefix + size(within(store.promoted, 0, start))
    else:
        behind = store.seen - start - size(within(store.promoted, start, store.seen))
        first = store.lengths[head] - behind
    return first, first + stop - start


def _returning(store: LayerStore, head: int, front: int, leaving: Spans) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield where to insert the slots that leave the front, so that the positions after the front stay ascending.

    The first ``front`` slots of a head are its *front*. They hold the prefix, and tokens whose slots were moved there
    because the tokens were pinned. ``leaving`` has the spans of the slots that leave the front. Each yielded pair is a
    destination and a source. The source is a span of slots in ``leaving``. The destination is an index of at least
    ``front``: the source must be inserted before the slot that has this index now, or at the end of the head if there
    is no such slot.
    """
    if leaving:
        positions = store.part(head, 0, 0).positions.tolist()
        for start, stop in leaving:
            places = groupby(range(start, stop), key=lambda slot: bisect_left(positions, positions[slot], front))
            for place, group in places:
                first, *more = group
                yield place, (first, first + 1 + len(more))


def settle(sequence: TokenSequence, store: LayerStore) -> None:
    """Write into ``store`` the positions of the slots that were appended since the last compaction.

    ``store`` keeps the slots of one layer. Before this call, it lacks these positions; only the sequence has them, in
    :attr:`TokenSequence.tail`.
    """
    tail = sequence.tail[:]  # a copy: a traceback may keep the tensor, and the array must grow without it
    store.settle(torch.frombuffer(tail, dtype=torch.int32) if tail else torch.empty(0))
