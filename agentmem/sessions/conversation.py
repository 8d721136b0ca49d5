"""The state of one conversation: its ids, messages, open reply and memory. Turns change this state."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from agentmem.engine import Want
from agentmem.errors import MemoryClosed
from agentmem.sessions.chat.dialogue import Dialogue
from agentmem.sessions.transcript import Entry

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, MutableSequence, Sequence
    from contextlib import AbstractContextManager
    from itertools import count
    from pathlib import Path
    from weakref import WeakKeyDictionary

    from agentmem.engine import Engine, Scheduler
    from agentmem.hf import CappedCache
    from agentmem.memory.memory import Memory
    from agentmem.memory.pins import Pins
    from agentmem.memory.sequence import TokenSequence
    from agentmem.reporting.report import CompactionReport, RebaseReport
    from agentmem.sessions.chat.template import ChatTemplate
    from agentmem.sessions.events import Reason
    from agentmem.sessions.hook_calls import HookCalls
    from agentmem.sessions.leasing.admission import Leases
    from agentmem.sessions.leasing.holding import Holding
    from agentmem.sessions.settings import SessionSettings
    from agentmem.sessions.snapshots.snapshot import Identity

T = TypeVar("T")


class Interrupted(BaseException):
    """Exception that ends a turn early because it was cancelled or its deadline has passed.

    The exception is raised between two steps of the turn. Since it is not an error, it derives from BaseException:
    code that catches the errors of a policy lets it pass.
    """

    def __init__(self, reason: Reason) -> None:
        """Store the reason, which is ``cancelled`` or ``deadline``."""
        super().__init__(reason)
        self.reason: Reason = reason


@dataclass(slots=True)
class Watch:
    """The deadline and the cancellation of a turn, which are checked between its steps."""

    deadline: float | None = None
    """Time on the monotonic clock at which the turn ends."""
    cancelled: bool = False

    def check(self) -> None:
        """Check whether the turn may go on.

        Raises:
            Interrupted: the turn was cancelled or its deadline has passed; the exception has the reason.

        """
        if self.cancelled:
            raise Interrupted("cancelled")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise Interrupted("deadline")


@dataclass(slots=True)
class Reply:
    """A reply of the model: its ids, its text and why it ended."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: Reason = "cancelled"
    end: int | None = None
    """The end token, which is also the last of ``ids``; ``None`` if the reply did not end with one."""


@dataclass(frozen=True, slots=True)
class Before:
    """The state of a session before a change, stored so that the change can be undone.

    For lists that only grow, only their lengths are stored.
    """

    dialogue: Dialogue
    reply: Reply | None
    """The open reply, if there was one."""
    said: tuple[list[int], str, int | None]
    """Ids, text and end token of the open reply."""
    reply_start: int
    ids: int
    """Number of ids."""
    newest: array[int]
    """The last id, or nothing if there were no ids."""
    entries: int
    """Number of entries."""
    sequence: TokenSequence | None
    """The sequence of the memory; ``None`` if there is no memory, as in a closed session."""
    pins: Pins | None
    """The pins of that sequence."""


class Place(Protocol):
    """The entry of a turn in the queue for leases.

    The entry can be called, from any thread. The turn then tries again to get its lease.
    """

    holding: Holding
    """The memory of the turn."""
    tried: bool
    """True if the turn has tried at least once to get its lease, without success."""
    refused: bool
    """True if too many turns wait before this turn."""

    def __call__(self) -> None: ...  # noqa: D102


class Host(Protocol):
    """The part of the runtime that conversations and leasing use; :class:`Runtime` is the only implementation."""

    name: str
    cap: int
    model: Any
    tokenizer: Any
    scheduler: Scheduler
    """The scheduler of the model, shared by all its runtimes. Its lock is held while the model computes or memories
    move."""
    max_batch_tokens: int

    @property
    def packs(self) -> bool:
        """True if the model can be fed several sequences in one forward."""

    guard: Any
    """Lock for the lists of sessions and holdings; it is held only briefly."""
    leases: Leases
    identity: Identity
    defaults: dict[str, Any]
    turns: count[int]
    templates: WeakKeyDictionary[ChatTemplate, str]
    wait: float
    max_waiting: int
    waiters: deque[Place]
    sessions: list[Any]

    def session(self, *args: Any, **settings: Any) -> Any:
        """Begin a session; this and the methods below are documented in :class:`agentmem.sessions.runtime.Runtime`."""

    def fork(self, session: Any, name: str | None = None) -> Any: ...  # noqa: D102
    def save(self, session: Any, url: Any) -> None: ...  # noqa: D102
    def forget(self, session: Any) -> None: ...  # noqa: D102
    def speak(self, session: Any, memory: Memory) -> None: ...  # noqa: D102
    def turn(  # noqa: D102
        self, session: Any, *, brief: bool = False, reads: bool = False, until: float | None = None
    ) -> AbstractContextManager[None]: ...
    def try_admit(self, session: Any, turn: object) -> bool: ...  # noqa: D102
    def end(self, session: Any, turn: object) -> None: ...  # noqa: D102
    def wake_next(self) -> None: ...  # noqa: D102
    def folder(self) -> Path: ...  # noqa: D102


class Conversation:
    """The state of one conversation; :class:`agentmem.sessions.session.Session` adds the public interface."""

    def __init__(
        self,
        runtime: Host,
        name: str,
        settings: SessionSettings,
        holding: Holding,
        template: ChatTemplate | None,
        hooks: HookCalls,
    ) -> None:
        """Begin with an empty conversation."""
        self.runtime, self.name, self.settings, self.holding = runtime, name, settings, holding
        self.template, self.hooks = template, hooks
        self.tokenizer: Any = runtime.tokenizer
        self.ids: MutableSequence[int] = array("q")
        """All ids that were read or sampled, including those that the memory has not consumed yet."""
        self.dialogue = Dialogue()
        self.entries: list[Entry] = []
        self.draft: Reply | None = None
        """The open reply; ``None`` if no reply is open."""
        self.generator = None if settings.seed is None else torch.Generator().manual_seed(settings.seed)
        self.before: Before | None = None
        """The state before an unfinished change; ``None`` if no change is under way."""
        self.watch = Watch()
        self.closed = False
        self.turn: object | None = None
        """An object that identifies the running turn or call; ``None`` while the session is idle."""
        self.thread = 0
        """The number of the thread that began the running turn."""
        self.leave: Callable[[], None] | None = None
        """Ends the running turn at its present step; ``None`` if it has no steps."""
        self.reply_start = 0
        self._reported_rebases = holding.rebases
        self.last = Reply()
        """The newest reply, whether it is still open or not."""
        holding.sessions.add(id(self))

    @property
    def names(self) -> dict[str, str]:
        """The names that log events about this session have."""
        return {"session": self.name, "runtime": self.runtime.name}

    @property
    def busy(self) -> bool:
        """True while a turn of this session runs."""
        return self.turn is not None

    @property
    def memory(self) -> Memory:
        """The memory; raises MemoryClosed while the memory is on disk and after the session was closed."""
        return self._here(self.holding.memory)

    @property
    def engine(self) -> Engine:
        """The engine that feeds and compacts the memory; raises MemoryClosed as :attr:`memory` does."""
        return self.view.engine

    @property
    def view(self) -> CappedCache:
        """The cache object that is passed as ``past_key_values``; raises MemoryClosed as :attr:`memory` does."""
        return self._here(self.holding.view)

    def _here(self, part: T | None) -> T:
        if part is None:
            raise MemoryClosed(f"session {self.name!r} is closed, or its memory is on disk until its next turn")
        return part

    @property
    def pending(self) -> list[int]:
        """The ids that the memory has not consumed yet."""
        return list(self.ids[self.holding.seen :])

    def want(self, ids: Sequence[int]) -> Want:
        """Return a request to feed these ids next.

        The turn yields this request to the code that drives the turn.
        """
        runtime = self.runtime
        priority, most, alone = self.settings.priority, runtime.max_batch_tokens, not runtime.packs
        return Want(self.engine, ids, self, priority, most, alone)

    def compacted(self, report: CompactionReport) -> None:
        """Note the duration of a finished compaction, and call the hook.

        If the compaction made a summary, an entry for the summary is added to the transcript's entries. It replaces the
        entries of older summaries that the new summary covers.
        """
        self.runtime.scheduler.paused(report.seconds)
        if report.summary is not None:
            made = report.summary
            self.entries = [entry for entry in self.entries if not entry.replaced(made)]
            self.entries.append(Entry(kind="summary", role=None, start=made.start, stop=made.stop, text=made.text))
        self.hooks.compacted(report)

    def new_rebases(self) -> list[RebaseReport]:
        """Return the reports of the re-basings since the last call of this method."""
        reported, self._reported_rebases = self._reported_rebases, len(self.memory.rebases)
        return self.memory.rebases[reported:]

    def skip_rebases(self) -> None:
        """Make :meth:`new_rebases` leave out the re-basings so far."""
        self._reported_rebases = self.holding.rebases  # not the memory's own: another thread may move it to disk
