"""Changes of a session that take several statements: all of them count, or none, wherever an interrupt comes.

What there was is written down first, in one assignment, and crossed out last, in one assignment. Whoever finds it not
crossed out puts back what there was; putting back twice does nothing more, so that it can be interrupted, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agentmem.sessions.conversation import Before, Conversation


def _before(session: Conversation) -> Before:
    """A session as it is now; a closed one has no memory."""
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
    """Around statements of which all count or none. They run no forward, and take away no id but the newest."""
    try:
        session.before = _before(session)
        yield
        session.before = None
    except BaseException:
        put_back(session)
        raise


def put_back(session: Conversation) -> None:
    """Undo changes that were begun and did not come to their end; usually there are none."""
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
