"""The turns of a session: reading messages, reading texts and writing replies, each with its pins and compactions."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from agentmem.errors import SettingsRefused
from agentmem.hf.decoding import Decoding, prepare
from agentmem.hf.support import refuse_training
from agentmem.memory.pinning import pin_coming
from agentmem.reference_queries.patterns import Marks
from agentmem.sessions import turn
from agentmem.sessions.arguments import refusal
from agentmem.sessions.changes import changing, unread
from agentmem.sessions.chat.text_decoder import TextPieces
from agentmem.sessions.chat.vocabulary import check_known, tokens
from agentmem.sessions.compaction_requests import request_of
from agentmem.sessions.conversation import Conversation, Interrupted, Reply
from agentmem.sessions.newest_request import hold_request, release_request, report_request
from agentmem.sessions.options import TARGET, How
from agentmem.sessions.transcript import Entry
from agentmem.sessions.turn import After

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.sessions.chat.dialogue import Delta, Dialogue, Message
    from agentmem.sessions.chat.template import ChatTemplate


def messages(session: Conversation, given: Sequence[Message], how: How) -> turn.Steps:
    """Read messages through the chat template and yield the steps of the turn: events, and requests to feed ids.

    An open reply is closed first, even if it is incomplete. If an error comes before the memory has read any of it, the
    session is unchanged.
    """
    closed = _closed(session)
    dialogue, delta = template(session).append(closed, *given)
    check_known(session, "append", delta.ids)
    after = _after(session, len(delta.ids), how)
    _check_readable(session, len(delta.ids), after)
    with changing(session) as before:
        _pin(session, delta, closed.fed, pin=how.pin)
        close_reply(session)
        session.dialogue = dialogue
        _take(session, delta)
        hold_request(session, wanted=how.compact is None or all(message.role != "user" for message in given))
    with unread(session, before):
        yield from _read(session, after)


def text(session: Conversation, given: str | Sequence[int], how: How) -> turn.Steps:
    """Read a text or ids without the chat template; yield the steps of the turn: events, and requests to feed ids.

    An open reply is closed first, even if it is incomplete. If an error comes before the memory has read any of it, the
    session is unchanged.
    """
    ids = _ids(session, given)
    start = len(session.ids)
    after = _after(session, len(ids), how)
    _check_readable(session, len(ids), after)
    with changing(session) as before:
        if how.pin:
            pin_coming(session.memory, session.memory.sequences[0], [(start, start + len(ids))])
        close_reply(session)
        session.ids.extend(ids)
        session.entries.append(Entry(kind="text", role=None, start=start, stop=len(session.ids)))
    with unread(session, before):
        yield from _read(session, after)


def _check_readable(session: Conversation, tokens: int, after: After | None) -> None:
    """Check before any work that the model can read, and that a memory that does not compact has room.

    Raises:
        UnsupportedModel: the model is in training mode.
        MemoryCapExceeded: the memory does not compact by itself and cannot take so many tokens more.

    """
    refuse_training(session.runtime.model)
    if after is None:  # otherwise compactions make room while the text is read
        session.engine.check_room(session.memory.sequences[0], len(session.pending) + tokens - 1)  # one stays pending


def _read(session: Conversation, after: After | None) -> turn.Steps:
    reply = Reply(reason="read")
    try:
        yield from turn.read(session, after)
    except Interrupted as stop:
        reply.reason = stop.reason
    yield turn.finished(reply)


def template(session: Conversation) -> ChatTemplate:
    """Return the session's chat template.

    Raises:
        SettingsRefused: the tokenizer has no chat template.

    """
    if session.template is None:
        raise SettingsRefused(
            "this tokenizer has no chat template, so there are no roles; use session.read(text), or a chat model"
        )
    return session.template


def begin_reply(session: Conversation, options: dict[str, Any]) -> Decoding:
    """Open a reply if no reply is open, and return the state for decoding this reply.

    The state has the logits processors and stopping criteria that transformers makes from the options.

    If an error is raised, the session is unchanged.

    Raises:
        SettingsRefused: there are no new ids for the model to reply to.
        UnsupportedGeneration: a session does not support one of the options.
        UnsupportedModel: the model is in training mode.

    """
    refuse_training(session.runtime.model)
    with changing(session):
        open_reply(session)
        _check_new(session)
        return prepare(session.view, session.ids, session.tokenizer, options)


def replying(session: Conversation, options: dict[str, Any], *, keep_open: bool) -> turn.Steps:
    """Write a reply and yield the steps of the turn: events, and requests to feed ids.

    :meth:`agentmem.sessions.session.Session.generate` explains the arguments.
    """
    decoding = begin_reply(session, options)
    reply = session.last = session.draft or Reply()
    reply.reason = "cancelled"
    try:
        yield from turn.write(session, reply, decoding, keep_open=keep_open)
    finally:
        if reply.ids and not keep_open:
            with changing(session):
                close_reply(session)
    yield turn.finished(reply)


def _check_new(session: Conversation) -> None:
    if not session.pending or (session.draft is not None and session.draft.end is not None):
        raise SettingsRefused(
            "generate: there is nothing new that a reply could go on from; append a message or read a text first (a "
            "reply that has ended and was kept open goes on when something was said: session.say)"
        )


def say(session: Conversation, text: str) -> None:
    """Add a text to the reply, in place of the reply's end token if it has one; see :meth:`Session.say`."""
    ids = tokens(session, "say", text)
    with changing(session):
        open_reply(session)
        reply = session.draft or Reply()
        kept = reply.ids if reply.end is None else reply.ids[:-1]
        pieces = TextPieces(session.tokenizer, kept)
        said = "".join(map(pieces.push, ids)) + pieces.rest()
        if reply.end is not None:  # the memory has not consumed the end: the last id is not fed before the next turn
            session.ids.pop()
        session.ids.extend(ids)
        reply.ids, reply.text, reply.end = [*kept, *ids], reply.text + said, None


def open_reply(session: Conversation) -> None:
    """Open a reply if no reply is open: append the generation prompt to the ids, and pin the newest request."""
    if session.draft is None:
        if session.template is not None and session.dialogue.messages:
            dialogue, delta = session.template.open_reply(session.dialogue)
            check_known(session, "chat_template", delta.ids)
            _pin(session, delta, session.dialogue.fed, pin=False)
            session.dialogue = dialogue
            _take(session, delta)
            if not hold_request(session):
                report_request(session)
        session.draft = Reply()
        session.reply_start = len(session.ids)


def close_reply(session: Conversation) -> None:
    """Close the open reply, if there is one, even if it is incomplete.

    The reply is recorded for the session's transcript. If the chat template opened the reply, it also becomes a message
    of ``session.dialogue``. The newest request, which was pinned until its reply, is unpinned.
    """
    session.dialogue = _closed(session)
    if (entry := reply_entry(session)) is not None:
        session.entries.append(entry)
    if session.draft is not None:
        release_request(session)
    session.draft = None


def _closed(session: Conversation) -> Dialogue:
    """Return the dialogue with the open reply, if there is one, recorded as a message.

    An end token that does not belong to the chat template counts as text of the reply.
    """
    if not session.dialogue.open:
        return session.dialogue
    made, reply = template(session), session.draft or Reply()
    end = reply.end if reply.end in made.end_ids else None
    kept = reply.ids if end is None else reply.ids[:-1]
    said = str(session.tokenizer.decode(kept, skip_special_tokens=False)) if kept else ""
    return made.close_reply(session.dialogue, said, end=end)


def reply_entry(session: Conversation) -> Entry | None:
    """Return the record of the open reply for the transcript: where its ids begin and end, and its role.

    The result is ``None`` if no reply is open or the reply has no ids yet.
    """
    if session.draft is None or session.reply_start == len(session.ids):
        return None
    return Entry(kind="reply", role="assistant", start=session.reply_start, stop=len(session.ids))


def _after(session: Conversation, tokens: int, how: How) -> After | None:
    if how.compact is None:
        return None
    target = TARGET if how.target is None else how.target
    memory, request = session.memory, request_of(session, how.focus, how.policy)
    if memory.settings.mode == "off":
        raise SettingsRefused("compact='after': this session never compacts (mode='off'); leave it out")
    chosen = request.policy or memory.policy
    if chosen.compactor is None:
        raise SettingsRefused(f"compact='after': policy {chosen.name!r} never compacts; name another of the session's")
    if isinstance(target, int) and target > memory.plan.target:
        raise SettingsRefused(
            f"target={target!r}: a compaction of this memory leaves {memory.plan.target} slots per head in all; give "
            "fewer, a fraction such as 0.25, or raise the share"
        )
    return After(len(session.ids), tokens, target, request.focus, request.policy)


# ---- spans and pins


def _take(session: Conversation, delta: Delta) -> None:
    start = len(session.ids)
    session.ids.extend(delta.ids)
    for span in delta.spans:
        place = {"start": start + span.start, "stop": start + span.stop}
        session.entries.append(Entry(kind="message", role=span.role, name=span.name, **place))


def _pin(session: Conversation, delta: Delta, fed: int, *, pin: bool) -> None:
    """Pin messages of a delta that is about to be read: all if ``pin`` is true, else those that the settings select.

    ``fed`` is the number of messages that were fed before this delta. The delta may begin with markup that closes the
    last of these messages. This markup is not pinned: if it had to be pinned, a session with no room for further pins
    could not read anything more.

    Raises:
        CapTooSmall: the pins do not fit; nothing was changed.

    """
    settings, start = session.settings, len(session.ids)
    new = [span for span in delta.spans if span.message is None or span.message >= fed]
    whole = [span for span in new if pin or span.role in settings.pin_roles or span.name in settings.pin_names]
    places = [(start + span.start, start + span.stop) for span in whole]
    if settings.pin_pattern and session.memory.language is not None:
        found = Marks(settings.pin_pattern, session.memory.language.read).spans(delta.ids)
        places += [(start + low, start + high) for low, high in found]
    pin_coming(session.memory, session.memory.sequences[0], places)


def _ids(session: Conversation, given: str | Sequence[int]) -> list[int]:
    if isinstance(given, str):
        return tokens(session, "read", given)
    try:
        ids = [operator.index(each) for each in given]
    except TypeError:
        raise refusal("read", given, "give a text, or ids, which are whole numbers") from None
    check_known(session, "read", ids)
    return ids
