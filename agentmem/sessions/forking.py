"""Handlers for ``os.fork``.

In the child process only the forking thread exists, so a lock that another thread held would never be released there.
Therefore the forking thread takes all locks before the fork, and both processes release them afterwards. The child also
gives up the threads and queues of the parent, and links or copies the files of memories on disk.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from agentmem.sessions import aio

if TYPE_CHECKING:
    from agentmem.sessions.conversation import Conversation, Host

RUNTIMES: WeakSet[Host] = WeakSet()
_TAKEN: list[Any] = []
"""Locks that the forking thread holds during the fork."""


def _before() -> None:
    """Take all locks before a fork.

    Otherwise memories could be in the middle of a change in the child, or locks could be held by threads that do not
    exist in the child. The locks of ``agentmem.hf`` are taken after these; see :mod:`agentmem.hf.fork_lock`.
    """
    runtimes = list(RUNTIMES)
    for lock in [*(each.scheduler.lock for each in runtimes), *(each.guard for each in runtimes), aio.GUARD]:
        lock.acquire()
        _TAKEN.append(lock)


def _after() -> None:
    while _TAKEN:
        _TAKEN.pop().release()


def _in_child() -> None:
    """Prepare the child process: forget the threads and waiting turns, which exist only in the parent process.

    A turn of another thread ends at the step where it was, as if it had been closed there: with the model's lock held,
    no turn was in the middle of a step. The child also gets its own links to the files of memories on disk, or copies
    of these files. Then all locks are released.
    """
    try:
        aio.THREADS.clear()
        for runtime in list(RUNTIMES):
            runtime.waiters.clear()
            runtime.scheduler.forget()
            for session in list(runtime.sessions):
                _end_turn(runtime, session)
            for holding in runtime.leases.holdings:
                holding.inherit(runtime.folder)
    finally:
        _after()


def _end_turn(runtime: Host, session: Conversation) -> None:
    if not session.busy or session.thread == threading.get_ident():
        return
    with suppress(Exception):  # the session is valid at this step; the rest of its turn may refuse something
        if session.leave is not None:
            session.leave()
    runtime.end(session, session.turn)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
