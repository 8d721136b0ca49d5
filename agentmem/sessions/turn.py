"""One turn of a session, a forward at a time: read, compact where it must be, write. Every step leaves it valid."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentmem.compaction.request import USUAL, Request
from agentmem.compaction.run import RowCompaction
from agentmem.errors import TurnEnded
from agentmem.hf.decoding import Decoding, choose, feed
from agentmem.memory.pinning import pin_coming
from agentmem.sessions.chat.text_decoder import TextPieces
from agentmem.sessions.events import (
    CompactionFinished,
    CompactionStarted,
    Event,
    Reason,
    Rebased,
    TextEvent,
    TokenEvent,
    TurnFinished,
)

if TYPE_CHECKING:
    import torch

    from agentmem.contracts import Policy
    from agentmem.memory.memory import Memory
    from agentmem.reporting.report import CompactionReport
    from agentmem.sessions.conversation import Conversation

Events = Generator[Event | None, None, None]
"""What happens in a turn; ``None`` after a forward that told nothing, so that other turns can have theirs."""
LEAST_SPAN = 16
"""Tokens of a span that is compacted after it was read, at least."""


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
class After:
    """Compact what is read right after it was read: ``target`` is a fraction of it, or slots per head."""

    start: int
    tokens: int
    target: float | int
    focus: tuple[int, ...] = ()
    policy: Policy | None = None

    def request(self, start: int, tokens: int) -> Request:
        """What to leave of the ``tokens`` from ``start`` on, a part of it all."""
        share = self.target if isinstance(self.target, float) else self.target / max(1, self.tokens)
        return Request(max(1, math.ceil(share * tokens)), start, self.focus, self.policy)


@dataclass(slots=True)
class Reply:
    """What the model has written in a turn."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: Reason = "cancelled"
    end: int | None = None


def read(
    session: Conversation, after: After | None = None, *, leave: int = 1
) -> Generator[Event | None, None, torch.Tensor | None]:
    """Feed what is pending but for the last ``leave`` ids; yields the events of compactions.

    Between turns the last id is always left: the forward that a reply begins with needs one, and not every chat
    template has a generation prompt. Without it (``leave=0``), returns the logits after the last token; the last
    forward is consumed when they have been used.
    """
    memory = session.memory
    while (count := len(waiting := session.pending) - leave) > 0:
        yield from make_room(session)
        session.watch.check()
        width = memory.piece([[True] * count], _piece(memory, after))
        holds = not leave and width == count
        logits = feed(session.view, waiting[:width], holds=holds)
        if holds:
            return logits
        yield from rebased(session)
        if after is not None:
            yield from _compact_span(session, after, last=width == count)
        if width < count:
            yield None
    return None


def rebased(session: Conversation) -> Events:
    """What was re-based since this was asked last."""
    yield from (Rebased(report=report) for report in session.new_rebases())


def _piece(memory: Memory, after: After | None) -> int:
    """Tokens of one forward; no more than a probe has where what was read is compacted with its own queries."""
    most = memory.plan.chunk
    if after is None:
        return most
    probe = memory.plan_of(after.policy or memory.policy).probe_tokens
    return max(LEAST_SPAN, min(most, probe or most, memory.plan.target))


def _compact_span(session: Conversation, after: After, *, last: bool) -> Events:
    """Compact what has been read of a text and has left the recent window, less what is pinned."""
    row = session.memory.rows[0]
    start = row.compactable(after.start, session.memory.plan.prefix)
    stop = max(start, row.seen - session.memory.plan.recent)
    tokens = stop - start - row.pins.count(start, stop)
    if tokens >= (LEAST_SPAN if last else max(LEAST_SPAN, _piece(session.memory, after) // 2)):
        yield from compact(session, after.request(start, tokens), forced=False)


def make_room(session: Conversation) -> Events:
    """Compact where the row is full, or nearly so and a hook wants to know."""
    memory, row = session.memory, session.memory.rows[0]
    if memory.policy.compactor is None or memory.settings.mode != "auto":
        return
    full = row.room < 1 or row.budgets is not None
    if row.budgets is not None:
        request: Request | None = USUAL
    elif full or session.hooks.early(session, row):
        request = session.hooks.before_compaction(session, full=full)
    else:
        return
    if request is not None:
        report = yield from compact(session, request, forced=full)
        if report is None and not full:  # nothing to reclaim yet
            session.hooks.postpone(session)
    elif full:
        raise TurnEnded(
            f"the memory is full ({memory.plan.capacity} slots per head, {row.seen} tokens seen) and before_compact "
            "said no; answer 'proceed' or a policy when context.full is true, or raise cap"
        )


def compact(
    session: Conversation, request: Request, *, forced: bool
) -> Generator[Event | None, None, CompactionReport | None]:
    """Compact now; returns the report, ``None`` where there was nothing to reclaim."""
    memory, row = session.memory, session.memory.rows[0]
    if row.budgets is not None and request is not USUAL:  # one that was interrupted: a compaction of its own
        begun = yield from compact(session, USUAL, forced=True)
        return (yield from compact(session, request, forced=forced)) or begun
    policy = row.job.policy if row.job is not None else request.policy or memory.policy
    if not RowCompaction(memory, row, request).worthwhile:
        return None
    yield CompactionStarted(policy=policy.name, tokens_seen=row.seen, slots=row.held, forced=forced)
    report: CompactionReport | None = memory.compact(row, request)
    yield from rebased(session)
    if report is not None:
        session.compacted(report)
        yield CompactionFinished(report=report)
    return report


def write(session: Conversation, reply: Reply, decoding: Decoding, *, keep_open: bool) -> Events:
    """Decode until the reply ends; ``reply`` is filled on the way, so that it is there however the turn ends.

    A character that is incomplete at the end is shown as it is, unless the reply goes on.
    """
    pieces, rest = TextPieces(session.tokenizer, reply.ids), ""
    try:
        pin_reply(session, max(session.reply_start, session.holding.seen))
        yield from _decode(session, reply, decoding, pieces)
    except Interrupted as stop:
        reply.reason = stop.reason
    finally:
        rest = "" if keep_open else pieces.rest()
        reply.text += rest
    if rest:
        yield TextEvent(text=rest)


def _decode(session: Conversation, reply: Reply, decoding: Decoding, pieces: TextPieces) -> Events:
    reason: Reason | None = None
    while reason is None:
        logits = yield from read(session, leave=0)
        assert logits is not None  # noqa: S101  # there is always something to read
        token, scores = _take(session, decoding, reply, logits)
        text = "" if token in decoding.ends else pieces.push(token)
        reply.text += text
        reply.ids.append(token)
        reason = _ended(decoding, token, scores)  # before the events: the turn may end at any of them
        yield TokenEvent(id=token)
        if text:
            yield TextEvent(text=text)
        yield from rebased(session)
    reply.reason = reason


def _take(session: Conversation, decoding: Decoding, reply: Reply, logits: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Choose the next token, take it into the conversation, and only then count what it was chosen by as read.

    Wherever this ends early there is something left to be read again.
    """
    token, scores = choose(decoding, logits, session.generator)
    decoding.add(token)
    reply.end = token if token in decoding.ends else None
    session.ids.append(token)
    try:
        pin_reply(session, len(session.ids) - 1)
    except BaseException:
        session.ids.pop()
        raise
    session.memory.commit()
    return token, scores


def pin_reply(session: Conversation, start: int) -> None:
    """Pin what the model writes, where its role is pinned.

    Raises:
        CapTooSmall: it does not fit.

    """
    if "assistant" in session.settings.pin_roles and start < len(session.ids):
        pin_coming(session.memory, session.memory.rows[0], [(start, len(session.ids))])


def _ended(decoding: Decoding, token: int, scores: torch.Tensor) -> Reason | None:
    if token in decoding.ends:
        return "end"
    if not decoding.stops(scores):
        return None
    length = decoding.config.max_length
    return "length" if length is not None and decoding.length >= length else "stop"


def finished(reply: Reply) -> TurnFinished:
    """The last event of a turn."""
    return TurnFinished(reason=reply.reason, text=reply.text, tokens=len(reply.ids))
