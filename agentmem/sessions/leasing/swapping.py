"""Functions that give a session its lease: they preempt other memories, and restore or copy the session's memory.

They also divide the cap among elastic leases (:class:`agentmem.sessions.settings.SessionSettings`, ``share``).

All functions run with the scheduler's lock held.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from agentmem.errors import AgentmemError, CompactionFailed
from agentmem.sessions.changes import put_back

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agentmem.compaction.request import Request
    from agentmem.sessions.conversation import Conversation, Host
    from agentmem.sessions.leasing.holding import Holding, Stage


def lend(runtime: Host, session: Conversation) -> bool:
    """Give a session its lease if the bytes are free or can be freed; return whether that succeeded.

    The session must be marked as busy before.
    """
    shared = session.holding
    copies = len(shared.sessions) > 1
    lease = _granted(runtime, shared)
    if not _free(runtime, session, lease - (0 if copies else shared.charged), copies=copies):
        return False
    if copies:
        _part(runtime, session, lease)
    else:
        shared.wake(lease)
    if not session.holding.seen:
        session.holding.identity = runtime.identity.now()  # of the model that will compute the keys
    session.holding.used = next(runtime.turns)
    session.memory.names = session.names
    runtime.speak(session, session.memory)
    return True


def _free(runtime: Host, session: Conversation, needed: int, *, copies: bool = False) -> bool:
    """Preempt idle memories until ``needed`` bytes of the cap are free for a session; return whether this succeeded.

    ``copies`` is true if the session is about to get its own copy of the memory that it shares with others.
    """
    shared = session.holding

    def may_yield(holding: Holding) -> bool:
        if holding is shared:
            return copies  # the session gets its own copy, and the others, which keep the shared memory, are idle
        return not any(each.busy for each in _sharing(runtime, holding))

    def preempt(holding: Holding, stage: Stage) -> None:
        if holding is not shared or stage != "compact":  # the session that needs bytes is not compacted itself
            _preempt(runtime, holding, stage)

    return runtime.leases.free(needed, may_yield, preempt)


# ---- elastic leases

MOST_PARTS = 8
"""Elastic leases divide the cap into at most so many parts; further turns wait."""


def part(runtime: Host, holding: Holding) -> int:
    """Return the bytes that an elastic lease should have now, if it can be that small.

    The cap, without the leases of other turns that are not elastic, is divided among the elastic turns that run or
    wait: by the next power of two, so that leases seldom change. Fewer parts are made if a memory's plans would not fit
    under such a part; if even the whole is too small, the result is the whole cap.
    """
    running = [each.holding for each in list(runtime.sessions) if each.busy]
    turns = {id(each): each for each in (holding, *running, *(place.holding for place in list(runtime.waiters)))}
    whole = runtime.cap - sum(each.lease for each in turns.values() if not each.elastic)
    parts = min(MOST_PARTS, 1 << (sum(each.elastic for each in turns.values()) - 1).bit_length())
    while parts and (whole <= 0 or not holding.plans(whole // parts)):
        parts //= 2
    return whole // parts if parts else runtime.cap


def _granted(runtime: Host, holding: Holding) -> int:
    """Return the lease for the next turn of a memory: its part, or the next larger lease that holds what it holds."""
    if not holding.elastic:
        return holding.lease
    lease = part(runtime, holding)
    while lease < runtime.cap and (lease < holding.least or not holding.takes(lease)):
        lease *= 2
    return min(lease, runtime.cap) if holding.takes(min(lease, runtime.cap)) else holding.lease


def widen(session: Conversation, lease: int) -> bool:
    """Make an elastic lease of a running turn larger, if the bytes are free or can be freed; return whether it is."""
    holding = session.holding
    if not holding.takes(lease) or not _free(session.runtime, session, lease - holding.lease):
        return False
    holding.resize(lease)
    return True


# ---- memories


def _part(runtime: Host, session: Conversation, lease: int) -> None:
    """Give a session its own copy of a shared memory; the other sessions keep the shared one."""
    shared = session.holding
    with reporting_compactions(runtime, shared):
        own = shared.copied(lease)
    shared.least = 0
    with runtime.guard:
        shared.sessions.discard(id(session))
        own.sessions = {id(session)}
        session.holding = own
        runtime.leases.holdings.append(own)


def _preempt(runtime: Host, holding: Holding, stage: Stage) -> None:
    def ask() -> Request | None:
        answers = [
            each.hooks.before_compaction(each.name, each.memory, full=False) for each in _sharing(runtime, holding)
        ]
        return None if None in answers else answers[0]

    for each in _sharing(runtime, holding):
        put_back(each)
    try:
        with reporting_compactions(runtime, holding):
            holding.preempt(stage, runtime.folder, left=runtime.leases.left, ask=ask)
    except CompactionFailed:
        return  # this memory is preempted no further; the next turn of its session reports the failure
    except AgentmemError as error:
        runtime.leases.faults.append(str(error))  # others may still yield; otherwise the refusal names this error


def _sharing(runtime: Host, holding: Holding) -> list[Conversation]:
    return [each for each in list(runtime.sessions) if each.holding is holding]


@contextmanager
def reporting_compactions(runtime: Host, holding: Holding) -> Iterator[None]:
    """Return a context manager that reports a memory's compactions to all sessions that use this memory.

    ``holding`` is the memory together with the sessions that use it, such as forks. When the ``with`` block ends, every
    compaction of the memory made in the block is reported to each of these sessions.
    """
    memory, sharing = holding.memory, _sharing(runtime, holding)
    before = 0 if memory is None else len(memory.compactions)
    try:
        yield
    finally:
        for report in () if memory is None else memory.compactions[before:]:
            for each in sharing:
                each.compacted(report)
