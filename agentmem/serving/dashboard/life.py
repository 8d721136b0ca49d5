"""The life of one conversation's memory in numbers: how many slots it had after how many tokens."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentmem.serving.pieces import compactions

if TYPE_CHECKING:
    from agentmem import CompactionReport, Session

KEPT = 100
"""Compactions that are kept, the newest."""


@dataclass(slots=True)
class Life:
    """What is known of a memory. Its session's threads tell of compactions, the event loop's looks and reads."""

    compactions: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))
    """As responses have them, with ``at``, in seconds since 1970."""
    state: str = "kept"
    """Of its session; ``kept``: what an earlier server kept, which was not used since."""
    policy: str = ""
    tokens: int = 0
    slots: float = 0.0
    """Of a head, on average."""
    capacity: int = 0
    """Slots of a head when the memory is full."""
    total: int = 0
    """Compactions of the memory, those of earlier servers too."""
    heads: int = 0
    """KV heads of all layers together."""
    began: tuple[int, float] | None = None
    """Tokens and slots when it was looked at first; ``None`` before that."""

    def compacted(self, report: CompactionReport) -> None:
        """A compaction ended; from any thread."""
        self.compactions.extend(each | {"at": round(time.time(), 3)} for each in compactions([report]))

    def look(self, session: Session | None) -> None:
        """Take note of a session as it is now. One on disk has what it had when it was moved there."""
        if session is None:
            return
        stats, memory, whole = session.stats, session.holding.memory, session.holding.quiet
        self.state, self.policy, self.total = stats.state, stats.policy, stats.compactions
        self.capacity = stats.capacity
        if memory is not None and stats.state != "on disk":
            self.heads = sum(layer.kv_heads for layer in memory.shape.layers)
            if whole or self.began is None:  # while it is being compacted some layers have their new slots
                self.tokens, self.slots = stats.tokens - stats.pending, stats.held_slots / self.heads
            self.began = self.began or ((0, 0.0) if self.total == len(self.compactions) else (self.tokens, self.slots))

    def saw_tooth(self) -> list[tuple[int, float]]:
        """Tokens, and slots of a head after them, at each point where the line has a corner; the newest last."""
        known = list(self.compactions)
        points = [] if self.began is None or len(known) == KEPT else [self.began]
        for each in known if self.heads else ():
            points += [(each["tokens_seen"], round(each[when] / self.heads, 2)) for when in _CORNERS]
        if self.began is not None and (not points or points[-1][0] <= self.tokens):
            points.append((self.tokens, round(self.slots, 2)))
        return points


_CORNERS = ("slots_before", "slots_after")
