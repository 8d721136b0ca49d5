"""Changes of a session that take several statements and are undone as a whole if an interrupt or error cuts them short.

Before a change, the old state is stored in the session (``session.before``) in one assignment. After the change, this
stored state is cleared in one assignment. If a later turn finds a stored state, the change did not finish, and the old
state is restored. If an interrupt cuts the restoring short, the restoring is repeated; restoring twice gives the same
result as restoring once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agentmem.sessions.conversation import Before, Conversation


def _before(session: Conversation) -> Before:
    """Return those parts of a session's current state that :func:`put_back` restores."""
    reply, memory = session.draft, session.holding.memory
    sequence = None if memory is None else memory.sequences[0]
    return Before(
        session.dialogue,
        reply,
        ([], "", None) if reply is None else (reply.ids, reply.text, reply.end),
        session.reply_start,
        len(session.ids),
        session.ids[-1:],  # type: ignore[arg-type]  # a slice of an array is an array
        len(session.entries),
        sequence,
        None if sequence is None else sequence.pins,
    )


@contextmanager
def changing(session: Conversation) -> Iterator[Before]:
    """Return a context manager that undoes all changes of a ``with`` block if the block ends by an error or interrupt.

    The block must not run a forward. It may remove the newest id of the session, but no older ids. It gets the state
    before the change, for :func:`unread`.
    """
    try:
        session.before = before = _before(session)
        yield before
        session.before = None
    except BaseException:
        put_back(session)
        raise


@contextmanager
def unread(session: Conversation, before: Before) -> Iterator[None]:
    """Return a context manager that undoes a change if reading its ids ends by an error before any of them was read.

    ``before`` is the state before the change. If the memory has read some of the ids, or has compacted, nothing is
    undone: the session keeps the ids, and its next turn reads the rest.
    """
    sequence = before.sequence
    read = None if sequence is None else (sequence.seen, sequence.state)
    try:
        yield
    except Exception:
        if sequence is not None and read == (sequence.seen, sequence.state):
            session.before = before
            put_back(session)
        raise


def put_back(session: Conversation) -> None:
    """Undo a change that :func:`changing` began and that did not finish, if there is one."""
    before = session.before
    if before is None:
        return
    session.dialogue, session.draft, session.reply_start = before.dialogue, before.reply, before.reply_start
    if before.reply is not None:
        before.reply.ids, before.reply.text, before.reply.end = before.said
    session.ids[before.ids - len(before.newest) :] = before.newest
    del session.entries[before.entries :]
    if before.sequence is not None and before.pins is not None:
        before.sequence.pins = before.pins
    session.before = None
