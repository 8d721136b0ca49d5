"""The same turns for asyncio: forwards on the model's own thread, waiting for a lease, cancellation. No other logic.

The event loop is never blocked: every step of a turn (a forward, or a compaction) runs on the one thread of its model.
A turn goes on only when the consumer has taken all events so far, so nothing queues up behind a slow one.
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

from agentmem.errors import RuntimeBusy
from agentmem.sessions import ingestion, turn
from agentmem.sessions.arguments import check_seconds
from agentmem.sessions.events import CompactionFinished, Event, TurnFailed
from agentmem.sessions.turn_steps import Steps

if TYPE_CHECKING:
    from agentmem.engine import Want
    from agentmem.reporting.report import CompactionReport
    from agentmem.sessions.conversation import Conversation, Host

T = TypeVar("T")

THREADS: WeakKeyDictionary[Any, ThreadPoolExecutor] = WeakKeyDictionary()
GUARD = threading.Lock()


def _thread(model: Any) -> ThreadPoolExecutor:
    """The one thread on which a model computes for asyncio, whatever loops there are."""
    with GUARD:
        if model not in THREADS:
            THREADS[model] = ThreadPoolExecutor(1, thread_name_prefix="agentmem-model")
        return THREADS[model]


async def _run(session: Conversation, call: Callable[[], T], cancel: Callable[[], None] = lambda: None) -> T:
    """Run a call on the model's thread. When the task is cancelled, ``cancel`` is called and what runs ends first."""
    future = _submitted(session, call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        cancel()
        await _ended(future)
        raise


def _submitted(session: Conversation, call: Callable[[], T]) -> asyncio.Future[T]:
    """Have the model's thread run a call with the caller's number of torch threads, by which its memory is planned."""
    threads = torch.get_num_threads()

    def counted() -> T:
        if torch.get_num_threads() != threads:  # it is kept per thread: the worker's is from when it began
            torch.set_num_threads(threads)
        return call()

    return asyncio.get_running_loop().run_in_executor(_thread(session.runtime.model), counted)


async def _ended(future: asyncio.Future[Any]) -> None:
    """Wait for a call on the model's thread, however often the task is cancelled meanwhile."""
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
    """One turn's place in the queue of its runtime; called to have it try again, from any thread."""

    def __init__(self) -> None:
        self.loop, self.event = asyncio.get_running_loop(), asyncio.Event()
        self.tried = self.refused = False

    def __call__(self) -> None:
        with suppress(RuntimeError):  # its loop was closed, and nobody is there to be woken
            self.loop.call_soon_threadsafe(self.event.set)


async def admitted(session: Conversation, turn: object, until: float | None = None) -> None:
    """Wait for the session's lease, in the order of asking; ``until`` is on the monotonic clock.

    Raises:
        RuntimeBusy: after ``runtime.wait`` seconds or at ``until``, or where ``runtime.max_waiting`` wait already.

    """
    runtime, place = session.runtime, _Place()
    wait = runtime.wait if until is None else min(runtime.wait, until - time.monotonic())
    runtime.waiters.append(place)
    try:
        await _served(session, turn, place, asyncio.get_running_loop().time() + wait)
    except TimeoutError:
        raise RuntimeBusy(
            f"session {session.name!r} waited {max(0, wait):.3g} s for its lease of {session.holding.lease} bytes, and "
            f"{len(runtime.waiters) - 1} others wait, too{runtime.leases.stuck}; raise wait (or the turn's deadline), "
            "give sessions smaller shares, or raise cap"
        ) from None
    finally:
        runtime.waiters.remove(place)
        runtime.wake_next()


async def _served(session: Conversation, turn: object, place: _Place, until: float) -> None:
    """Try whenever it is the session's turn to try, until it has its lease; a try is never cut short."""
    runtime = session.runtime
    while True:
        place.event.clear()  # before trying: what is freed meanwhile wakes it once more
        if runtime.waiters[0] is place:
            if await _try(session, turn):
                return
            place.tried = True
        _refuse_late(runtime)
        if place.refused:
            raise RuntimeBusy(
                f"session {session.name!r} would have to wait, and {runtime.max_waiting} turns, the most that may "
                "(max_waiting), wait for this runtime already; try later, or raise max_waiting"
            )
        async with asyncio.timeout_at(until):
            await place.event.wait()


def _refuse_late(runtime: Host) -> None:
    """Refuse those who came when the queue was full; nobody is while the first may still find room at once."""
    places: list[Any] = list(runtime.waiters)
    if places and places[0].tried:
        for place in places[runtime.max_waiting :]:
            place.refused = True
            place()


async def _try(session: Conversation, turn: object) -> bool:
    """Try for the lease; a task that is cancelled meanwhile does not keep it."""
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
        yield TurnFailed(error=type(error).__name__, message=str(error))
        raise
    finally:
        steps.cancel()
        await _closed(session, steps, begun)


async def _fed(session: Conversation, want: Want) -> None:
    """Wait until what a turn wants was fed; whoever finds that it is time has the model's thread feed everybody."""
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
    """End a turn in order even when the task that had it is being cancelled."""

    def close() -> None:
        try:
            steps.close()
        finally:
            session.runtime.end(session, begun)

    future = _submitted(session, close)
    await _ended(future)
    future.result()


def stream(session: Conversation, options: dict[str, Any]) -> AsyncGenerator[Event, None]:
    """See :meth:`agentmem.sessions.session.Session.stream`."""
    deadline, keep_open = options.pop("deadline", None), options.pop("keep_open", False)
    if deadline is not None:
        check_seconds("deadline", deadline)
    return _driven(session, lambda: ingestion.replying(session, options, keep_open=keep_open), deadline)


async def reports(
    session: Conversation, make: Callable[[], turn.Steps], deadline: float | None
) -> tuple[CompactionReport, ...]:
    """Run a turn to its end; what it compacted."""
    async with aclosing(_driven(session, make, deadline)) as events:
        return tuple([event.report async for event in events if isinstance(event, CompactionFinished)])
