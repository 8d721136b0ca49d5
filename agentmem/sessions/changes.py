"""Changes of a session that take several statements and are undone as a whole if an interrupt or error cuts them short.

The old state is stored first, in one assignment, and cleared last, in one assignment. If a stored state is found later,
the change did not finish and the old state is restored. Restoring twice gives the same result as restoring once, so it
can be repeated if an interrupt cuts it short.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agentmem.sessions.conversation import Before, Conversation


def _before(session: Conversation) -> Before:
    """Return the current state of a session; a closed session has no memory."""
    reply, memory = session.reply, session.holding.memory
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
def changing(session: Conversation) -> Iterator[None]:
    """Undo all statements of the ``with`` block if one of them fails or an interrupt comes.

    The block must not run a forward, and must not remove any id except the newest.
    """
    try:
        session.before = _before(session)
        yield
        session.before = None
    except BaseException:
        put_back(session)
        raise


def put_back(session: Conversation) -> None:
    """Undo an unfinished change of the session, if there is one."""
    before = session.before
    if before is None:
        return
    session.dialogue, session.reply, session.reply_start = before.dialogue, before.reply, before.reply_start
    if before.reply is not None:
        before.reply.ids, before.reply.text, before.reply.end = before.said
    session.ids[before.ids - len(before.newest) :] = before.newest
    del session.entries[before.entries :]
    if before.sequence is not None and before.pins is not None:
        before.sequence.pins = before.pins
    session.before = None
