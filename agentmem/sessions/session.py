"""The session: the public interface to one conversation. It reads messages, writes replies and reports compactions."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from agentmem.errors import CapTooSmall, CopyRefused
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


class _Interface(type):
    """Metaclass whose classes show in ``dir`` and ``help`` what they define, without what they inherit."""

    def __dir__(cls) -> list[str]:
        """Return the names that the class itself defines."""
        return sorted(vars(cls))


class Session(Conversation, metaclass=_Interface):
    """One conversation, made by :meth:`Runtime.session`, :meth:`Runtime.load` or :meth:`fork`.

    Every method that reads or writes first takes the session's lease and may raise :class:`RuntimeBusy`. The session
    stays usable if a turn ends early, whatever the reason.
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
        """Read a message through the chat template and return the reports of the compactions made during the reading.

        Args:
            role: system (or developer), user, assistant or tool.
            content: the text of the message, a list of text parts as in OpenAI's interface, or ``None``. Control
                tokens in the text are read as plain text.
            name: name of the participant who speaks, or of the tool in a tool's message.
            tool_calls: tool calls of an assistant's message; the arguments of each call are a dict or a JSON text.
            tool_call_id: id of the call that a tool's message answers.
            pin: exclude this message from compaction until it is unpinned.
            compact: ``"after"`` compacts the message right after it was read, with the message's own queries.
            target: with ``compact="after"``, how much of the message to leave: a fraction, or slots per head. The
                default is 0.25.
            focus: a text that must stay recallable after this compaction.
            policy: name of the policy for this compaction; it must be one of the policies that the session was made
                with. A policy with adaptive budgets, such as ``am-halving[budgets=adaptive[output_error=0.1]]``,
                ignores ``target`` and leaves as much as its error limits require.
            deadline: seconds after which reading stops. The next turn reads the rest of the message and does not apply
                ``compact="after"`` to this rest.

        Raises:
            SettingsRefused: the template cannot take the message, or the pins do not fit; nothing was changed.
            MemoryCapExceeded: the memory does not compact by itself, and the message does not fit; nothing was changed.
            UnsupportedModel: the model is in training mode; nothing was changed.
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
        """Read several messages at once, such as the results of parallel tool calls.

        The other arguments, the returned reports and the errors are those of :meth:`append`.
        """
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
        """Read a text, or token ids, without the chat template.

        Ids are read as given and never tokenized. The other arguments, the returned reports and the errors are those
        of :meth:`append`.
        """
        how = How(pin, compact, target, focus, policy, deadline)
        return _reports(self._drive(lambda: ingestion.text(self, text, how), deadline))

    def generate(self, **options: Any) -> Reply:
        """Have the model write a reply and return its text, its ids and the reason why it ended.

        ``options`` are those of Hugging Face's ``generate`` (``max_new_tokens``, ``temperature``, …). Give
        ``max_new_tokens``: without it transformers stops after 20 tokens and warns, unless the model's own
        ``generation_config`` has a length.

        Two more options exist. ``deadline`` (seconds) ends the reply early. ``keep_open=True`` leaves the reply open,
        so that :meth:`say` and the next ``generate`` continue the same reply.

        Raises:
            UnsupportedGeneration: a session does not support one of the options.
            TurnEnded: the memory is full and ``before_compact`` refused the compaction.
            MemoryCapExceeded: the policy never compacts and the cap is reached.

        """
        for _ in self.stream(**options):
            pass
        return replace(self.last, ids=list(self.last.ids))

    def stream(
        self, *, deadline: float | None = None, keep_open: bool = False, **options: Any
    ) -> Generator[Event, None, None]:
        """Have the model write a reply, as :meth:`generate` does, and yield the events of the turn as they happen.

        Closing the iterator ends the turn once the running forward has finished.
        """
        if deadline is not None:
            check_seconds("deadline", deadline)
        return self._drive(lambda: ingestion.replying(self, options, keep_open=keep_open), deadline)

    async def agenerate(self, **options: Any) -> Reply:
        """Do what :meth:`generate` does, for asyncio.

        Cancelling the task ends the turn once the running forward has finished.
        """
        async with aclosing(aio.stream(self, options)) as events:
            async for _ in events:
                pass
        return replace(self.last, ids=list(self.last.ids))

    def astream(self, **options: Any) -> AsyncIterator[Event]:
        """Do what :meth:`stream` does, for asyncio.

        Forwards run on the model's own thread, and only when the consumer asks for another event. Use
        ``contextlib.aclosing`` if the loop may be left early: after a mere ``break`` the turn has not ended.
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
        """Do what :meth:`append` does, for asyncio."""
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
        """Do what :meth:`extend` does, for asyncio."""
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
        """Do what :meth:`read` does, for asyncio."""
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
        """Read messages, as :meth:`extend` does, and yield the events of the turn as they happen."""
        return self._appending(messages, How(pin, compact, target, focus, policy, deadline))

    def _appending(self, messages: Sequence[Message | Mapping[str, Any]], how: How) -> Generator[Event, None, None]:
        made = Message.each(messages)
        return self._drive(lambda: ingestion.messages(self, made, how), how.deadline)

    def say(self, text: str) -> None:
        """Add a text to the open reply as if the model had written the text; the next turn reads the text.

        If no reply is open, a reply is opened. With ``keep_open=True``, :meth:`generate` leaves a reply open even after
        the model has written its end token. The text then replaces this end token.

        Raises:
            SettingsRefused: the chat template cannot begin a reply at this point.

        """
        check_text("say", text)
        with self.runtime.turn(self, brief=True):
            ingestion.say(self, text)

    def _drive(self, make: Callable[[], turn.Steps], deadline: float | None) -> Generator[Event, None, None]:
        until, before = None if deadline is None else time.monotonic() + deadline, len(self.ids)
        while True:
            try:
                yield from self._turn(make, until)
            except CapTooSmall:  # new pins do not fit, and nothing was changed: a larger part of the cap may help
                if len(self.ids) != before or not self.holding.ask_more(self.runtime.cap):
                    raise
            else:
                return

    def _turn(self, make: Callable[[], turn.Steps], until: float | None) -> Generator[Event, None, None]:
        with self.runtime.turn(self, until=until):
            steps = Steps(self, make(), until)
            try:  # close twice, in case an interrupt comes before the first close
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
        """Compact now and return the report, or ``None`` if there is nothing to reclaim.

        Pinned tokens are not compacted. The newest request is pinned until it is answered (setting ``pin_request``).

        Args:
            force: compact whether or not the memory is nearly full. With ``False`` the memory is compacted only if at
                most the fraction ``soft`` (a session setting) of its capacity is free.
            focus: a text that must stay recallable.
            target: how much to leave between prefix and recent window: a fraction of the segment, or slots per head.
            policy: name of the policy for this compaction; it must be one of the policies that the session was made
                with.

        Raises:
            SettingsRefused: ``mode="off"``, an unknown policy, or a focus with a policy that has no probe.
            CompactionFailed: the compaction failed and ``on_failure`` is not ``"evict"``.

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
        """Do what :meth:`compact` does, for asyncio; cancelling the task ends the compaction at the next layer."""
        How(compact="after", target=target, focus=focus, policy=policy)
        found = await aio.reports(
            self, lambda: compaction_requests.compacting(self, focus, target, policy, force=force), None
        )
        return found[-1] if found else None

    def pin(self, start: int, stop: int) -> None:
        """Exclude the tokens ``start .. stop`` of the transcript from compaction until they are unpinned.

        Raises:
            SettingsRefused: some of these tokens were compacted already, or the transcript does not have them.
            CapTooSmall: with these pins a compaction could no longer reach its target.

        """
        check_count("pin: start", start)
        check_count("pin: stop", stop)
        with self.runtime.turn(self, brief=True):
            pin(self.memory, self.memory.sequences[0], start, stop, coming=len(self.pending))

    def unpin(self, start: int, stop: int) -> None:
        """Allow the tokens ``start .. stop`` of the transcript to be compacted again.

        It does not matter whether a call or a setting pinned the tokens. Tokens in this range that are not pinned are
        ignored. Until the next compaction, the tokens can be pinned again.

        Raises:
            SettingsRefused: the transcript does not have some of these tokens.

        """
        check_count("unpin: start", start)
        check_count("unpin: stop", stop)
        with self.runtime.turn(self, brief=True):
            unpin(self.memory.sequences[0], start, stop, coming=len(self.pending))

    # ---- branches and files

    def fork(self, name: str | None = None) -> Session:
        """Return a new session that has read and written the same as this session and continues independently.

        The two sessions share one memory. The first of them that begins a turn gets its own copy of the memory.

        Raises:
            SettingsRefused: a turn of this session is running.

        """
        other: Session = self.runtime.fork(self, name)
        return other

    def save(self, url: str | os.PathLike[str]) -> None:
        """Save the session under a path or an fsspec URL, completely or not at all; :meth:`Runtime.load` restores it.

        Raises:
            SettingsRefused: ``url`` is neither a path nor a URL.
            AgentmemError: the snapshot cannot be written; an older snapshot at that place is still complete.

        """
        self.runtime.save(self, url)

    def close(self) -> None:
        """Close the session and free its memory; closing twice does nothing."""
        self.runtime.forget(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise CopyRefused, since a session can be neither copied nor pickled; use :meth:`fork` or :meth:`save`."""
        raise CopyRefused.of(self)

    def __enter__(self) -> Self:
        """Return the session, which is closed at the end of the ``with`` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session."""
        self.close()

    # ---- transcript and statistics

    @property
    def reply(self) -> Reply | None:
        """The open reply, which was kept open or begun by :meth:`say`; ``None`` if no reply is open."""
        return self.draft

    @property
    def transcript(self) -> Transcript:
        """Everything that was read and written, as ids and as text, with the summaries that the memory holds."""
        written = ingestion.reply_entry(self)
        entries = [*self.entries, *(() if written is None else (written,))]
        return Transcript.of(self.ids, entries, self.tokenizer, self.holding.pins)

    @property
    def stats(self) -> SessionStats:
        """Current statistics of this session, such as its state, tokens, slots and bytes."""
        return SessionStats.of(self)


def _reports(events: Iterator[Event]) -> tuple[CompactionReport, ...]:
    return tuple(event.report for event in events if isinstance(event, CompactionFinished))
