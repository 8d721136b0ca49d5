"""The history of one conversation's memory: how its number of slots changed while tokens were read and written."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentmem.serving.pieces import compactions

if TYPE_CHECKING:
    from agentmem import CompactionReport, Session

KEPT = 100
"""Number of compactions that a history keeps: the newest ones."""


@dataclass(slots=True)
class Life:
    """History of one conversation's memory: its compactions, and its latest numbers of tokens and slots.

    The session's threads call :meth:`compacted`; only the event loop's thread calls the other methods.
    """

    compactions: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))
    """The newest compactions as JSON objects; ``at`` is the time of the compaction, in seconds since 1970."""
    state: str = "kept"
    """State of the session; ``kept`` before the session is opened, for example after a restart of the server."""
    policy: str = ""
    tokens: int = 0
    slots: float = 0.0
    """Slots of one KV head, on average."""
    capacity: int = 0
    """Slots of one KV head when the memory is full."""
    total: int = 0
    """Number of all compactions of the memory, including those in earlier servers."""
    heads: int = 0
    """Number of KV heads, summed over all layers."""
    began: tuple[int, float] | None = None
    """First point of the line of :meth:`saw_tooth`; ``None`` before the first :meth:`look`."""

    def compacted(self, report: CompactionReport) -> None:
        """Add a compaction that has ended; this method may be called from any thread."""
        self.compactions.extend(each | {"at": round(time.time(), 3)} for each in compactions([report]))

    def look(self, session: Session | None) -> None:
        """Update the numbers from a session; while the session is on disk, tokens and slots stay unchanged."""
        if session is None:
            return
        stats, memory, whole = session.stats, session.holding.memory, session.holding.quiet
        self.state, self.policy, self.total = stats.state, stats.policy, stats.compactions
        self.capacity = stats.capacity
        if memory is not None and stats.state != "on disk":
            self.heads = sum(layer.kv_heads for layer in memory.shape.layers)
            if whole or self.began is None:  # during a compaction only some layers have their new slots
                self.tokens, self.slots = stats.tokens - stats.pending, stats.total_slots / self.heads
            self.began = self.began or ((0, 0.0) if self.total == len(self.compactions) else (self.tokens, self.slots))

    def saw_tooth(self) -> list[tuple[int, float]]:
        """Return the points of a line that shows the slots per head over the tokens, the newest point last.

        Each point is (tokens, slots). A compaction adds two points: one before it and one after it.
        """
        known = list(self.compactions)
        points = [] if self.began is None or len(known) == KEPT else [self.began]
        for each in known if self.heads else ():
            points += [(each["tokens_seen"], round(each[when] / self.heads, 2)) for when in _CORNERS]
        if self.began is not None and (not points or points[-1][0] <= self.tokens):
            points.append((self.tokens, round(self.slots, 2)))
        return points


_CORNERS = ("slots_before", "slots_after")
