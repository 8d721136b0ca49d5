"""Pins: tokens of one sequence, besides its prefix, that are not compacted until they are unpinned.

A compaction first *promotes* the pinned tokens that have left the recent window: it moves their slots to the front of
every store, directly after the prefix, so that the segment stays contiguous. After tokens are unpinned, their slots
stay at the front until the next compaction moves them back; see :mod:`agentmem.memory.pinning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Spans = tuple[tuple[int, int], ...]
"""Spans ``(start, stop)`` in ascending order; no span is empty, and no two spans touch or overlap."""


def joined(*groups: Iterable[tuple[int, int]]) -> Spans:
    """Return the union of all spans of all groups; spans that touch or overlap are merged."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(span for group in groups for span in group):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        elif low < high:
            merged.append((low, high))
    return tuple(merged)


def within(spans: Spans, start: int, stop: int) -> Spans:
    """Return the parts of ``spans`` that lie inside ``start .. stop``."""
    cut = ((max(low, start), min(high, stop)) for low, high in spans)
    return tuple((low, high) for low, high in cut if low < high)


def without(spans: Spans, others: Spans) -> Spans:
    """Return the parts of ``spans`` that lie outside all spans of ``others``."""
    left: list[tuple[int, int]] = []
    for low, high in spans:
        start = low
        for gone, back in within(others, low, high):
            left.append((start, gone))
            start = back
        left.append((start, high))
    return tuple((low, high) for low, high in left if low < high)


def size(spans: Spans) -> int:
    """Return the number of tokens in the spans."""
    return sum(high - low for low, high in spans)


@dataclass(frozen=True, slots=True)
class Pins:
    """The pinned tokens of a sequence. The object is immutable and is replaced as a whole."""

    spans: Spans = ()
    """Tokens that a caller or a setting has pinned; they stay pinned until they are unpinned."""
    request: Spans = ()
    """The tokens of the newest user request, pinned until it is answered, and only if they leave enough room."""

    @property
    def all(self) -> Spans:
        """All tokens that are pinned now."""
        return joined(self.spans, self.request)

    def holds(self, start: int, stop: int) -> bool:
        """Return whether ``start .. stop`` is not empty and all of its tokens are in :attr:`spans`."""
        return start < stop and not without(((start, stop),), self.spans)

    def count(self, start: int, stop: int) -> int:
        """Return the number of pinned tokens inside ``start .. stop``."""
        return size(within(self.all, start, stop))
