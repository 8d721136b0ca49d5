"""A turn from outside: one event at a time, under the runtime's lock, and an end that is always orderly."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from agentmem.hf.forward_context import own_frame
from agentmem.sessions.turn import Watch

if TYPE_CHECKING:
    from agentmem.sessions.events import Event
    from agentmem.sessions.conversation import Conversation


class Steps:
    """The events of one turn of an admitted session. :meth:`close` must be called, whatever happens."""

    def __init__(
        self, session: Conversation, events: Generator[Event | None, None, None], deadline: float | None
    ) -> None:
        """Nothing is run yet; ``deadline`` is on the monotonic clock."""
        self._session, self._events = session, events
        self._open, self.over = True, False
        self.holds = True
        """Whether the session is still in this turn."""
        session.watch = Watch(deadline)
        session.memory.boundary = session.watch.check

    def tick(self) -> Event | None:
        """At most one forward or one compaction; ``None`` if it told nothing, or when the turn is :attr:`over`."""
        with self._session.runtime.lock, own_frame():
            try:
                return next(self._events)
            except StopIteration:
                self.over = True
                return None

    def step(self) -> Event | None:
        """The next event; ``None`` when the turn is over. Other turns may have theirs between two forwards."""
        event = None
        while event is None and not self.over:
            event = self.tick()
        return event

    def cancel(self) -> None:
        """End the turn at the next boundary; safe from any thread."""
        self._session.watch.cancelled = True

    def close(self) -> None:
        """End the turn where it is and make the session idle; closing twice does nothing."""
        with self._session.runtime.lock, own_frame():
            if self._open:
                self._open = False
                try:
                    self._events.close()
                finally:
                    self._session.runtime.leave(self._session)
                    self.holds = False
