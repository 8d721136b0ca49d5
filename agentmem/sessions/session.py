"""A conversation that keeps its memory: turns in, replies out, every compaction in sight."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from agentmem.errors import CopyRefused
from agentmem.memory.pinning import pin, unpin
from agentmem.sessions import aio, compaction_requests, ingestion
from agentmem.sessions.arguments import check_count, check_seconds, check_text
from agentmem.sessions.chat.dialogue import Message
from agentmem.sessions.conversation import Conversation, Reply
from agentmem.sessions.events import CompactionFinished, Event
from agentmem.sessions.options import How
from agentmem.sessions.stats import SessionStats
from agentmem.sessions.transcript import Transcript
from agentmem.sessions.turn_steps import Steps

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from agentmem.reporting.report import CompactionReport
    from agentmem.sessions import turn

T = TypeVar("T")


class Session(Conversation):
    """One conversation. Made by :meth:`Runtime.session`, :meth:`Runtime.load` or :meth:`fork`.

    Every method that reads or writes takes the session's lease first and may raise :class:`RuntimeBusy`. A turn that
    ends early, for whatever reason, leaves a session that can go on.
    """

    # ---- turns

    def append(
        self,
        role: str,
        content: str | Sequence[Mapping[str, Any]] | None = "",
        *,
        name: str | None = None,
        tool_calls: Sequence[Mapping[str, Any]] | None = None,
        tool_call_id: str | None = None,
        pin: bool = False,
        compact: str | None = None,
        target: float | None = None,
        focus: str = "",
        policy: str | None = None,
        deadline: float | None = None,
    ) -> tuple[CompactionReport, ...]:
        """Read a message through the chat template; returns the reports of the compactions that it took.

        Args:
            role: system (or developer), user, assistant or tool.
            content: its text, also as OpenAI's list of text parts, or ``None``. Control tokens in it are read as text.
            name: who speaks; a tool's name.
            tool_calls: calls that an assistant's message makes; their arguments as dicts or as JSON texts.
            tool_call_id: which call a tool's message answers.
            pin: never compact it.
            compact: ``"after"`` compacts it right after it was read, with its own queries.
            target: what that leaves: a fraction, or slots per head; a quarter without it.
            focus: a text: what must stay recallable.
            policy: one of the session's: one with adaptive budgets, such as
                ``am-halving[budgets=adaptive[output_error=0.1]]``, leaves what its errors allow instead of ``target``.
            deadline: seconds; what is not read by then is read by the next turn, and no longer compacted after it was
                read.

        Raises:
            SettingsRefused: the template cannot take the message, or pins do not fit; nothing was changed.
            RuntimeBusy: the runtime has no room for this session now.

        """
        how = How(pin, compact, target, focus, policy, deadline)
        message = Message.of(role=role, content=content, name=name, tool_calls=tool_calls, tool_call_id=tool_call_id)
        return _reports(self._appending([message], how))

    def extend(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        pin: bool = False,
        compact: str | None = None,
        target: float | None = None,
        focus: str = "",
        policy: str | None = None,
        deadline: float | None = None,
    ) -> tuple[CompactionReport, ...]:
        """Read several messages at once, such as the results of parallel tool calls; see :meth:`append`."""
        how = How(pin, compact, target, focus, policy, deadline)
        return _reports(self._appending(messages, how))

    def read(
        self,
        text: str | Sequence[int],
        *,
        pin: bool = False,
        compact: str | None = None,
        target: float | None = None,
        focus: str = "",
        policy: str | None = None,
        deadline: float | None = None,
    ) -> tuple[CompactionReport, ...]:
        """Read a text as it is, outside the chat template (or ids, which are never tokenized); see :meth:`append`."""
        how = How(pin, compact, target, focus, policy, deadline)
        return _reports(self._drive(lambda: ingestion.text(self, text, how), deadline))

    def generate(self, **options: Any) -> Reply:
        """Have the model reply; ``options`` are Hugging Face's own (``max_new_tokens``, ``temperature``, …).

        Give ``max_new_tokens``: without it transformers stops after 20 tokens and warns, unless the model's own
        ``generation_config`` has a length.

        ``deadline`` (seconds) ends it early; ``keep_open=True`` leaves the reply open, so that :meth:`say` and the next
        ``generate`` go on with it. Returns the reply: its text, ids and the reason of its end.

        Raises:
            UnsupportedGeneration: an option that a session cannot serve.
            TurnEnded: ``before_compact`` refused a compaction that going on needs.
            MemoryCapExceeded: the policy never compacts and the cap is reached.

        """
        for _ in self.events(**options):
            pass
        return replace(self.last, ids=list(self.last.ids))

    def events(
        self, *, deadline: float | None = None, keep_open: bool = False, **options: Any
    ) -> Generator[Event, None, None]:
        """The same, event by event; closing the iterator ends the turn after the forward that runs."""
        if deadline is not None:
            check_seconds("deadline", deadline)
        return self._drive(lambda: ingestion.replying(self, options, keep_open=keep_open), deadline)

    async def agenerate(self, **options: Any) -> Reply:
        """:meth:`generate` for asyncio; cancelling the task ends the turn after the forward that runs."""
        async with aclosing(aio.stream(self, options)) as events:
            async for _ in events:
                pass
        return replace(self.last, ids=list(self.last.ids))

    def stream(self, **options: Any) -> AsyncIterator[Event]:
        """:meth:`events` for asyncio: forwards run on the model's own thread, one for every event that is asked for.

        Use ``contextlib.aclosing`` where the loop may be left early: a mere ``break`` leaves the session in mid-turn.
        """
        return aio.stream(self, options)

    async def aappend(
        self,
        role: str,
        content: str | Sequence[Mapping[str, Any]] | None = "",
        *,
        name: str | None = None,
        tool_calls: Sequence[Mapping[str, Any]] | None = None,
        tool_call_id: str | None = None,
        pin: bool = False,
        compact: str | None = None,
        target: float | None = None,
        focus: str = "",
        policy: str | None = None,
        deadline: float | None = None,
    ) -> tuple[CompactionReport, ...]:
        """:meth:`append` for asyncio."""
        how = How(pin, compact, target, focus, policy, deadline)
        message = Message.of(role=role, content=content, name=name, tool_calls=tool_calls, tool_call_id=tool_call_id)
        return await aio.reports(self, lambda: ingestion.messages(self, [message], how), deadline)

    async def aextend(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        pin: bool = False,
        compact: str | None = None,
        target: float | None = None,
        focus: str = "",
        policy: str | None = None,
        deadline: float | None = None,
    ) -> tuple[CompactionReport, ...]:
        """:meth:`extend` for asyncio."""
        how = How(pin, compact, target, focus, policy, deadline)
        made = Message.each(messages)
        return await aio.reports(self, lambda: ingestion.messages(self, made, how), deadline)

    async def aread(
        self,
        text: str | Sequence[int],
        *,
        pin: bool = False,
        compact: str | None = None,
        target: float | None = None,
        focus: str = "",
        policy: str | None = None,
        deadline: float | None = None,
    ) -> tuple[CompactionReport, ...]:
        """:meth:`read` for asyncio."""
        how = How(pin, compact, target, focus, policy, deadline)
        return await aio.reports(self, lambda: ingestion.text(self, text, how), deadline)

    def appending(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        pin: bool = False,
        compact: str | None = None,
        target: float | None = None,
        focus: str = "",
        policy: str | None = None,
        deadline: float | None = None,
    ) -> Generator[Event, None, None]:
        """Reading messages event by event; see :meth:`append`."""
        return self._appending(messages, How(pin, compact, target, focus, policy, deadline))

    def _appending(self, messages: Sequence[Message | Mapping[str, Any]], how: How) -> Generator[Event, None, None]:
        made = Message.each(messages)
        return self._drive(lambda: ingestion.messages(self, made, how), how.deadline)

    def say(self, text: str) -> None:
        """Put words into the reply: they are read at the next forward, as if the model had written them.

        They take the place of the end that the model chose, if it has ended a reply that was kept open.

        Raises:
            SettingsRefused: the chat template cannot open a reply here.

        """
        check_text("say", text)
        with self.runtime.turn(self, brief=True):
            ingestion.say(self, text)

    def _drive(self, make: Callable[[], turn.Steps], deadline: float | None) -> Generator[Event, None, None]:
        with self.runtime.turn(self):
            steps = Steps(self, make(), None if deadline is None else time.monotonic() + deadline)
            try:  # twice, should an interrupt come between
                try:
                    while (event := steps.step()) is not None:
                        yield event
                finally:
                    steps.close()
            finally:
                steps.close()

    # ---- compaction and pins

    def compact(
        self,
        *,
        force: bool = True,
        focus: str = "",
        target: float | None = None,
        policy: str | None = None,
    ) -> CompactionReport | None:
        """Compact now; ``None`` when there is nothing to reclaim (or, without ``force``, while there is still room).

        ``focus`` is a text that must stay recallable; ``target`` the fraction of the segment, or the slots per head,
        that stay between prefix and recent; ``policy`` the name of one of the session's. Pins stay, the newest request
        among them until it is answered (the setting ``pin_request``).

        Raises:
            SettingsRefused: ``mode="off"``, no such policy, or a focus with a policy that has no probe.
            CompactionFailed: with ``on_failure="raise"``.

        """
        How(compact="after", target=target, focus=focus, policy=policy)
        found = _reports(
            self._drive(lambda: compaction_requests.compacting(self, focus, target, policy, force=force), None)
        )
        return found[-1] if found else None

    async def acompact(
        self,
        *,
        force: bool = True,
        focus: str = "",
        target: float | None = None,
        policy: str | None = None,
    ) -> CompactionReport | None:
        """:meth:`compact` for asyncio; cancelling the task ends it at the next layer."""
        How(compact="after", target=target, focus=focus, policy=policy)
        found = await aio.reports(
            self, lambda: compaction_requests.compacting(self, focus, target, policy, force=force), None
        )
        return found[-1] if found else None

    def pin(self, start: int, stop: int) -> None:
        """Never compact the tokens ``start .. stop`` of the transcript until they are unpinned.

        Raises:
            SettingsRefused: some were compacted already, or are not there. CapTooSmall: they do not fit.

        """
        check_count("pin: start", start)
        check_count("pin: stop", stop)
        with self.runtime.turn(self, brief=True):
            pin(self.memory, self.memory.sequences[0], start, stop, coming=len(self.pending))

    def unpin(self, start: int, stop: int) -> None:
        """Let the tokens ``start .. stop`` of the transcript be compacted again, whatever had them pinned.

        Those that are not pinned stay as they are. Nothing is moved before the next compaction; until then they can be
        pinned again.

        Raises:
            SettingsRefused: some are not there.

        """
        check_count("unpin: start", start)
        check_count("unpin: stop", stop)
        with self.runtime.turn(self, brief=True):
            unpin(self.memory.sequences[0], start, stop, coming=len(self.pending))

    # ---- branches and files

    def fork(self, name: str | None = None) -> Session:
        """Another session with the same past. The memory is shared until one of the two goes on with its own copy.

        Raises:
            SettingsRefused: a turn is running.

        """
        other: Session = self.runtime.fork(self, name)
        return other

    def save(self, url: str | os.PathLike[str]) -> None:
        """Save everything under a path or an fsspec URL, whole or not at all; :meth:`Runtime.load` brings it back.

        Raises:
            SettingsRefused: no path and no URL.
            AgentmemError: it cannot be written; what was saved there before is still whole.

        """
        self.runtime.save(self, url)

    def close(self) -> None:
        """Free the memory; closing twice does nothing."""
        self.runtime.forget(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse ``copy`` and ``pickle``."""
        raise CopyRefused.of(self)

    def __enter__(self) -> Self:
        """Close at the end of a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    # ---- what there is

    @property
    def transcript(self) -> Transcript:
        """Everything read and written, as ids and as text, and the summaries that stand in the memory."""
        written = ingestion.reply_entry(self)
        entries = [*self.entries, *(() if written is None else (written,))]
        return Transcript.of(self.ids, entries, self.tokenizer, self.holding.pins)

    @property
    def stats(self) -> SessionStats:
        """A moment of this session."""
        return SessionStats.of(self)


def _reports(events: Iterator[Event]) -> tuple[CompactionReport, ...]:
    return tuple(event.report for event in events if isinstance(event, CompactionFinished))
