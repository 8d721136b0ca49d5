"""One turn of a session, a forward at a time: read, compact where it must be, write. Every step leaves it valid."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentmem.errors import SettingsRefused, TurnEnded
from agentmem.hf.decoding import Decoding, choose, feed, prepare
from agentmem.job import USUAL, Request
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
from agentmem.sessions.text import TextPieces

if TYPE_CHECKING:
    import torch

    from agentmem.contracts import Policy
    from agentmem.memory import Memory
    from agentmem.report import CompactionReport
    from agentmem.row import Row
    from agentmem.sessions.session import Session

Events = Generator[Event, None, None]
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

    def request(self, start: int, stop: int) -> Request:
        """What to leave of the tokens ``start .. stop``, a part of it all."""
        share = self.target if isinstance(self.target, float) else self.target / max(1, self.tokens)
        return Request(max(1, math.ceil(share * (stop - start))), start, self.focus, self.policy)


@dataclass(slots=True)
class Reply:
    """What the model has written in a turn."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: Reason = "cancelled"
    end: int | None = None


def read(session: Session, after: After | None = None) -> Generator[Event, None, torch.Tensor | None]:
    """Feed what is pending; yields the events of compactions. Returns the logits after the last token."""
    memory = session.memory
    logits: torch.Tensor | None = None
    row = memory.rows[0]
    while session.pending:
        yield from make_room(session)
        session.watch.check()
        width = memory.piece([[True] * len(session.pending)], _piece(memory, after))
        logits = feed(session.view, session.pending[:width])
        yield from (Rebased(report=report) for report in session.heard())
        if after is not None:
            yield from _compact_span(session, row, after)
    return logits


def _piece(memory: Memory, after: After | None) -> int:
    """Tokens of one forward; no more than a probe has where what was read is compacted with its own queries."""
    most = memory.plan.chunk
    return most if after is None else max(LEAST_SPAN, min(most, memory.plan.probe_tokens or most, memory.plan.target))


def _compact_span(session: Session, row: Row, after: After) -> Events:
    """Compact what has been read of a text and has left the recent window."""
    start = max(after.start, row.intact)
    stop = row.seen - session.memory.plan.recent
    last = not session.pending
    if stop - start >= (LEAST_SPAN if last else max(LEAST_SPAN, _piece(session.memory, after) // 2)):
        yield from compact(session, after.request(start, stop), forced=False)


def make_room(session: Session) -> Events:
    """Compact where the row is full, or nearly so and a hook wants to know."""
    memory, row = session.memory, session.memory.rows[0]
    if memory.policy.compactor is None or memory.settings.mode != "auto":
        return
    full = row.room < 1 or row.budgets is not None
    if row.budgets is not None:
        request: Request | None = USUAL
    elif full or session.asking.early(session, row):
        request = session.asking.ask(session, full=full)
    else:
        return
    if request is not None:
        yield from compact(session, request, forced=full)
    elif full:
        raise TurnEnded(
            f"the memory is full ({memory.plan.capacity} slots per head, {row.seen} tokens seen) and before_compact "
            "said no; answer 'proceed' or a policy when context.full is true, or raise cap"
        )


def compact(session: Session, request: Request, *, forced: bool) -> Generator[Event, None, CompactionReport | None]:
    """Compact now; returns the report, ``None`` where there was nothing to reclaim."""
    memory, row = session.memory, session.memory.rows[0]
    policy = request.policy or memory.policy
    yield CompactionStarted(policy=policy.name, tokens_seen=row.seen, slots=row.held, forced=forced)
    report: CompactionReport | None = memory.compact(row, request)
    yield from (Rebased(report=each) for each in session.heard())
    if report is not None:
        session.compacted(report)
        yield CompactionFinished(report=report)
    return report


def write(session: Session, reply: Reply, options: dict[str, Any]) -> Events:
    """Decode until the reply ends; ``reply`` is filled on the way, so that it is there however the turn ends."""
    pieces = TextPieces(session.tokenizer)
    decoding = prepare(session.view, session.ids, session.tokenizer, options)
    logits = yield from read(session)
    if logits is None:
        raise SettingsRefused("generate: nothing is to be read before the reply; append a message first")
    while True:
        session.watch.check()
        token, scores = choose(decoding, logits, session.generator)
        _take(session, decoding, reply, token)
        yield TokenEvent(id=token)
        if text := "" if token in decoding.ends else pieces.push(token):
            reply.text += text
            yield TextEvent(text=text)
        reason = _ended(decoding, reply, token, scores)
        if reason is not None:
            break
        logits = yield from read(session)
        assert logits is not None  # noqa: S101  # the token that was just chosen is read
    if rest := pieces.rest():
        reply.text += rest
        yield TextEvent(text=rest)
    reply.reason = reason


def _take(session: Session, decoding: Decoding, reply: Reply, token: int) -> None:
    decoding.add(token)
    reply.ids.append(token)
    session.ids.append(token)


def _ended(decoding: Decoding, reply: Reply, token: int, scores: torch.Tensor) -> Reason | None:
    if token in decoding.ends:
        reply.end = token
        return "end"
    if not decoding.stops(scores):
        return None
    length = decoding.config.max_length
    return "length" if length is not None and decoding.length >= length else "stop"


def finished(reply: Reply) -> TurnFinished:
    """The last event of a turn."""
    return TurnFinished(reason=reply.reason, text=reply.text, tokens=len(reply.ids))
