"""Forked processes: no thread but the one that forked lives on, so what others held or ran is made anew or let go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from agentmem.sessions import aio

if TYPE_CHECKING:
    from agentmem.sessions.conversation import Host

RUNTIMES: WeakSet[Host] = WeakSet()
_TAKEN: list[Any] = []
"""Locks that the thread that forks has taken meanwhile."""


def _before() -> None:
    """Wait for what runs now: the child must not find memories half changed, nor locks that nobody gives back."""
    runtimes = list(RUNTIMES)
    for lock in [*(each.scheduler.lock for each in runtimes), *(each.guard for each in runtimes), aio.GUARD]:
        lock.acquire()
        _TAKEN.append(lock)


def _after() -> None:
    while _TAKEN:
        _TAKEN.pop().release()


def _in_child() -> None:
    """The models' threads and whoever waited for a lease are the parent's."""
    aio.THREADS.clear()
    for runtime in list(RUNTIMES):
        runtime.waiters.clear()
        runtime.scheduler.forget()
        for holding in runtime.leases.holdings:
            holding.inherit(runtime.folder)
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
