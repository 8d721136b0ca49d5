"""Turns: a turn finds the conversation of a request, reads the new messages, compacts if asked to, and writes a reply.

A turn runs in its own task and queues its pieces, so that a slow client does not prolong the lease of the turn.
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
from agentmem.serving.items import forgotten
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
"""Number of token ids of a raw prompt that are read at a time; the turn can be cancelled after each such read."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Parameters for decoding a reply; they replace the defaults of the model's generation config."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    tokens: int = 1024
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    """Grammar that the reply must follow; see :class:`agentmem.serving.constraints.Constraints`."""

    def options(self) -> dict[str, Any]:
        """Return the parameters as keyword arguments of ``generate``, without seed, stop sequences and grammar."""
        if self.temperature == 0:
            return {"max_new_tokens": self.tokens, "do_sample": False}
        chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.tokens, **chosen}


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that one turn needs to know: messages, session settings, and how to reply."""

    owner: str
    messages: Sequence[Message]
    recipe: Recipe = field(default_factory=Recipe)
    sampling: Sampling = field(default_factory=Sampling)
    name: str | None = None
    label: str | None = None
    accepts: Accepts | None = None
    """Function that checks whether a tool call is valid for this request; with ``None``, calls are treated as text."""
    after: bool = False
    """True to compact the new messages right after they were read."""
    focus: str = ""
    item: Item | None = None
    """Compaction item whose memory comes before the messages; ``recipe`` is then the item's recipe."""
    lead: str | None = None
    """Digest of the message with the request's instructions."""
    any_recipe: bool = False
    """True to allow that the turn continues a conversation with another recipe."""
    compact: bool = False
    """True to compact the whole conversation after reading, and to save it as a compaction item."""
    threshold: int | None = None
    """Number of tokens since the newest compaction item at which the turn compacts as if ``compact`` were true."""
    write: bool = True
    """True if the model shall write a reply."""
    raw: Sequence[int] | None = None
    """Token ids to read instead of messages; the conversation of such a turn is forgotten at its end."""
    forced: Sequence[Function] = ()
    """Tools of which the reply must call exactly one."""
    schema: Mapping[str, Any] | None = None
    """JSON schema that the reply must fit."""
    response: str | None = None
    """Id of the response that the turn produces; cancelling that response ends the turn."""


class Turn:
    """A running request to the model. Read its :meth:`pieces`, and always call :meth:`stop` at the end."""

    def __init__(self, server: Server, request: Request) -> None:
        """Start the turn in a new task of the running event loop."""
        self._server, self.request = server, request
        self._why = RequestRefused("the server ended the turn; try again", status=503, code="shutting_down")
        self._pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._start, self._first = time.monotonic(), 0.0
        self._until = self._start + server.settings.turn_seconds
        self._usage, self._log = Usage(), Log()
        self.task = asyncio.create_task(self._run())

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces of the turn as they come; the last one is :class:`Ended`.

        Raises:
            AgentmemError: the turn failed or was stopped.

        """
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if isinstance(piece, Ended):
                return

    async def stop(self, why: RequestRefused | None = None) -> None:
        """End the turn if it still runs; :meth:`pieces` then raises ``why``, by default an error with status 503.

        A forward pass or a blocking call that is running ends first.
        """
        self._why = why or self._why
        self.task.cancel()
        await asyncio.wait([self.task])

    async def _run(self) -> None:
        try:
            await self._turn()
        except asyncio.CancelledError:
            self._pieces.put_nowait(self._why)
            raise
        except Exception as error:  # noqa: BLE001  # the reader of the pieces gets it
            self._pieces.put_nowait(error)

    async def _turn(self) -> None:
        conversation: Conversation | None = None
        while conversation is None:  # a conversation that cannot be continued is forgotten, so this loop ends
            with suppress(_Anew):
                conversation = await self._read()
        try:
            await self._compact(conversation)
            last = await self._reply(conversation)
            if self.request.raw is None:
                await self._server.share(conversation)  # before the client knows that the turn has ended
        except BaseException as error:
            await self._abandon(conversation, error)
            raise
        if self.request.raw is None:
            self._server.settle(conversation)
        else:
            await self._server.forget(conversation)
        self._pieces.put_nowait(last)

    # ---- reading

    async def _read(self) -> Conversation:
        """Find or begin the conversation, mark it busy, and read all new messages.

        Raises:
            _Anew: the chosen conversation could not be continued and was forgotten; call this method again.

        """
        request = self.request
        before = [] if request.item is None else [marker(request.item.id)]
        wanted = [*before, *map(digest, request.messages)]
        saved = await self._server.saved(request.owner)
        conversation, held = self._server.conversations.claim(
            request.owner,
            request.recipe,
            wanted,
            name=request.name,
            label=request.label,
            any_recipe=request.any_recipe,
            saved=saved,
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
                self._server.shelf.refuse(conversation)
                raise _Anew from error
            if isinstance(error, SnapshotRefused) and request.item is not None and not request.item.folder.exists():
                raise forgotten() from error  # another server deleted it meanwhile
            raise
        self._pieces.put_nowait(Begun(conversation.id))
        return conversation

    def _begin(self, conversation: Conversation) -> int:
        """Prepare a new conversation; return how many of the request's messages the conversation holds already.

        The request may continue a compaction item, which is a saved memory in place of all earlier messages. In this
        case the conversation begins with the saved memory, and the result is 1: the item counts as one message. Without
        an item the conversation is empty, and the result is 0.
        """
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
        """Read the raw token ids of the request, or the messages that the conversation does not hold yet."""
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
            if len(session.dialogue.messages) > before:  # the session took them, even if an error followed
                conversation.history += wanted[held:]
                conversation.open = False

    def _left(self) -> float:
        """Return the seconds that are left of the turn's time limit.

        Raises:
            RequestRefused: status 504: the time limit has passed.

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
        """Compact the conversation if this is due, and save it as a compaction item.

        A compaction is due if the request asks for it, or if the conversation has at least ``request.threshold`` tokens
        after its newest compaction item.
        """
        session, request, server = conversation.session, self.request, self._server
        assert session is not None  # noqa: S101  # it was read
        due = request.threshold is not None and session.stats.tokens - conversation.since_item >= request.threshold
        if not (request.compact or due):
            return
        self._left()

        report = await server.blocking(partial(session.compact, focus=request.focus))
        self._log.reports += [] if report is None else [report]
        conversation.since_item = session.stats.tokens
        # a call of its own: `blocking` repeats a call that finds the cap leased, and must not compact twice
        name, token = await server.blocking(partial(server.make_item, conversation, session))
        conversation.anchors[marker(name)] = len(conversation.history)
        self._pieces.put_nowait(Made(name, token))

    # ---- writing

    async def _reply(self, conversation: Conversation) -> Ended:
        session, request = conversation.session, self.request
        assert session is not None  # noqa: S101  # it was read
        if request.sampling.seed is not None and session.generator is not None:
            session.generator.manual_seed(request.sampling.seed)
        if not request.write:
            return self._end(conversation, session, "read", ReplyText())
        text = ReplyText(request.sampling.stop, self._server.formats, request.accepts)
        conversation.open = True
        try:
            reason = await self._write(session, text, conversation)
        finally:
            if not conversation.open:
                self._tell(text.end())
                conversation.history.append(digest(_said(text)))
        return self._end(conversation, session, "tool_calls" if text.calls else reason, text)

    def _end(self, conversation: Conversation, session: Session, reason: End, text: ReplyText) -> Ended:
        stats = session.stats
        self._usage.prompt = stats.tokens - self._usage.reply
        self._server.metrics.turn(self._usage, self._log.reports)
        if self._first:
            self._server.metrics.reply(self._first - self._start, time.monotonic() - self._first, self._usage.reply)
        facts = self._log.facts(conversation.id, stats, self._usage) | {"ended": reason}
        return Ended(reason, text.sent, tuple(text.calls), self._usage, facts)

    async def _write(self, session: Session, text: ReplyText, conversation: Conversation) -> End:
        """Decode and queue the reply until it ends or a stop sequence comes; return why the reply ended."""
        marks = self._server.marks if self.request.accepts else {}
        sampling = self.request.sampling
        options = sampling.options()
        if sampling.grammar is not None:
            options["logits_processor"] = [self._server.constraints.follow(sampling.grammar)]
        async with aclosing(session.astream(deadline=self._left(), **options)) as events:  # type: ignore[type-var]  # a generator
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
        """After an error, keep the conversation if its memory still matches its history; otherwise forget it."""
        usual = isinstance(error, asyncio.CancelledError | RuntimeBusy | RequestRefused)
        if usual and conversation.history and conversation.session is not None:
            self._server.settle(conversation)
            return
        with suppress(AgentmemError):
            await self._server.forget(conversation)
        self._server.conversations.release(conversation)


class _Anew(Exception):
    """Raised if the chosen conversation could not be continued and was forgotten."""


def _said(text: ReplyText) -> Message:
    """Return the reply as the message that the client will send back in its next request."""
    calls = tuple(call.plain() for call in text.calls) or None
    return Message(role="assistant", content=text.sent, tool_calls=calls)
