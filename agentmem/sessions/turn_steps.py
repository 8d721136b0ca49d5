"""A turn from outside: one event at a time, under the runtime's lock, and an end that is always orderly."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from agentmem.hf.forward_context import own_frame
from agentmem.sessions.conversation import Watch

if TYPE_CHECKING:
    from agentmem.sessions.conversation import Conversation
    from agentmem.sessions.events import Event


class Steps:
    """The events of one turn of an admitted session. :meth:`close` must be called before the turn is ended."""

    def __init__(
        self, session: Conversation, events: Generator[Event | None, None, None], deadline: float | None
    ) -> None:
        """Nothing is run yet; ``deadline`` is on the monotonic clock."""
        self._session, self._events = session, events
        self.over = False
        session.watch = Watch(deadline)
        session.memory.boundary = session.watch.check

    def tick(self) -> Event | None:
        """At most one forward or one compaction; ``None`` if there was no event, or when the turn is :attr:`over`."""
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
        """End the events where they are; closing twice does nothing."""
        with self._session.runtime.lock, own_frame():
            self._events.close()
