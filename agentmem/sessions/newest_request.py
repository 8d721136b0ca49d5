"""The newest request of a conversation, which is pinned until it is answered (:attr:`SessionSettings.pin_request`).

The request is the user's last message, with the user's messages right before it. It is pinned when the session takes
the message. It is pinned anew when another message is taken before the reply, and when the reply is opened. It is
unpinned when the reply is closed.
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
    """Pin the newest request, or only its last message if the whole request does not fit.

    With ``wanted=False``, or if the setting ``pin_request`` is off, unpin the request instead. Return ``False`` only
    if a request should be pinned and not even its last message fits.
    """
    memory, sequence = session.memory, session.memory.sequences[0]
    if not (wanted and session.settings.pin_request):
        release_request(session)
        return True
    return any(pin_request(memory, sequence, spans) for spans in _requests(session))


def release_request(session: Conversation) -> None:
    """Unpin the newest request; all other pins stay.

    Do nothing if the session's memory is on disk or closed.
    """
    memory = session.holding.memory
    if memory is not None:
        sequence = memory.sequences[0]
        sequence.pins = replace(sequence.pins, request=())


def report_request(session: Conversation) -> None:
    """Log that the newest request is not pinned and may be compacted before the reply to it ends.

    The log event has the number of tokens of the request and the most tokens that could be pinned.
    """
    memory, sequence = session.memory, session.memory.sequences[0]
    pins = replace(sequence.pins, request=_requests(session)[-1])
    tokens, most = request_size(memory, pins), most_requested(memory, pins)
    log_events.request_not_pinned(memory.names, tokens=tokens, most=most)


def _requests(session: Conversation) -> tuple[Spans, ...]:
    """Return the choices of tokens to pin: first the whole newest request, then only its last message.

    If the transcript does not have one entry for each message of the request, the whole request is the only choice.
    If there is no request, the spans are empty.
    """
    entries = [entry for entry in session.entries if entry.kind != "summary"]
    spans = [(entry.start, entry.stop) for entry in _last_of_user(entries)]
    messages = session.dialogue.messages[: session.dialogue.fed]
    if len(spans) != len(_last_of_user(messages)):  # some entries hold only the markup that closes a message
        return (joined(spans),)
    return joined(spans), joined(spans[:1])


def _last_of_user(given: Sequence[Written]) -> list[Written]:
    """Return the last item with the role user and the user's items right before it, in reverse order."""
    newest = dropwhile(lambda each: each.role != "user", reversed(given))
    return list(takewhile(lambda each: each.role == "user", newest))
