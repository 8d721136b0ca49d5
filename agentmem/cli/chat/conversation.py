"""The conversation of ``agentmem chat``: its sessions (branches and loaded sessions), and turns in the current one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from agentmem.cli.console import note
from agentmem.cli.display import Display
from agentmem.cli.printable import printable
from agentmem.sessions import CompactionFinished, Message, Rebased, TextEvent, TokenEvent, TurnFinished
from agentmem.settings import format_bytes

if TYPE_CHECKING:
    from agentmem.sessions import Event, Runtime, Session

_BAR, _LEAST_BAR, _COLUMNS = 20, 3, 80


class Conversation:
    """The sessions of a chat by name, and the current session. ``options`` are passed to ``generate``."""

    def __init__(self, runtime: Runtime, session: Session, options: dict[str, Any]) -> None:
        """Begin with ``session`` as the current session."""
        self.runtime, self.options = runtime, options
        self.sessions = {session.name: session}
        self.session = session

    @property
    def prompt(self) -> str:
        """The input prompt; it shows the current session's name if there are several sessions."""
        return "you> " if len(self.sessions) == 1 else printable(f"{self.session.name}> ")

    def enter(self, session: Session) -> None:
        """Make ``session`` the current session, and add it if it is new."""
        self.sessions[session.name] = self.session = session

    def free_name(self, wanted: str) -> str:
        """Return ``wanted``, with a number appended if a session has this name already."""
        name, number = wanted, 2
        while name in self.sessions:
            name, number = f"{wanted}-{number}", number + 1
        return name

    def turn(self, text: str) -> None:
        """Append the user's message, stream the reply, then show the state of the memory.

        The first Ctrl-C ends the reply as soon as the running forward pass has finished. If a compaction is running,
        the reply ends as soon as the current layer is compacted. A second Ctrl-C ends the reply at once.

        Raises:
            AgentmemError: the turn could not begin or continue; the session stays valid.

        """
        session, started = self.session, time.perf_counter()
        display = Display(
            streaming=True,
            cap_bytes=session.holding.lease,
            max_new_tokens=self.options["max_new_tokens"],
        )
        display.compactions = session.stats.compactions
        ended: TurnFinished | None = None
        try:
            with stopping(session) as stop, display:
                ended = self._follow(session.appending([Message(role="user", content=text)]), display, stop)
                if stop.wanted:
                    ended = None
                    session.say("")  # an empty reply, so that the roles go on alternating
                else:
                    started = time.perf_counter()
                    ended = self._follow(session.stream(**self.options), display, stop)
        except KeyboardInterrupt:
            ended = None
        note(self.bar(*_ending(ended, time.perf_counter() - started)))
        if ended is not None and ended.reason == "length":
            note("the reply was cut by --max-new-tokens; give more, or ask it to go on")

    def _follow(self, events: Generator[Event, None, None], display: Display, stop: Stop) -> TurnFinished | None:
        """Show events as they come; return the event that finished the turn, or ``None`` if the turn did not finish."""
        finished: TurnFinished | None = None
        with closing(events):  # ends the turn, whatever happens
            for event in events:
                stop.pass_on()
                if isinstance(event, TextEvent):
                    display.text(event.text)
                elif isinstance(event, TokenEvent):
                    display.token()
                    display.event(self.session.memory.usage())
                elif isinstance(event, CompactionFinished | Rebased):
                    display.event(event.report)
                elif isinstance(event, TurnFinished):
                    finished = event
        return finished

    def bar(self, *ending: str) -> str:
        """Return the state of the memory in one line that fits a terminal of 80 columns; ``ending`` stands at its end.

        Where there is too little room the bar is shorter, and the first part of the ending is left out.
        """
        stats = self.session.stats
        used = self.session.memory.usage().used_bytes
        parts = [
            f"{format_bytes(used)} of {format_bytes(stats.lease_bytes)}",
            f"{stats.capacity - stats.room}/{stats.capacity} slots",
            f"{stats.compactions} compaction{'' if stats.compactions == 1 else 's'}",
        ]
        line = " · ".join(filter(None, [*parts, *ending]))
        if len(line) > _COLUMNS - _LEAST_BAR and ending:
            line = " · ".join(filter(None, [*parts, *ending[1:]]))
        width = max(_LEAST_BAR, min(_BAR, _COLUMNS - 1 - len(line)))
        filled = min(width, round(width * used / stats.lease_bytes))
        return f"{'━' * filled}{'╌' * (width - filled)} {line}"


def _ending(ended: TurnFinished | None, seconds: float) -> list[str]:
    """Return the end of the line about a turn: its speed, its tokens, and whether Ctrl-C stopped it."""
    parts = []
    if ended is not None and ended.tokens:
        parts += [f"{ended.tokens / max(1e-3, seconds):.1f} tokens/s", f"{ended.tokens} tokens"]
    if ended is None or ended.reason == "cancelled":
        parts = [*parts[-1:], "stopped"] if parts else ["", "stopped"]
    return parts


class Stop:
    """Handler of Ctrl-C during a turn of a session."""

    def __init__(self, session: Session) -> None:
        """Begin with ``wanted`` false: no stop was requested yet."""
        self._session = session
        self.wanted = False

    def pass_on(self) -> None:
        """Cancel the running turn if a stop was requested.

        A Ctrl-C before the turn has begun does not reach the turn. Therefore, call this method also at every event of
        the turn.
        """
        if self.wanted:
            self._session.watch.cancelled = True

    def signalled(self, _number: int, _frame: object) -> None:
        """Handle SIGINT: ask the turn to stop, or raise KeyboardInterrupt if this is the second signal."""
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        self.pass_on()


@contextmanager
def stopping(session: Session) -> Iterator[Stop]:
    """Handle Ctrl-C while the block runs: the first ends the turn soon, the second at once.

    After the first Ctrl-C, the running forward pass, or the running layer of a compaction, is still finished. Outside
    the main thread, signals are not handled.
    """
    stop = Stop(session)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, stop.signalled)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
