"""The same turns for asyncio: forwards on the model's own thread, waiting for a lease, cancellation. No other logic.

The event loop is never blocked: every step of a turn (a forward, or a compaction) runs on the one thread of its model.
A step is made only when the consumer asks for the next event, so nothing queues up behind a slow one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from agentmem.errors import AgentmemError, RuntimeBusy
from agentmem.sessions import reading
from agentmem.sessions.events import CompactionFinished, Event, TurnFailed
from agentmem.sessions.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.report import CompactionReport
    from agentmem.sessions.dialogue import Message
    from agentmem.sessions.runtime import Runtime
    from agentmem.sessions.session import Session

T = TypeVar("T")

_THREADS: WeakKeyDictionary[Any, ThreadPoolExecutor] = WeakKeyDictionary()
_QUEUES: WeakKeyDictionary[Runtime, deque[asyncio.Event]] = WeakKeyDictionary()


def _thread(model: Any) -> ThreadPoolExecutor:
    """The one thread on which a model computes for asyncio."""
    if model not in _THREADS:
        _THREADS[model] = ThreadPoolExecutor(1, thread_name_prefix="agentmem-model")
    return _THREADS[model]


async def _run(session: Session, call: Callable[[], T]) -> T:
    """Run a call on the model's thread. When the task is cancelled, what runs ends at its next boundary first."""
    future = asyncio.get_running_loop().run_in_executor(_thread(session.runtime.model), call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        session.watch.cancelled = True
        await asyncio.wait([future])
        future.exception()  # seen, so that nobody is told that it was not
        raise


async def admitted(session: Session) -> None:
    """Wait for the session's lease, in the order of asking.

    Raises:
        RuntimeBusy: after ``runtime.wait`` seconds, or at once where ``runtime.max_waiting`` wait already.

    """
    runtime = session.runtime
    queue = _QUEUES.setdefault(runtime, deque())
    if not queue and await _try(session):
        return
    if len(queue) >= runtime.max_waiting:
        raise RuntimeBusy(
            f"{len(queue)} turns wait for this runtime already, {runtime.max_waiting} at most (max_waiting); try later"
        )
    turn = asyncio.Event()
    queue.append(turn)
    runtime.waiting = len(queue)
    try:
        async with asyncio.timeout(runtime.wait):
            while not (queue[0] is turn and await _try(session)):
                turn.clear()
                await turn.wait()
    except TimeoutError:
        raise RuntimeBusy(
            f"session {session.name!r} waited {runtime.wait} s for its lease of {session.holding.lease} bytes, and no "
            "other turn ended; raise wait, give sessions smaller shares, or raise cap"
        ) from None
    finally:
        queue.remove(turn)
        runtime.waiting = len(queue)
        _wake(runtime)


async def _try(session: Session) -> bool:
    """Try for the lease; a task that is cancelled meanwhile does not keep it."""
    granted = False

    def ask() -> bool:
        nonlocal granted
        granted = session.runtime.try_admit(session)
        return granted

    try:
        return await _run(session, ask)
    except asyncio.CancelledError:
        if granted:
            session.runtime.leave(session)
        raise


def _wake(runtime: Runtime) -> None:
    queue = _QUEUES.get(runtime)
    if queue:
        queue[0].set()


async def _driven(session: Session, make: Callable[[], Any], deadline: float | None) -> AsyncIterator[Event]:
    await admitted(session)
    steps = session.steps(make, deadline)
    try:
        while (event := await _run(session, steps.step)) is not None:
            yield event
    except AgentmemError as error:
        yield TurnFailed(error=type(error).__name__, message=str(error))
        raise
    finally:
        steps.cancel()
        await _closed(session, steps)


async def _closed(session: Session, steps: Steps) -> None:
    """End a turn in order even when the task that had it is being cancelled."""
    future = asyncio.get_running_loop().run_in_executor(_thread(session.runtime.model), steps.close)
    await asyncio.wait([future])
    _wake(session.runtime)
    future.result()


async def stream(session: Session, options: dict[str, Any]) -> AsyncIterator[Event]:
    """See :meth:`agentmem.sessions.session.Session.stream`."""
    deadline, keep_open = options.pop("deadline", None), options.pop("keep_open", False)
    events = _driven(session, lambda: session.replying(options, keep_open=keep_open), deadline)
    try:
        async for event in events:
            yield event
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # an async generator


async def append(session: Session, messages: Sequence[Message], how: dict[str, Any]) -> tuple[CompactionReport, ...]:
    """See :meth:`agentmem.sessions.session.Session.aappend`."""
    deadline = how.pop("deadline", None)
    events = _driven(session, lambda: reading.messages(session, messages, **how), deadline)
    return tuple([event.report async for event in events if isinstance(event, CompactionFinished)])
