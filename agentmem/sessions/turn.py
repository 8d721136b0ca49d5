"""The steps of one turn of a session: reading ids, compacting when necessary, and writing a reply.

A turn is a generator, which yields events and, before each forward, a request to feed ids. The session is valid
whenever the generator yields, so the turn can end at any of these points.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agentmem.compaction.request import USUAL, Request
from agentmem.engine import Want, in_turn
from agentmem.errors import TurnEnded
from agentmem.hf.decoding import Decoding, choose
from agentmem.memory.pinning import pin_coming
from agentmem.memory.pins import size, within
from agentmem.planning.pricing import MIN_BUDGET
from agentmem.sessions.chat.text_decoder import TextPieces
from agentmem.sessions.conversation import Conversation, Interrupted, Reply
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
from agentmem.sessions.leasing.swapping import part, widen
from agentmem.sessions.newest_request import report_request

if TYPE_CHECKING:
    import torch

    from agentmem.contracts import Policy
    from agentmem.memory.memory import Memory
    from agentmem.reporting.report import CompactionReport

Step = Event | Want
"""A value that a turn yields: an event, or a request for tokens that must be fed before the turn goes on."""
Steps = Generator[Step, None, None]
LEAST_SPAN = 16
"""Least number of tokens in a span that is compacted after it was read."""


@dataclass(slots=True)
class After:
    """The options of a compaction that runs right after a text was read, and where this text is in the conversation."""

    start: int
    """Index of the first token of the text."""
    tokens: int
    """Number of tokens of the text."""
    target: float | int
    """How much of the text the compaction leaves: a fraction, or slots per head."""
    focus: tuple[int, ...] = ()
    policy: Policy | None = None

    def request(self, start: int, tokens: int) -> Request:
        """Return the request to compact a part of the text: ``tokens`` tokens, the first of which is ``start``."""
        share = self.target if isinstance(self.target, float) else self.target / max(1, self.tokens)
        return Request(max(1, math.ceil(share * tokens)), start, self.focus, self.policy)


def read(
    session: Conversation, after: After | None = None, *, leave: int = 1
) -> Generator[Step, None, torch.Tensor | None]:
    """Feed the pending ids except the last ``leave`` of them; yield requests to feed ids, and events of compactions.

    Pending ids are the conversation's ids that the memory has not consumed yet. Between turns the last id always stays
    pending: the first forward of a reply needs an id, and not every chat template has a generation prompt. With
    ``leave=0`` all ids are fed, and the logits after the last id are returned. In this case the last forward is not
    committed (its ids do not count as consumed yet): the caller must commit it after using the logits.
    """
    memory = session.memory
    while (count := len(waiting := session.pending) - leave) > 0:
        yield from share(session)
        yield from make_room(session)
        session.watch.check()
        width = session.engine.piece([[True] * count], _piece(memory, after))
        want = session.want(waiting[:width])
        yield want
        fed, logits = want.result()
        if not leave and fed == count:
            return logits
        session.engine.commit()
        yield from rebased(session)
        if after is not None:
            yield from _compact_span(session, after, last=fed == count)
    return None


def share(session: Conversation) -> Steps:
    """Adapt an elastic lease to the other turns: give bytes back if others wait, take more if the memory is full.

    A memory that holds more than its part is compacted first, if its hook allows that.
    """
    runtime, holding, sequence = session.runtime, session.holding, session.memory.sequences[0]
    places = list(runtime.waiters)[:1]
    wanted = bool(places) and places[0].tried
    if not holding.elastic or sequence.job is not None or not (wanted or sequence.room < 1):
        return
    lease = part(runtime, holding)
    if lease > holding.lease and not places:
        widen(session, lease)
    elif wanted and holding.refused < lease < holding.lease:
        if not holding.takes(lease):
            yield from _compact_for(session, lease)
        if holding.takes(lease):
            holding.resize(lease)
            runtime.wake_next()
        else:
            holding.refused = lease


def _compact_for(session: Conversation, lease: int) -> Steps:
    """Compact the memory to what the plan of a smaller lease leaves, if the hook allows that and the pins fit."""
    memory, sequence, plan = session.memory, session.memory.sequences[0], session.holding.plans(lease)[0]
    slots = plan.target - plan.recent - size(within(sequence.pins.all, plan.prefix, sequence.seen)) - plan.prefix
    if slots >= MIN_BUDGET and sequence.mean_slots() > plan.target:
        request = session.hooks.before_compaction(session.name, memory, full=False)
        if request is not None:
            yield from compact(session, replace(request, slots=slots), forced=True)


def rebased(session: Conversation) -> Steps:
    """Yield an event for each re-basing that has not been reported yet."""
    yield from (Rebased(report=report) for report in session.new_rebases())


def _piece(memory: Memory, after: After | None) -> int:
    """Return the most tokens that one forward may feed.

    The plan sets this number (``chunk``). If ``after`` is given, the text is compacted right after it was read. A
    forward may then feed no more tokens than the policy's probe has, if there is a probe, and no more tokens than there
    are slots per head after a compaction (``target`` of the plan). However, a forward may always feed
    :data:`LEAST_SPAN` tokens in this case.
    """
    most = memory.plan.chunk
    if after is None:
        return most
    probe = memory.plan_of(after.policy or memory.policy).probe_tokens
    return max(LEAST_SPAN, min(most, probe or most, memory.plan.target))


def _compact_span(session: Conversation, after: After, *, last: bool) -> Steps:
    """Compact those tokens of a text that have left the recent window and are not pinned.

    Nothing is compacted while there are only few such tokens. ``last`` is true if the whole text has been read.
    """
    sequence = session.memory.sequences[0]
    start = sequence.compactable(after.start, session.memory.plan.prefix)
    stop = max(start, sequence.seen - session.memory.plan.recent)
    tokens = stop - start - sequence.pins.count(start, stop)
    if tokens >= (LEAST_SPAN if last else max(LEAST_SPAN, _piece(session.memory, after) // 2)):
        yield from compact(session, after.request(start, tokens), forced=False)


def make_room(session: Conversation) -> Steps:
    """Compact if the sequence is full or nearly full, and the session's hook allows it.

    Without a hook, a full sequence is compacted, but not one that is only nearly full.

    Raises:
        TurnEnded: the sequence is full, and the hook refused the compaction.

    """
    memory, sequence = session.memory, session.memory.sequences[0]
    if not session.engine.automatic:
        return
    full = sequence.room < 1 or sequence.job is not None
    if sequence.job is not None:
        request: Request | None = USUAL
    elif full or session.hooks.early(memory):
        request = session.hooks.before_compaction(session.name, memory, full=full)
    else:
        return
    if request is not None:
        report = yield from compact(session, request, forced=full)
        if report is None and not full:  # nothing to reclaim yet
            session.hooks.postpone(memory)
    elif full:
        raise TurnEnded(
            f"the memory is full ({memory.plan.capacity} slots per head, {sequence.seen} tokens seen) and "
            "before_compact said no; answer 'proceed' or a policy when context.full is true, or raise cap"
        )


def compact(session: Conversation, request: Request, *, forced: bool) -> Generator[Step, None, CompactionReport | None]:
    """Compact now and yield the events; return the report, or ``None`` if there was nothing to reclaim."""
    engine, sequence = session.engine, session.memory.sequences[0]
    report: CompactionReport | None = None
    for each in in_turn(sequence, request):
        compaction = engine.prepare(sequence, each)
        yield from rebased(session)
        if compaction is None:
            continue
        started = CompactionStarted(
            policy=compaction.job.policy.name,
            tokens_seen=sequence.seen,
            slots=sequence.held,
            forced=forced or each is not request,
        )
        yield started
        report = engine.run(compaction)
        session.compacted(report)
        yield CompactionFinished(report=report)
    return report


def write(session: Conversation, reply: Reply, decoding: Decoding, *, keep_open: bool) -> Steps:
    """Have the model write until the reply ends, and yield the steps.

    Each token is added to ``reply`` immediately, so that no token is lost if the turn fails. If the last character is
    incomplete, its text is added as the tokenizer decodes it, unless the reply is kept open.
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


def _decode(session: Conversation, reply: Reply, decoding: Decoding, pieces: TextPieces) -> Steps:
    reason: Reason | None = None
    while reason is None:
        logits = yield from read(session, leave=0)
        assert logits is not None  # noqa: S101  # at least one id is pending
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
    """Choose the next token from ``logits``, append its id to the conversation, and commit the last forward.

    ``logits`` are the result of the last forward. Return the new id, and the processed scores ``[1, vocabulary]``.

    An id is pending while the memory has not consumed it. Only the commit of a forward makes its ids consumed. The new
    id is appended before the commit and is still pending after the commit. Therefore at least one id is always pending,
    and the next turn has an id to feed even if this turn ends early.
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
    session.engine.commit()
    return token, scores


def pin_reply(session: Conversation, start: int) -> None:
    """Pin the ids from ``start`` on, which the model wrote, if the setting ``pin_roles`` contains ``assistant``.

    Raises:
        CapTooSmall: with these pins a compaction could no longer reach its target.

    """
    if "assistant" in session.settings.pin_roles and start < len(session.ids):
        sequence = session.memory.sequences[0]
        held = sequence.pins.request
        pin_coming(session.memory, sequence, [(start, len(session.ids))])
        if held and not sequence.pins.request:
            report_request(session)


def _ended(decoding: Decoding, token: int, scores: torch.Tensor) -> Reason | None:
    if token in decoding.ends:
        return "end"
    if not decoding.stops(scores):
        return None
    length = decoding.config.max_length
    return "length" if length is not None and decoding.length >= length else "stop"


def finished(reply: Reply) -> TurnFinished:
    """Return the event that ends a turn with this reply."""
    return TurnFinished(reason=reply.reason, text=reply.text, tokens=len(reply.ids))
