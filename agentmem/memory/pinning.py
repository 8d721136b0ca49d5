"""Pinning: the slots of pinned tokens move to the front of every store, behind the prefix, where nothing compacts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from agentmem.errors import CapTooSmall, SettingsRefused
from agentmem.planning.pricing import MIN_BUDGET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.memory.memory import Memory
    from agentmem.memory.sequence import Row
    from agentmem.memory.store import LayerStore


def pin(memory: Memory, row: Row, start: int, stop: int, *, coming: int = 0) -> None:
    """Never compact the tokens ``start .. stop`` of a row again; those of the prefix are pinned anyway.

    ``coming`` tokens that the row has not read yet may be pinned, too.

    Raises:
        SettingsRefused: some of them have been compacted already, or are not known yet.
        CapTooSmall: with these pins a compaction could no longer reach its target.

    """
    known = row.seen + coming
    if not 0 <= start < stop <= known:
        raise SettingsRefused(f"pin: tokens {start}..{stop} are not among the {known} that row {row.index} has")
    gone = (max(start, memory.plan.prefix), min(stop, row.intact))
    if gone[0] < gone[1] and row.pins.count(*gone) < gone[1] - gone[0]:
        raise SettingsRefused(
            f"pin: tokens before {row.intact} have been compacted, {start}..{stop} begin earlier; pin a text "
            "when it is appended"
        )
    pin_coming(memory, row, [(start, stop)])


def pin_coming(memory: Memory, row: Row, spans: Sequence[tuple[int, int]]) -> None:
    """Pin tokens that no compaction has reached, read yet or not.

    Raises:
        CapTooSmall: with these pins a compaction could no longer reach its target; nothing was changed.

    """
    wanted, prefix = row.pins.copy(), memory.plan.prefix
    for start, stop in spans:
        wanted.add(start, stop)
    pinned = wanted.count(prefix, 1 << 60)
    needed = prefix + pinned + memory.plan.recent + MIN_BUDGET
    if needed > memory.plan.target and memory.policy.compactor is not None:
        raise CapTooSmall(
            f"pins: {pinned} pinned tokens with keep_first={prefix} and keep_recent={memory.plan.recent} "
            f"need {needed} slots per head, and a compaction leaves {memory.plan.target}; pin less, or raise cap or "
            "target"
        )
    row.pins = wanted


def promote(memory: Memory, row: Row) -> None:
    """Promote the pins that have left the recent window; one that was interrupted goes on.

    Every store is replaced as a whole, and attention does not mind the order of slots, so all states decode alike.
    """
    if row.job is not None:
        return  # a compaction that has begun has promoted
    prefix = min(memory.plan.prefix, row.seen)
    stop = row.promoting or max(row.pins.until, row.seen - memory.plan.recent)
    spans = row.pins.within(max(prefix, row.pins.until), stop)
    if spans:
        row.promoting = stop
        _promote(memory, row, spans, row.front(prefix))
    row.pins.until = stop
    row.promoting = None


def _promote(memory: Memory, row: Row, spans: list[tuple[int, int]], front: int) -> None:
    prefix = min(memory.plan.prefix, row.seen)
    backs = [(row.behind(start, prefix), row.behind(stop, prefix)) for start, stop in spans]
    wanted = front - prefix + sum(stop - start for start, stop in spans)
    for index, store in row.full():
        if store.promoted == wanted:
            continue
        settle(row, store)
        row.replace(index, store.reordered(front, backs))


def settle(row: Row, store: LayerStore) -> None:
    """Write the positions of what was appended since the last compaction into a store."""
    tail = row.tail[:]  # a copy: an array whose buffer some traceback keeps could not grow any more
    store.settle(torch.frombuffer(tail, dtype=torch.int32) if tail else torch.empty(0))
