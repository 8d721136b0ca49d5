"""A turn from outside: one step at a time, under the model's lock, and an end that is always orderly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.engine import Want
from agentmem.hf.forward_context import own_frame
from agentmem.sessions.conversation import Watch
from agentmem.sessions.events import CompactionStarted

if TYPE_CHECKING:
    from agentmem.sessions import turn
    from agentmem.sessions.conversation import Conversation
    from agentmem.sessions.events import Event


class Steps:
    """The events of one turn of an admitted session. :meth:`close` must be called before the turn is ended."""

    def __init__(self, session: Conversation, steps: turn.Steps, deadline: float | None) -> None:
        """Nothing is run yet; ``deadline`` is on the monotonic clock."""
        self._session, self._steps = session, steps
        self.over = False
        self.want: Want | None = None
        """What must be fed before the turn can go on."""
        self._error: Exception | None = None
        session.watch = Watch(deadline)
        session.memory.boundary = session.watch.check
        session.runtime.scheduler.expect(session)

    def tick(self) -> Event | None:
        """At most one event or compaction; ``None`` if there is a :attr:`want`, or when the turn is :attr:`over`."""
        with self._session.runtime.scheduler.lock, own_frame():
            try:
                step = next(self._steps)
            except StopIteration:
                self.over, self.want = True, None
                return None
        self.want = step if isinstance(step, Want) else None
        return None if isinstance(step, Want) else step

    def step(self) -> Event | None:
        """The next event, with the forwards that it takes; ``None`` when the turn is over."""
        while not self.over:
            event = self.tick()
            if event is not None:
                return event
            if self.want is not None:
                self._session.runtime.scheduler.serve(self.want)
        return None

    def events(self) -> list[Event]:
        """The events up to the next forward or compaction; what ended them is raised when they have been returned."""
        found: list[Event] = []
        if self._error is not None:
            raise self._error
        while not self.over:
            try:
                event = self.tick()
            except Exception as error:
                if not found:
                    raise
                self._error = error
                break
            if event is None:
                break
            found.append(event)
            if isinstance(event, CompactionStarted):  # to be seen before the compaction is over
                break
        return found

    def cancel(self) -> None:
        """End the turn at the next boundary; safe from any thread."""
        self._session.watch.cancelled = True

    def close(self) -> None:
        """End the turn where it is, once a forward that feeds it is over; closing twice does nothing."""
        scheduler = self._session.runtime.scheduler
        with scheduler.lock, own_frame():
            if self.want is not None:
                scheduler.withdraw(self.want)
            self._steps.close()
        scheduler.left(self._session)
