"""Pins: tokens of one row that are never compacted, beside its prefix.

At the next compaction after they left the recent window their slots are *promoted*: moved to the front of every
store, behind the prefix, so that the segment stays one run. Attention does not mind the order of slots, and what is
promoted is older than the rest of the segment or becomes so.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Pins:
    """Spans ``start .. stop`` of tokens, ascending and apart; those before ``until`` are promoted."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    until: int = 0
    """Pinned tokens before this one have been promoted in every layer."""

    def add(self, start: int, stop: int) -> None:
        """Pin ``start .. stop``; spans that touch become one."""
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self.spans, (start, stop)]):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            elif low < high:
                merged.append((low, high))
        self.spans = merged

    def within(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of the spans inside ``start .. stop``."""
        cut = ((max(low, start), min(high, stop)) for low, high in self.spans)
        return [(low, high) for low, high in cut if low < high]

    def count(self, start: int, stop: int) -> int:
        """Pinned tokens inside ``start .. stop``."""
        return sum(high - low for low, high in self.within(start, stop))

    def copy(self) -> Pins:
        """Another one with the same spans."""
        return Pins(list(self.spans), self.until)
