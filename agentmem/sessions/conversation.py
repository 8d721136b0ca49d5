"""The state of one conversation: what was read and written, and where its memory is. Turns work on it."""

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
    from collections.abc import MutableSequence, Sequence
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
    """A turn is to end at this boundary; no error, and nothing that a policy's faults are caught with."""

    def __init__(self, reason: Reason) -> None:
        """``cancelled`` or ``deadline``."""
        super().__init__(reason)
        self.reason: Reason = reason


@dataclass(slots=True)
class Watch:
    """Whether a turn is to go on."""

    deadline: float | None = None
    """On the monotonic clock."""
    cancelled: bool = False

    def check(self) -> None:
        """End the turn here if it is to end.

        Raises:
            Interrupted: with the reason.

        """
        if self.cancelled:
            raise Interrupted("cancelled")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise Interrupted("deadline")


@dataclass(slots=True)
class Reply:
    """What the model has written in a turn."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: Reason = "cancelled"
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Before:
    """A session as it was: its dialogue, its open reply with its content, its newest id, and how much of the rest.

    ``sequence`` and ``pins`` are those of its memory; a closed session has none.
    """

    dialogue: Dialogue
    reply: Reply | None
    said: tuple[list[int], str, int | None]
    reply_start: int
    ids: int
    newest: array[int]
    entries: int
    sequence: TokenSequence | None
    pins: Pins | None


class Place(Protocol):
    """A turn's place in the queue for leases; called, from any thread, to have it try again."""

    tried: bool
    """Whether it has tried in vain, and waits."""

    def __call__(self) -> None: ...  # noqa: D102


class Host(Protocol):
    """What conversations, and whoever moves their memories, need of the runtime; :class:`Runtime` is the only one."""

    model: Any
    tokenizer: Any
    scheduler: Scheduler
    """Of the model, whatever runtimes it has; its lock is held while the model computes or memories move."""
    max_batch_tokens: int

    @property
    def packs(self) -> bool:
        """Whether the model can be fed several sequences in one forward."""

    guard: Any
    """Held for an instant, while it is written down who holds what."""
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
        """See :class:`agentmem.sessions.runtime.Runtime`, as for what follows."""

    def fork(self, session: Any, name: str | None = None) -> Any: ...  # noqa: D102
    def save(self, session: Any, url: Any) -> None: ...  # noqa: D102
    def forget(self, session: Any) -> None: ...  # noqa: D102
    def speak(self, session: Any, memory: Memory) -> None: ...  # noqa: D102
    def turn(self, session: Any, *, brief: bool = False, leased: bool = True) -> AbstractContextManager[None]: ...  # noqa: D102
    def try_admit(self, session: Any, turn: object) -> bool: ...  # noqa: D102
    def end(self, session: Any, turn: object) -> None: ...  # noqa: D102
    def wake_next(self) -> None: ...  # noqa: D102
    def folder(self) -> Path: ...  # noqa: D102


class Conversation:
    """One conversation's state; :class:`agentmem.sessions.session.Session` is the interface to it."""

    def __init__(
        self,
        runtime: Host,
        name: str,
        settings: SessionSettings,
        holding: Holding,
        template: ChatTemplate | None,
        hooks: HookCalls,
    ) -> None:
        """Nothing has been read."""
        self.runtime, self.name, self.settings, self.holding = runtime, name, settings, holding
        self.template, self.hooks = template, hooks
        self.tokenizer: Any = runtime.tokenizer
        self.ids: MutableSequence[int] = array("q")
        """Everything read and sampled, consumed by the memory or not yet."""
        self.dialogue = Dialogue()
        self.entries: list[Entry] = []
        self.reply: Reply | None = None
        """A reply that is still open."""
        self.generator = None if settings.seed is None else torch.Generator().manual_seed(settings.seed)
        self.before: Before | None = None
        """What there was before changes that have not come to their end."""
        self.watch = Watch()
        self.closed = False
        self.turn: object | None = None
        """What stands for the turn that runs, or for a call that nothing may come between."""
        self.reply_start = 0
        self._reported_rebases = holding.rebases
        self.last = Reply()
        """The newest reply, open or not."""
        holding.sessions.add(id(self))

    @property
    def busy(self) -> bool:
        """Whether a turn of it runs."""
        return self.turn is not None

    @property
    def memory(self) -> Memory:
        """The memory, while it is not on disk."""
        return self._here(self.holding.memory)

    @property
    def engine(self) -> Engine:
        """What runs the memory, while it is not on disk."""
        return self.view.engine

    @property
    def view(self) -> CappedCache:
        """What is passed as ``past_key_values``, while the memory is not on disk."""
        return self._here(self.holding.view)

    def _here(self, part: T | None) -> T:
        if part is None:
            raise MemoryClosed(f"session {self.name!r} is closed, or its memory is on disk until its next turn")
        return part

    @property
    def pending(self) -> list[int]:
        """Ids that the memory has not consumed yet."""
        return list(self.ids[self.holding.seen :])

    def want(self, ids: Sequence[int]) -> Want:
        """Have ids fed next: what is yielded to whoever drives the turn."""
        runtime = self.runtime
        priority, most, alone = self.settings.priority, runtime.max_batch_tokens, not runtime.packs
        return Want(self.engine, ids, self, priority, most, alone)

    def compacted(self, report: CompactionReport) -> None:
        """Take note of a compaction."""
        self.runtime.scheduler.paused(report.seconds)
        if report.summary is not None:
            made = report.summary
            self.entries = [entry for entry in self.entries if not entry.replaced(made)]
            self.entries.append(Entry(kind="summary", role=None, start=made.start, stop=made.stop, text=made.text))
        self.hooks.compacted(report)

    def new_rebases(self) -> list[RebaseReport]:
        """Re-basings that were not reported yet."""
        reported, self._reported_rebases = self._reported_rebases, len(self.memory.rebases)
        return self.memory.rebases[reported:]
