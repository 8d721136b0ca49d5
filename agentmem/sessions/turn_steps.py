"""The driver of a turn, which runs the turn step by step under the model's lock and ends it in every case."""

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
    """The driver of one turn of a session that has its lease.

    :meth:`close` must be called before the runtime ends the turn.
    """

    def __init__(self, session: Conversation, steps: turn.Steps, deadline: float | None) -> None:
        """Prepare to run ``steps`` without running any; ``deadline`` is a time on the monotonic clock."""
        self._session, self._steps = session, steps
        self.over = False
        self.want: Want | None = None
        """The ids that must be fed before the turn can go on; ``None`` if it can go on now."""
        self._error: Exception | None = None
        session.watch, session.leave = Watch(deadline), self.close
        session.memory.boundary = session.watch.check
        session.runtime.scheduler.expect(session)

    def tick(self) -> Event | None:
        """Run the turn up to its next event and return this event; at most one compaction runs on the way.

        Return ``None`` if ids must be fed first (see :attr:`want`) or if the turn is :attr:`over`.
        """
        with self._session.runtime.scheduler.lock, own_frame():
            try:
                step = next(self._steps)
            except StopIteration:
                self.over, self.want = True, None
                return None
        self.want = step if isinstance(step, Want) else None
        return None if isinstance(step, Want) else step

    def step(self) -> Event | None:
        """Run the turn, including its forwards, up to its next event and return this event.

        Return ``None`` if the turn is over.
        """
        while not self.over:
            event = self.tick()
            if event is not None:
                return event
            if self.want is not None:
                self._session.runtime.scheduler.serve(self.want)
        return None

    def events(self) -> list[Event]:
        """Run the turn up to its next forward or compaction and return the events on the way.

        If an error occurs after some of these events, they are returned and the next call raises the error.
        """
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
            if isinstance(event, CompactionStarted):  # the consumer must see it before the compaction is over
                break
        return found

    def cancel(self) -> None:
        """Make the turn end at the next point where it can stop; any thread may call this."""
        self._session.watch.cancelled = True

    def close(self) -> None:
        """End the turn at its present step; if a forward is feeding the turn, wait for the end of this forward first.

        Closing twice does nothing.
        """
        scheduler = self._session.runtime.scheduler
        with scheduler.lock, own_frame():
            if self.want is not None:
                scheduler.withdraw(self.want)
            self._steps.close()
        scheduler.left(self._session)
