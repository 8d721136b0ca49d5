"""Reading messages and texts: what is new of them, what of it is pinned, and when it is compacted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from agentmem.errors import SettingsRefused
from agentmem.marks import Marks
from agentmem.promotion import check_pins
from agentmem.sessions import turn
from agentmem.sessions.events import Event
from agentmem.sessions.transcript import Entry
from agentmem.sessions.turn import After, Interrupted, Reply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.sessions.dialogue import Delta, Message, Span
    from agentmem.sessions.session import Session
    from agentmem.sessions.template import ChatTemplate

TARGET = 0.25
"""What is left of a text that is compacted after it was read, unless said otherwise."""


def messages(
    session: Session,
    given: Sequence[Message],
    *,
    pin: bool = False,
    compact: str | None = None,
    target: float = TARGET,
    focus: str = "",
    policy: str | None = None,
) -> Iterator[Event]:
    """Read messages through the chat template."""
    if session.dialogue.open:
        close_reply(session)
    dialogue, delta = template(session).append(session.dialogue, *given)
    after = _after(session, len(delta.ids), compact, target, focus, policy)
    spans = _pinned(session, delta, pin=pin)
    session.dialogue = dialogue
    _take(session, delta, spans)
    yield from _read(session, after)


def text(
    session: Session,
    given: str | Sequence[int],
    *,
    pin: bool = False,
    compact: str | None = None,
    target: float = TARGET,
    focus: str = "",
    policy: str | None = None,
) -> Iterator[Event]:
    """Read a text, or ids, as they are."""
    if isinstance(given, str):
        given = session.tokenizer(given, add_special_tokens=False)["input_ids"]
    ids = [int(each) for each in given]
    start = len(session.ids)
    after = _after(session, len(ids), compact, target, focus, policy)
    if pin:
        _check(session, len(ids))
        session.memory.rows[0].pins.add(start, start + len(ids))
    session.ids.extend(ids)
    session.entries.append(Entry(kind="text", role=None, start=start, stop=len(session.ids), pinned=pin))
    yield from _read(session, after)


def _read(session: Session, after: After | None) -> Iterator[Event]:
    reply = Reply(reason="read")
    try:
        yield from turn.read(session, after)
    except Interrupted as stop:
        reply.reason = stop.reason
    yield turn.finished(reply)


def template(session: Session) -> ChatTemplate:
    """The session's chat template.

    Raises:
        SettingsRefused: its tokenizer has none.

    """
    if session.template is None:
        raise SettingsRefused(
            "this tokenizer has no chat template, so there are no roles; use session.read(text), or a chat model"
        )
    return session.template


def open_reply(session: Session) -> None:
    """Begin a reply, unless one is open already."""
    if session.reply is None:
        if session.template is not None and session.dialogue.messages:
            session.dialogue, delta = session.template.open_reply(session.dialogue)
            _take(session, delta, [])
        session.reply = Reply()
        session.reply_start = len(session.ids)


def close_reply(session: Session) -> None:
    """End the open reply as it is, and record it."""
    reply, session.reply = session.reply or Reply(), None
    if session.dialogue.open:
        kept = reply.ids[:-1] if reply.end is not None else reply.ids
        said = str(session.tokenizer.decode(kept, skip_special_tokens=False)) if kept else ""
        session.dialogue = template(session).close_reply(session.dialogue, said, end=reply.end)
    if reply.ids:
        session.entries.append(Entry(kind="reply", role="assistant", start=session.reply_start, stop=len(session.ids)))


def slots_of(session: Session, target: float) -> int:
    """Slots per head that a compaction of everything leaves between prefix and recent.

    Raises:
        SettingsRefused: no fraction between 0 and 1, and no count above 0.

    """
    _check_target(target)
    if isinstance(target, int):
        return target
    memory, row = session.memory, session.memory.rows[0]
    heads = sum(memory.shape.layers[index].kv_heads for index in memory.shape.compactable)
    held = row.held // max(1, heads) - row.front(memory.plan.prefix) - memory.plan.recent
    return max(1, math.ceil(target * max(0, held)))


def _after(
    session: Session, tokens: int, compact: str | None, target: float, focus: str, policy: str | None
) -> After | None:
    if compact is None:
        return None
    if compact != "after":
        raise SettingsRefused(f"compact={compact!r} is unknown; write 'after', or leave it out")
    _check_target(target)
    request = session.request(focus, policy)
    return After(len(session.ids), tokens, target, request.focus, request.policy)


def _check_target(target: float) -> None:
    if not (0 < target < 1 or (isinstance(target, int) and target >= 1)):
        raise SettingsRefused(f"target={target!r}: give a fraction between 0 and 1, such as 0.25, or slots per head")


# ---- spans and pins


def _take(session: Session, delta: Delta, pinned: Sequence[Span]) -> None:
    start = len(session.ids)
    session.ids.extend(delta.ids)
    for span in delta.spans:
        session.entries.append(
            Entry(
                kind="message",
                role=span.role,
                name=span.name,
                start=start + span.start,
                stop=start + span.stop,
                pinned=span in pinned,
            )
        )


def _pinned(session: Session, delta: Delta, *, pin: bool) -> list[Span]:
    """Pin what is to be pinned of a delta that is about to be read; returns the spans that are pinned whole.

    Raises:
        CapTooSmall: the pins do not fit; nothing was changed.

    """
    settings, row, start = session.settings, session.memory.rows[0], len(session.ids)
    whole = [span for span in delta.spans if pin or span.role in settings.pin_roles or span.name in settings.pin_names]
    places = [(start + span.start, start + span.stop) for span in whole]
    if settings.pin_pattern and session.memory.language is not None:
        found = Marks(settings.pin_pattern, session.memory.language.read).spans(delta.ids)
        places += [(start + low, start + high) for low, high in found]
    wanted = row.pins.copy()
    for low, high in places:
        wanted.add(low, high)
    prefix = session.memory.plan.prefix
    _check(session, wanted.count(prefix, 1 << 60) - row.pins.count(prefix, 1 << 60))
    row.pins = wanted
    return whole


def _check(session: Session, more: int) -> None:
    check_pins(session.memory, session.memory.rows[0], more)
