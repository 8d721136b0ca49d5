"""The queue of turns that wait for a lease: the rules that threads and event loops share, and the waiting of threads.

Turns get their leases in the order in which they began to wait. :mod:`agentmem.sessions.aio` waits under asyncio.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

from agentmem.errors import RuntimeBusy
from agentmem.settings import exact_bytes

if TYPE_CHECKING:
    from agentmem.sessions.conversation import Conversation, Host, Place
    from agentmem.sessions.leasing.holding import Holding


class ThreadPlace:
    """The entry of a thread's turn in its runtime's queue; calling it, from any thread, makes the turn try again."""

    def __init__(self, holding: Holding) -> None:
        """Create an entry that was not called yet; ``holding`` is the memory of the turn."""
        self.holding, self.tried, self.refused = holding, False, False
        self.event = threading.Event()

    def __call__(self) -> None:
        """Wake the waiting thread."""
        self.event.set()


def wait_for_lease(session: Conversation, turn: object, until: float | None, *, alone: bool = False) -> None:
    """Wait in this thread until the session has its lease for ``turn``, an object that identifies the turn.

    ``until`` is the turn's deadline on the monotonic clock, if it has a deadline. ``alone`` is true if the lease could
    not be given although no other turn ran or waited; then there is nothing to wait for.

    Raises:
        RuntimeBusy: ``runtime.wait`` seconds have passed, ``until`` was reached, ``runtime.max_waiting`` turns already
            wait, or waiting would be in vain: only this thread could end the turns that hold the bytes.

    """
    runtime, place = session.runtime, ThreadPlace(session.holding)
    began = time.monotonic()
    last = began + runtime.wait if until is None else min(began + runtime.wait, until)
    if alone:
        raise runtime.leases.refusal(session.name, session.holding.lease, 0, 0)
    runtime.waiters.append(place)
    try:
        while True:
            place.event.clear()  # before trying, so that bytes freed during the try wake this turn once more
            if runtime.waiters[0] is place:
                if runtime.try_admit(session, turn):
                    return
                place.tried = True
            _refuse_in_vain(session, place)
            refuse_late(runtime)
            if place.refused:
                raise too_many(session)
            if not place.event.wait(max(0.0, last - time.monotonic())):
                raise waited(session, last - began)
    finally:
        runtime.waiters.remove(place)
        runtime.wake_next()


def _refuse_in_vain(session: Conversation, own: ThreadPlace) -> None:
    """Raise the refusal if this thread, while it waits, keeps the bytes from being freed, or if nobody frees them."""
    runtime, thread = session.runtime, threading.get_ident()
    busy = [each for each in list(runtime.sessions) if each.busy]
    before = [place for place in list(runtime.waiters) if place is not own]
    if _loop_here() or not (busy or before) or any(each.thread == thread for each in busy):
        waiting = len(before) if before and before[0].tried else 0
        raise runtime.leases.refusal(session.name, session.holding.lease, len(busy), waiting)


def _loop_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def refuse_late(runtime: Host) -> None:
    """Refuse all turns of the queue except the first ``max_waiting``.

    If the first turn of the queue has not yet tried to get its lease, no turn is refused: the first turn may get its
    lease at once and leave the queue.
    """
    places: list[Place] = list(runtime.waiters)
    if places and places[0].tried:
        for place in places[runtime.max_waiting :]:
            place.refused = True
            place()


def too_many(session: Conversation) -> RuntimeBusy:
    """Return the error for a turn that is one too many in the queue."""
    return RuntimeBusy(
        f"session {session.name!r} would have to wait, and {session.runtime.max_waiting} turns, the most that may "
        "(max_waiting), wait for this runtime already; try later, or raise max_waiting"
    )


def waited(session: Conversation, seconds: float) -> RuntimeBusy:
    """Return the error for a turn that waited ``seconds`` for its lease in vain; it is still in the queue."""
    runtime, lease = session.runtime, session.holding.lease
    return RuntimeBusy(
        f"session {session.name!r} waited {max(0, seconds):.3g} s for its lease of {exact_bytes(lease)}, "
        f"and {len(runtime.waiters) - 1} others wait, too{runtime.leases.stuck}; raise wait (or the turn's "
        "deadline), give sessions smaller shares, or raise cap"
    )
