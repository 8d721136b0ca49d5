"""The history of one conversation's memory in numbers: its slots as a function of the tokens read and written."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentmem.serving.pieces import compactions

if TYPE_CHECKING:
    from agentmem import CompactionReport, Session

KEPT = 100
"""Number of newest compactions that are kept."""


@dataclass(slots=True)
class Life:
    """Numbers on one memory.

    Threads of the session call :meth:`compacted`; only the event loop's thread calls the other methods.
    """

    compactions: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))
    """The newest compactions in the format of answers, each with its time ``at`` in seconds since 1970."""
    state: str = "kept"
    """State of the session; ``kept`` while there is no session, for example after a restart of the server."""
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
    """Tokens and slots per head at the start of the line that is drawn; ``None`` before the first :meth:`look`."""

    def compacted(self, report: CompactionReport) -> None:
        """Add a compaction that ended; may be called from any thread."""
        self.compactions.extend(each | {"at": round(time.time(), 3)} for each in compactions([report]))

    def look(self, session: Session | None) -> None:
        """Update the numbers from a session. If it is on disk, tokens and slots stay as they were before."""
        if session is None:
            return
        stats, memory, whole = session.stats, session.holding.memory, session.holding.quiet
        self.state, self.policy, self.total = stats.state, stats.policy, stats.compactions
        self.capacity = stats.capacity
        if memory is not None and stats.state != "on disk":
            self.heads = sum(layer.kv_heads for layer in memory.shape.layers)
            if whole or self.began is None:  # during a compaction only some layers have their new slots
                self.tokens, self.slots = stats.tokens - stats.pending, stats.held_slots / self.heads
            self.began = self.began or ((0, 0.0) if self.total == len(self.compactions) else (self.tokens, self.slots))

    def saw_tooth(self) -> list[tuple[int, float]]:
        """Return the corners of the line of slots per head over tokens, as (tokens, slots) with the newest last."""
        known = list(self.compactions)
        points = [] if self.began is None or len(known) == KEPT else [self.began]
        for each in known if self.heads else ():
            points += [(each["tokens_seen"], round(each[when] / self.heads, 2)) for when in _CORNERS]
        if self.began is not None and (not points or points[-1][0] <= self.tokens):
            points.append((self.tokens, round(self.slots, 2)))
        return points


_CORNERS = ("slots_before", "slots_after")
