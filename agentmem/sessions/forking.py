"""Handlers for ``os.fork``.

In the child process only the forking thread exists, so a lock that another thread held would never be released there.
Therefore the forking thread takes all locks before the fork, and both processes release them afterwards. The child also
gives up the threads and queues of the parent, and links or copies the files of memories on disk.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from agentmem.sessions import aio

if TYPE_CHECKING:
    from agentmem.sessions.conversation import Host

RUNTIMES: WeakSet[Host] = WeakSet()
_TAKEN: list[Any] = []
"""Locks that the forking thread holds during the fork."""


def _before() -> None:
    """Take all locks before a fork.

    Otherwise memories could be in the middle of a change in the child, or locks could be held by threads that do not
    exist in the child.
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

    The child also gets its own links to the files of memories on disk, or copies of these files. Then all locks are
    released.
    """
    aio.THREADS.clear()
    for runtime in list(RUNTIMES):
        runtime.waiters.clear()
        runtime.scheduler.forget()
        for holding in runtime.leases.holdings:
            holding.inherit(runtime.folder)
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
