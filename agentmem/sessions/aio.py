"""Turns under asyncio, which wait for their leases, run on a thread of the model, and can be cancelled.

The event loop is never blocked: each model has one thread, on which every step of a turn (a forward, or a compaction)
runs. A turn goes on only after the consumer has taken all events so far, so events do not pile up for a slow consumer.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from agentmem.errors import CapTooSmall
from agentmem.sessions import ingestion, turn
from agentmem.sessions.arguments import check_seconds
from agentmem.sessions.events import CompactionFinished, Event, TurnFailed
from agentmem.sessions.leasing.queue import refuse_late, too_many, waited
from agentmem.sessions.turn_steps import Steps

if TYPE_CHECKING:
    from agentmem.engine import Want
    from agentmem.reporting.report import CompactionReport
    from agentmem.sessions.conversation import Conversation
    from agentmem.sessions.leasing.holding import Holding

T = TypeVar("T")

THREADS: WeakKeyDictionary[Any, ThreadPoolExecutor] = WeakKeyDictionary()
GUARD = threading.Lock()


def _thread(model: Any) -> ThreadPoolExecutor:
    """Return the executor with the one thread on which a model computes for all event loops; make it if necessary."""
    with GUARD:
        if model not in THREADS:
            THREADS[model] = ThreadPoolExecutor(1, thread_name_prefix="agentmem-model")
        return THREADS[model]


async def _run(session: Conversation, call: Callable[[], T], cancel: Callable[[], None] = lambda: None) -> T:
    """Run ``call`` on the model's thread and return its result.

    If the task is cancelled meanwhile, call ``cancel`` and wait until ``call`` has ended; then raise CancelledError.
    """
    future = _submitted(session, call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        cancel()
        await ended(future)
        raise


def _submitted(session: Conversation, call: Callable[[], T]) -> asyncio.Future[T]:
    """Submit a call to the model's thread and return its future.

    The call runs with the caller's number of torch threads: the memory plans were made for this number, since it
    determines the temporary bytes of attention.
    """
    threads = torch.get_num_threads()

    def counted() -> T:
        if torch.get_num_threads() != threads:  # torch keeps this number per thread, the worker has an older one
            torch.set_num_threads(threads)
        return call()

    return asyncio.get_running_loop().run_in_executor(_thread(session.runtime.model), counted)


async def ended(future: asyncio.Future[Any]) -> None:
    """Wait until a call on the model's thread has ended, even if the waiting task is cancelled.

    The cancellation is raised after the call has ended.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    future.exception()  # asyncio warns of an exception that nobody retrieves
    if cancelled is not None:
        raise cancelled


# ---- waiting for a lease


class _Place:
    """The entry of a turn in its runtime's queue for leases.

    The entry can be called, from any thread. The turn then tries again to get its lease.
    """

    def __init__(self, holding: Holding) -> None:
        self.holding = holding
        self.loop, self.event = asyncio.get_running_loop(), asyncio.Event()
        self.tried = self.refused = False

    def __call__(self) -> None:
        with suppress(RuntimeError):  # the turn's loop was closed, so that no task waits
            self.loop.call_soon_threadsafe(self.event.set)


async def admitted(session: Conversation, turn: object, until: float | None = None) -> None:
    """Wait until the session has its lease for ``turn``, an object that identifies the turn.

    Turns get their leases in the order in which they began to wait. ``until`` is the turn's deadline on the monotonic
    clock, if it has a deadline.

    Raises:
        RuntimeBusy: ``runtime.wait`` seconds have passed, ``until`` was reached, or ``runtime.max_waiting`` turns
            already wait.

    """
    runtime, place = session.runtime, _Place(session.holding)
    wait = runtime.wait if until is None else min(runtime.wait, until - time.monotonic())
    runtime.waiters.append(place)
    try:
        await _served(session, turn, place, asyncio.get_running_loop().time() + wait)
    except TimeoutError:
        raise waited(session, wait) from None
    finally:
        runtime.waiters.remove(place)
        runtime.wake_next()


async def _served(session: Conversation, turn: object, place: _Place, until: float) -> None:
    """Try to get the lease whenever the turn is the first of the queue; return when the lease is granted.

    ``until`` is a time on the event loop's clock. An attempt that has begun is finished even if this time is reached.

    Raises:
        TimeoutError: ``until`` was reached.
        RuntimeBusy: too many turns wait before this turn.

    """
    runtime = session.runtime
    while True:
        place.event.clear()  # before trying, so that bytes freed during the try wake this turn once more
        if runtime.waiters[0] is place:
            if await _try(session, turn):
                return
            place.tried = True
        refuse_late(runtime)
        if place.refused:
            raise too_many(session)
        async with asyncio.timeout_at(until):
            await place.event.wait()


async def _try(session: Conversation, turn: object) -> bool:
    """Try to get the lease and return whether it was granted.

    If the task is cancelled meanwhile, a granted lease is given back.
    """
    granted = False

    def ask() -> bool:
        nonlocal granted
        granted = session.runtime.try_admit(session, turn)
        return granted

    try:
        return await _run(session, ask)
    except asyncio.CancelledError:
        if granted:
            session.runtime.end(session, turn)
        raise


# ---- turns


async def _driven(
    session: Conversation, make: Callable[[], turn.Steps], seconds: float | None
) -> AsyncGenerator[Event, None]:
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            async with aclosing(_turn(session, make, until)) as events:
                async for event in events:
                    yield event
        except CapTooSmall:
            if not session.holding.least:
                raise
        else:
            return


async def _turn(
    session: Conversation, make: Callable[[], turn.Steps], until: float | None
) -> AsyncGenerator[Event, None]:
    before = len(session.ids)
    made, begun = make(), object()  # a generator, which does nothing yet
    await admitted(session, begun, until)
    steps = Steps(session, made, until)
    try:
        while not steps.over:
            for event in await _run(session, steps.events, steps.cancel):
                yield event
            if steps.want is not None:
                await _fed(session, steps.want)
    except Exception as error:
        # New pins may not fit, with nothing changed: then a larger part of the cap may help.
        small = isinstance(error, CapTooSmall) and len(session.ids) == before
        if not (small and session.holding.ask_more(session.runtime.cap)):
            yield TurnFailed(error=type(error).__name__, message=str(error))
        raise
    finally:
        steps.cancel()
        await _closed(session, steps, begun)


async def _fed(session: Conversation, want: Want) -> None:
    """Wait until the model has been fed the ids that a turn requests; ``want`` is this request.

    A forward can feed several waiting turns, so a forward that another turn started may feed these ids. If a forward is
    due and no other turn has started it, this turn starts it on the model's thread.
    """
    scheduler, loop, woken = session.runtime.scheduler, asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(woken.set)

    want.wake = wake
    scheduler.submit(want)
    while not want.done:
        woken.clear()
        pause = scheduler.pause()
        if pause > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await woken.wait()
        else:
            await _run(session, lambda: scheduler.step(want))


async def _closed(session: Conversation, steps: Steps, begun: object) -> None:
    """Close the steps of a turn and end the turn, even if its task is being cancelled.

    ``begun`` is the object that identifies the turn.
    """

    def close() -> None:
        try:
            steps.close()
        finally:
            session.runtime.end(session, begun)

    future = _submitted(session, close)
    await ended(future)
    future.result()


def stream(session: Conversation, options: dict[str, Any]) -> AsyncGenerator[Event, None]:
    """Yield the events of a reply; see :meth:`agentmem.sessions.session.Session.astream`."""
    deadline, keep_open = options.pop("deadline", None), options.pop("keep_open", False)
    if deadline is not None:
        check_seconds("deadline", deadline)
    return _driven(session, lambda: ingestion.replying(session, options, keep_open=keep_open), deadline)


async def reports(
    session: Conversation, make: Callable[[], turn.Steps], deadline: float | None
) -> tuple[CompactionReport, ...]:
    """Run a turn to its end and return the reports of its compactions; ``make`` returns the steps of this turn."""
    async with aclosing(_driven(session, make, deadline)) as events:
        return tuple([event.report async for event in events if isinstance(event, CompactionFinished)])
