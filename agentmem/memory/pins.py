"""Pins: tokens of one sequence that are never compacted, beside its prefix, until they are unpinned.

At the next compaction after they left the recent window their slots are *promoted*: moved to the front of every
store, behind the prefix, so that the segment stays one run. What is unpinned stands there until the next compaction,
which first moves it back among the others; see :mod:`agentmem.memory.pinning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Spans = tuple[tuple[int, int], ...]
"""Spans ``start .. stop``, ascending and apart: no two touch, none is empty."""


def joined(*groups: Iterable[tuple[int, int]]) -> Spans:
    """All that is in some span of some group; spans that touch become one."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(span for group in groups for span in group):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        elif low < high:
            merged.append((low, high))
    return tuple(merged)


def within(spans: Spans, start: int, stop: int) -> Spans:
    """The parts of the spans inside ``start .. stop``."""
    cut = ((max(low, start), min(high, stop)) for low, high in spans)
    return tuple((low, high) for low, high in cut if low < high)


def without(spans: Spans, others: Spans) -> Spans:
    """What is in ``spans`` and not in ``others``."""
    left: list[tuple[int, int]] = []
    for low, high in spans:
        start = low
        for gone, back in within(others, low, high):
            left.append((start, gone))
            start = back
        left.append((start, high))
    return tuple((low, high) for low, high in left if low < high)


def size(spans: Spans) -> int:
    """Tokens in the spans."""
    return sum(high - low for low, high in spans)


@dataclass(frozen=True, slots=True)
class Pins:
    """What is pinned of a sequence; it is replaced as a whole."""

    spans: Spans = ()
    """Tokens that a caller or a setting has pinned, until they are unpinned."""
    request: Spans = ()
    """The newest request, pinned until it is answered, and only as long as it leaves room for the rest."""

    @property
    def all(self) -> Spans:
        """Everything that is pinned now."""
        return joined(self.spans, self.request)

    def holds(self, start: int, stop: int) -> bool:
        """Whether all of ``start .. stop`` is pinned until it is unpinned, and there is something in it."""
        return start < stop and not without(((start, stop),), self.spans)

    def count(self, start: int, stop: int) -> int:
        """Pinned tokens inside ``start .. stop``."""
        return size(within(self.all, start, stop))
