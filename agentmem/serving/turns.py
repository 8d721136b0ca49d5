"""One request to the model: find its conversation, read what is new, compact where that is asked for, write a reply.

A turn runs in a task of its own and ends at its own speed: its pieces wait for a slow reader, its lease does not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from agentmem.errors import AgentmemError, RequestRefused, RuntimeBusy, SettingsRefused, SnapshotRefused
from agentmem.serving.history import digest, marker
from agentmem.serving.pieces import Begun, End, Ended, Log, Made, Piece, Text, Usage
from agentmem.serving.recipes import Recipe
from agentmem.serving.reply_text import ReplyText
from agentmem.sessions import CompactionFinished, Message, TextEvent, TokenEvent, TurnFinished

if TYPE_CHECKING:
    from agentmem import Session
    from agentmem.serving.conversations import Conversation
    from agentmem.serving.items import Item
    from agentmem.serving.server import Server
    from agentmem.serving.tool_calls import Accepts
    from agentmem.serving.tools import Function


_PIECE = 256
"""Ids of a raw prompt that are read at once; between two pieces the turn can be ended."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is decoded. Nothing of the model's own defaults is used."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    tokens: int = 1024
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    """Of the reply; see :class:`agentmem.serving.constraints.Constraints`."""

    def options(self) -> dict[str, Any]:
        """As ``generate`` takes them."""
        if self.temperature == 0:
            return {"max_new_tokens": self.tokens, "do_sample": False}
        chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.tokens, **chosen}


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the model."""

    owner: str
    messages: Sequence[Message]
    recipe: Recipe = field(default_factory=Recipe)
    sampling: Sampling = field(default_factory=Sampling)
    name: str | None = None
    label: str | None = None
    accepts: Accepts | None = None
    """What tells a call of the request's tools from text."""
    after: bool = False
    """Whether what is new is compacted right after it was read."""
    focus: str = ""
    item: Item | None = None
    """A compaction item that stands before the messages; the recipe is its own."""
    lead: str | None = None
    """Digest of the instructions."""
    any_recipe: bool = False
    """Whether a held conversation of any recipe is gone on with."""
    compact: bool = False
    """Whether everything is compacted when it has been read, and kept as an item."""
    threshold: int | None = None
    """Or only where so many tokens have come since the newest item."""
    write: bool = True
    """Whether a reply is wanted."""
    raw: Sequence[int] | None = None
    """Ids that are read as they are, instead of messages; nothing is held of such a turn when it has ended."""
    forced: Sequence[Function] = ()
    """Tools of which the reply must call one."""
    schema: Mapping[str, Any] | None = None
    """What the reply must fit, as JSON."""
    response: str | None = None
    """Id of the response that it becomes, by which it can be cancelled."""


class Turn:
    """A request that is under way. Read its :meth:`pieces`; :meth:`stop` must be called, whatever happens."""

    def __init__(self, server: Server, request: Request) -> None:
        """Begin at once."""
        self._server, self.request = server, request
        self._why = RequestRefused("the server ended the turn; try again", status=503, code="shutting_down")
        self._pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._start, self._first = time.monotonic(), 0.0
        self._until = self._start + server.settings.turn_seconds
        self._usage, self._log = Usage(), Log()
        self.task = asyncio.create_task(self._run())

    async def pieces(self) -> AsyncIterator[Piece]:
        """What the turn tells, until its end.

        Raises:
            AgentmemError: the turn failed.

        """
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if isinstance(piece, Ended):
                return

    async def stop(self, why: RequestRefused | None = None) -> None:
        """End the turn within one forward, if it has not ended; ``why`` is the error that its reader gets."""
        self._why = why or self._why
        self.task.cancel()
        await asyncio.wait([self.task])

    async def _run(self) -> None:
        try:
            await self._turn()
        except asyncio.CancelledError:
            self._pieces.put_nowait(self._why)
            raise
        except Exception as error:  # noqa: BLE001  # whoever reads the pieces gets it
            self._pieces.put_nowait(error)

    async def _turn(self) -> None:
        conversation: Conversation | None = None
        while conversation is None:  # every one that cannot go on is forgotten, so this ends
            with suppress(_Anew):
                conversation = await self._read()
        try:
            await self._compact(conversation)
            await self._reply(conversation)
        except BaseException as error:
            await self._abandon(conversation, error)
            raise
        if self.request.raw is None:
            self._server.settle(conversation)
        else:
            await self._server.forget(conversation)

    # ---- reading

    async def _read(self) -> Conversation:
        """The conversation with everything read; it is busy.

        Raises:
            _Anew: it cannot go on with these messages, but they can be read from the start; it is forgotten.

        """
        request = self.request
        before = [] if request.item is None else [marker(request.item.id)]
        wanted = [*before, *map(digest, request.messages)]
        conversation, held = self._server.conversations.claim(
            request.owner,
            request.recipe,
            wanted,
            name=request.name,
            label=request.label,
            any_recipe=request.any_recipe,
        )
        found = held > 0
        if not found:
            held = self._begin(conversation)
        try:
            await self._server.sweep()
            session = await self._session(conversation)
            self._usage.cached = session.stats.tokens
            await self._extend(conversation, session, held, wanted)
        except BaseException as error:
            await self._abandon(conversation, error)
            if found and isinstance(error, SettingsRefused | SnapshotRefused):
                raise _Anew from error
            raise
        self._pieces.put_nowait(Begun(conversation.id))
        return conversation

    def _begin(self, conversation: Conversation) -> int:
        """How much of the request a new conversation holds: what its compaction item stands for, if it has one."""
        conversation.lead = self.request.lead
        if (item := self.request.item) is None:
            return 0
        conversation.folder, conversation.anchors = item.folder, {marker(item.id): 0}
        conversation.lead, conversation.since_item = item.record.lead, item.record.since_item
        return 1

    async def _session(self, conversation: Conversation) -> Session:
        if conversation.session is None:
            await self._server.blocking(lambda: self._server.open_session(conversation))
        assert conversation.session is not None  # noqa: S101  # it was just made
        return conversation.session

    async def _extend(self, conversation: Conversation, session: Session, held: int, wanted: list[str]) -> None:
        """Read the messages that the conversation does not hold, or ids as they are."""
        for start in range(0, len(self.request.raw or ()), _PIECE):
            self._left()
            read = partial(session.read, (self.request.raw or ())[start : start + _PIECE])
            self._log.reports += await self._server.blocking(read)
        new = self.request.messages[held - (self.request.item is not None) :]
        if not new:
            return
        before = len(session.dialogue.messages)
        how = {"compact": "after", "focus": self.request.focus} if self.request.after else {}
        try:
            self._log.reports += await session.aextend(new, deadline=self._left(), **how)  # type: ignore[arg-type]  # by name
        finally:
            if len(session.dialogue.messages) > before:  # they were taken, whatever came of it
                conversation.history += wanted[held:]
                conversation.open = False

    def _left(self) -> float:
        """Seconds that the turn still has.

        Raises:
            RequestRefused: 504, none.

        """
        left = self._until - time.monotonic()
        if left <= 0:
            raise RequestRefused(
                f"the turn took more than {self._server.settings.turn_seconds:g} s; send less at once, or try again",
                status=504,
                code="timeout",
            )
        return left

    # ---- compacting

    async def _compact(self, conversation: Conversation) -> None:
        """Compact and keep everything, where that is asked for or due."""
        session, request, server = conversation.session, self.request, self._server
        assert session is not None  # noqa: S101  # it was read
        due = request.threshold is not None and session.stats.tokens - conversation.since_item >= request.threshold
        if not (request.compact or due):
            return
        self._left()

        def compact() -> tuple[str, str]:
            report = session.compact(focus=request.focus)
            self._log.reports += [] if report is None else [report]
            conversation.since_item = session.stats.tokens
            return server.make_item(conversation, session)

        name, token = await server.blocking(compact)
        conversation.anchors[marker(name)] = len(conversation.history)
        self._pieces.put_nowait(Made(name, token))

    # ---- writing

    async def _reply(self, conversation: Conversation) -> None:
        session, request = conversation.session, self.request
        assert session is not None  # noqa: S101  # it was read
        if request.sampling.seed is not None and session.generator is not None:
            session.generator.manual_seed(request.sampling.seed)
        if not request.write:
            self._end(conversation, session, "read", ReplyText())
            return
        text = ReplyText(request.sampling.stop, self._server.formats, request.accepts)
        conversation.open = True
        try:
            reason = await self._write(session, text, conversation)
        finally:
            if not conversation.open:
                self._tell(text.end())
                conversation.history.append(digest(_said(text)))
        self._end(conversation, session, "tool_calls" if text.calls else reason, text)

    def _end(self, conversation: Conversation, session: Session, reason: End, text: ReplyText) -> None:
        stats = session.stats
        self._usage.prompt = stats.tokens - self._usage.reply
        self._server.metrics.turn(self._usage, self._log.reports)
        if self._first:
            self._server.metrics.reply(self._first - self._start, time.monotonic() - self._first, self._usage.reply)
        facts = self._log.facts(conversation.id, stats, self._usage) | {"ended": reason}
        self._pieces.put_nowait(Ended(reason, text.sent, tuple(text.calls), self._usage, facts))

    async def _write(self, session: Session, text: ReplyText, conversation: Conversation) -> End:
        """Decode until the reply ends or a stop sequence comes; why it ended."""
        marks = self._server.marks if self.request.accepts else {}
        sampling = self.request.sampling
        options = sampling.options()
        if sampling.grammar is not None:
            options["logits_processor"] = [self._server.constraints.follow(sampling.grammar)]
        async with aclosing(session.stream(deadline=self._left(), **options)) as events:  # type: ignore[type-var]  # a generator
            async for event in events:
                if isinstance(event, TokenEvent):
                    conversation.open = False
                    self._first = self._first or time.monotonic()
                    self._usage.reply += 1
                    self._tell(text.push(marks.get(event.id, "")))
                elif isinstance(event, TextEvent):
                    self._tell(text.push(event.text))
                elif isinstance(event, CompactionFinished):
                    self._log.reports.append(event.report)
                elif isinstance(event, TurnFinished) and event.reason in ("length", "deadline"):
                    return "length" if event.reason == "length" else "deadline"
                if text.stopped:
                    break
        return "stop"

    def _tell(self, text: str) -> None:
        if text:
            self._pieces.put_nowait(Text(text))

    # ---- ends that come early

    async def _abandon(self, conversation: Conversation, error: BaseException) -> None:
        """Keep a conversation that is still what its history says; forget it otherwise."""
        usual = isinstance(error, asyncio.CancelledError | RuntimeBusy | RequestRefused)
        if usual and conversation.history and conversation.session is not None:
            self._server.settle(conversation)
            return
        with suppress(AgentmemError):
            await self._server.forget(conversation)
        self._server.conversations.release(conversation)


class _Anew(Exception):
    """A held conversation cannot go on as a request wants."""


def _said(text: ReplyText) -> Message:
    """The reply as the client will send it back."""
    calls = tuple(call.plain() for call in text.calls) or None
    return Message(role="assistant", content=text.sent, tool_calls=calls)
