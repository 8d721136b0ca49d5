"""The newest request of a conversation, which is pinned until it is answered: :attr:`SessionSettings.pin_request`.

It is a user's last message, with the user's messages right before it. It is pinned when it is taken into the session,
again with whatever else is read before its reply and when the reply is opened, and unpinned when the reply is closed.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import dropwhile, takewhile
from typing import TYPE_CHECKING, TypeVar

from agentmem.memory.pinning import most_requested, pin_request, request_size
from agentmem.memory.pins import joined
from agentmem.reporting import log_events
from agentmem.sessions.chat.dialogue import Message
from agentmem.sessions.transcript import Entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.memory.pins import Spans
    from agentmem.sessions.conversation import Conversation

Written = TypeVar("Written", Entry, Message)


def hold_request(session: Conversation, *, wanted: bool = True) -> bool:
    """Pin the newest request, or its last message where that alone fits; whether all is pinned that was wanted."""
    memory, sequence = session.memory, session.memory.sequences[0]
    if not (wanted and session.settings.pin_request):
        release_request(session)
        return True
    return any(pin_request(memory, sequence, spans) for spans in _requests(session))


def release_request(session: Conversation) -> None:
    """Unpin the newest request; what is pinned besides stays pinned. A session that was closed meanwhile has none."""
    memory = session.holding.memory
    if memory is not None:
        sequence = memory.sequences[0]
        sequence.pins = replace(sequence.pins, request=())


def report_request(session: Conversation) -> None:
    """Log that a reply is written whose request may be compacted, with its length and the most that it may have."""
    memory, sequence = session.memory, session.memory.sequences[0]
    pins = replace(sequence.pins, request=_requests(session)[-1])
    tokens, most = request_size(memory, pins), most_requested(memory, pins)
    log_events.request_not_pinned(session=session.name, tokens=tokens, most=most)


def _requests(session: Conversation) -> tuple[Spans, ...]:
    """The newest request as it may be pinned: whole, then its last message alone; nothing where there is none."""
    entries = [entry for entry in session.entries if entry.kind != "summary"]
    spans = [(entry.start, entry.stop) for entry in _last_of_user(entries)]
    messages = session.dialogue.messages[: session.dialogue.fed]
    if len(spans) != len(_last_of_user(messages)):  # markup that closes a message is an entry of its own here
        return (joined(spans),)
    return joined(spans), joined(spans[:1])


def _last_of_user(given: Sequence[Written]) -> list[Written]:
    """The last of them that is a user's, and those of a user's right before it, the last one first."""
    newest = dropwhile(lambda each: each.role != "user", reversed(given))
    return list(takewhile(lambda each: each.role == "user", newest))
