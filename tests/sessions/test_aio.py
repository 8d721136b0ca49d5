"""Turns for asyncio: cancellation, deadlines, back-pressure, and an event loop that is never blocked."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import torch

from agentmem import plugins
from agentmem.contracts import Compaction, Compactor, Policy, Segment, SegmentShape
from agentmem.errors import MemoryClosed, SettingsRefused, UnsupportedGeneration
from agentmem.hf.forwards import ModelForwards
from agentmem.sessions import Event, Session, TokenEvent, TurnFailed, TurnFinished
from support import tiny_chat
from support.waiting import LIMIT, until, wait_until

LAYERS = 3


class Calling(Compactor):
    """Another compactor that calls back before it compacts a layer."""

    def __init__(self, inner: Compactor, call: Callable[[int], object]) -> None:
        self.inner, self.call, self.scores, self.fits = inner, call, inner.scores, inner.fits

    def workspace(self, shape: SegmentShape) -> int:
        """What the other needs."""
        return self.inner.workspace(shape)

    def compact(self, segment: Segment, slots: Any) -> Compaction:
        """Call, then hand over."""
        self.call(segment.layer)
        return self.inner.compact(segment, slots)


def calling(name: str, call: Callable[[int], object]) -> Policy:
    """A policy of that name that calls back."""
    policy = plugins.policy(name)
    assert policy.compactor is not None
    return replace(policy, compactor=Calling(policy.compactor, call))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads of the forwards that feed tokens, one entry for each session that a forward feeds."""
    threads: list[int] = []
    packed = ModelForwards.packed

    def watched(self: ModelForwards, ids: Any, positions: Any, ends: Any, step: Any) -> torch.Tensor:
        threads.extend([threading.get_ident()] * len(ends))
        return packed(self, ids, positions, ends, step)

    monkeypatch.setattr(ModelForwards, "packed", watched)
    return threads


async def failing(stream: AsyncIterator[Event]) -> tuple[list[Event], Exception | None]:
    """The events of a stream, and how it failed."""
    found: list[Event] = []
    try:
        async for event in stream:
            found.append(event)  # noqa: PERF401  # what came before the failure is wanted
    except Exception as error:  # noqa: BLE001  # the subject
        return found, error
    return found, None


# ---- events


async def test_a_stream_gives_the_events_of_a_generate_as_they_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first event comes after the first forward of many; all of them are those of the synchronous turn."""
    forwards = counted(monkeypatch)
    with tiny_chat.runtime(2) as made:
        session, twin = tiny_chat.filled(made, 20), tiny_chat.filled(made, 20)
        forwards.clear()
        found, first = [], 0
        async for event in session.astream(max_new_tokens=60, do_sample=False):
            first = first or len(forwards)
            found.append(event)
        assert (first, len(forwards)) == (1, 60)
        kinds = {event.type for event in found}
        assert kinds == {"token", "text", "compaction_started", "compaction_finished", "turn_finished"}
        expected = list(twin.stream(max_new_tokens=60, do_sample=False))
        assert [event.type for event in expected] == [event.type for event in found]
        assert list(session.ids) == list(twin.ids)
        assert isinstance(found[-1], TurnFinished)
        assert found[-1].reason == "length"


async def test_no_forward_runs_ahead_of_a_slow_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the consumer thinks about an event, nothing is computed; all is computed on one thread that is not ours."""
    threads = counted(monkeypatch)
    with tiny_chat.runtime(2) as made:
        sessions = [tiny_chat.filled(made, 20), tiny_chat.filled(made, 20)]
        threads.clear()

        async def slowly(session: Session) -> None:
            done = 0
            async for event in session.astream(max_new_tokens=5, do_sample=False):
                if isinstance(event, TokenEvent):
                    done += 1
                    before = threads.count(threads[-1])
                    await asyncio.sleep(0.01)
                    assert len(threads) - before <= 5  # the other session's
            assert done == 5

        await asyncio.gather(*map(slowly, sessions))
        assert len(threads) == 10
        assert len(set(threads)) == 1
        assert threads[0] != threading.get_ident()
        one = sessions[0].astream(max_new_tokens=5, do_sample=False)
        await anext(one)
        count = len(threads)
        await asyncio.sleep(0.05)
        assert len(threads) == count
        await one.aclose()  # type: ignore[attr-defined]  # a generator


async def test_the_event_loop_is_never_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of every forward and compaction of a long text, the loop forks another session and looks around."""
    loop, packed, met, seen = asyncio.get_running_loop(), ModelForwards.packed, list[str](), set[tuple[int, int]]()

    def look(done: threading.Event) -> None:
        seen.add((idle.fork().stats.tokens, made.stats.active))
        done.set()

    def meet(where: str) -> None:
        """Go on when the loop has looked: it does neither this work itself, nor does it wait for its end."""
        done = threading.Event()
        loop.call_soon_threadsafe(look, done)
        assert done.wait(LIMIT)
        met.append(where)

    def watched(self: ModelForwards, *args: Any) -> torch.Tensor:
        meet("forward")
        return packed(self, *args)

    with tiny_chat.runtime(2.5) as made:
        session, idle = made.session(policy=calling("am-halving", lambda _: meet("layer"))), tiny_chat.filled(made, 30)
        monkeypatch.setattr(ModelForwards, "packed", watched)
        reports = await session.aappend("user", "x" * 300)
    assert seen == {(30, 1)}
    assert met.count("layer") == LAYERS * len(reports) > 0
    assert met.count("forward") > 300 / 16


async def test_a_turn_that_fails_says_so_and_raises() -> None:
    """The last event names the error; then it is raised, and the session can go on."""

    def explode(_: object) -> str:
        raise ZeroDivisionError("a hook")

    with tiny_chat.runtime(2) as made:
        session = tiny_chat.filled(made, 20)
        for options, error in (({"num_beams": 4}, UnsupportedGeneration), ({"stop_strings": 7}, Exception)):
            found, raised = await failing(session.astream(max_new_tokens=3, **options))
            assert isinstance(raised, error)
            assert found[-1] == TurnFailed(error=type(raised).__name__, message=str(raised))
        assert tiny_chat.on(session)
        hooked = tiny_chat.filled(made, 20, before_compact=explode)
        with pytest.raises(ZeroDivisionError):
            await hooked.aappend("user", "x" * 90)
        assert not hooked.busy
        with pytest.raises(TypeError, match="unknown"):
            await session.aappend("user", "hello", unknown=1)
        assert not session.busy
        with pytest.raises(SettingsRefused, match=r"mid-turn.*contextlib\.aclosing"):
            await asyncio.gather(*(tiny_chat.events(session, max_new_tokens=9) for _ in range(2)))


# ---- cancellation


async def test_cancelled_at_random_moments_a_session_goes_on_as_if_it_had_not_been() -> None:
    """A reply that is cancelled a hundred times has the tokens and the memory of one that never was."""
    dice = random.Random(5)  # noqa: S311  # no secret
    with tiny_chat.runtime(2) as made, tiny_chat.watched(made.cap):
        session, twin = tiny_chat.filled(made, 40), tiny_chat.filled(made, 40)
        start, cut = len(session.ids), 0
        options: dict[str, Any] = {"max_new_tokens": 400, "do_sample": False, "keep_open": True}

        async def consume(most: int) -> None:
            async with aclosing(session.astream(**options)) as events:  # type: ignore[type-var]  # a generator
                async for event in events:
                    if most == 0:
                        break
                    most -= 1
                    assert not isinstance(event, TurnFinished)

        while cut < 100 or session.stats.compactions < 3:
            kind, cut = cut % 3, cut + 1
            if kind == 0:
                task = asyncio.create_task(consume(1000))
                await asyncio.sleep(dice.uniform(0, 0.04))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif kind == 1:
                await consume(dice.randrange(6))
            else:
                found = [event async for event in session.astream(**options, deadline=dice.uniform(0, 0.02))]
                assert isinstance(found[-1], TurnFinished)
                assert found[-1].reason == "deadline"
            assert not session.busy
            tiny_chat.audit(made)
        count = len(session.ids) - start
        assert tiny_chat.on(twin, count) == list(session.ids[start:])
        assert tiny_chat.on(twin, 20) == tiny_chat.on(session, 20)
        assert session.stats.compactions == twin.stats.compactions
        assert tiny_chat.same(tiny_chat.slots(session), tiny_chat.slots(twin))


@pytest.mark.parametrize(
    "name", ["am-halving", "am-halving[probe=random+replay,probe_tokens=32]", "random-subset", "heavy-hitters"]
)
@pytest.mark.parametrize("layer", range(LAYERS))
async def test_a_cancel_inside_a_compaction_takes_effect_at_the_next_layer(name: str, layer: int) -> None:
    """The layers up to there are compacted, the others are not; what goes on ends as an undisturbed compaction does."""
    tasks: list[asyncio.Task[Any]] = []
    loop, states = asyncio.get_running_loop(), list[list[int]]()

    def call(at: int) -> None:
        if at == layer and tasks and not session.watch.cancelled:
            loop.call_soon_threadsafe(tasks[0].cancel)
            wait_until(lambda: session.watch.cancelled)

    with tiny_chat.runtime(3, name) as made:
        session = tiny_chat.filled(made, 60, policy=calling(name, call))
        twin = tiny_chat.filled(made, 60)
        before = [sum(store.lengths) for store in session.memory.sequences[0].stores if store]
        tasks.append(asyncio.create_task(tiny_chat.events(session, max_new_tokens=30, keep_open=True)))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        row = session.memory.sequences[0]
        states.append([sum(store.lengths) for store in row.stores if store])
        smaller = [now < then for now, then in zip(states[0], before, strict=True)]
        assert smaller == [at <= layer for at in range(LAYERS)]
        assert (row.job is None) == (layer == LAYERS - 1)  # after the last layer there is no boundary
        assert torch.isfinite(session.view.peek([7])).all()
        tiny_chat.audit(made)

        tasks.clear()
        count = len(session.ids) - 60
        await tiny_chat.events(session, max_new_tokens=30 - count, keep_open=True)
        assert tiny_chat.on(twin, 30) == list(session.ids[60:])
        assert tiny_chat.same(tiny_chat.slots(session), tiny_chat.slots(twin))


async def test_leaving_a_loop_ends_the_turn_soon() -> None:
    """A consumer that breaks off, or never begins, leaves an idle session without closing anything by hand."""
    with tiny_chat.runtime(1) as made:
        session = tiny_chat.filled(made, 20)
        async for _ in session.astream(max_new_tokens=400):
            break
        await until(lambda: not session.busy)
        session.astream(max_new_tokens=5)
        assert not session.busy
        assert (await tiny_chat.events(session, max_new_tokens=2))[-1].type == "turn_finished"


async def test_a_task_that_is_cancelled_twice_leaves_an_idle_session() -> None:
    """A second cancel during the orderly end of the first changes nothing."""
    with tiny_chat.runtime(1) as made:
        session = made.session()
        task = asyncio.create_task(session.aappend("user", "x" * 300))
        await until(lambda: session.stats.tokens > 0)
        for _ in range(5):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not session.busy
        assert session.stats.pending > 0
        assert await tiny_chat.events(session)


async def test_closing_the_runtime_ends_turns_and_waits() -> None:
    """Who streams or waits when the runtime closes is told so; no task hangs."""
    made = tiny_chat.runtime(1, pressure=())
    active, waiting = tiny_chat.filled(made, 20), made.session()
    stream = active.astream(max_new_tokens=50)
    await anext(stream)
    task = asyncio.create_task(waiting.aappend("user", "hello"))
    await until(lambda: made.stats.waiting > 0)
    await asyncio.to_thread(made.close)
    with pytest.raises(MemoryClosed):
        await task
    kinds, error = await failing(stream)
    assert isinstance(error, MemoryClosed)
    assert kinds[-1] == TurnFailed(error="MemoryClosed", message=str(error))


async def test_a_stream_that_outlives_its_runtime_can_be_closed() -> None:
    """Closing it raises nothing, and what the session had said stays readable."""
    made = tiny_chat.runtime(1)
    session = tiny_chat.filled(made, 20)
    stream = session.astream(max_new_tokens=50)
    await anext(stream)
    await asyncio.to_thread(made.close)
    await stream.aclose()  # type: ignore[attr-defined]  # a generator
    assert session.transcript.entries[-1].kind == "reply"


async def test_the_model_s_thread_has_the_torch_threads_of_whoever_asks() -> None:
    """Plans are made with the caller's number of threads; a worker that began with another one takes it over."""
    before, seen = torch.get_num_threads(), list[int]()
    session = tiny_chat.runtime(1).session()
    handle = session.runtime.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            seen.clear()
            await session.aappend("user", "hi")
            assert set(seen) == {threads}
    finally:
        handle.remove()
        torch.set_num_threads(before)


def test_what_awaits_is_what_blocks() -> None:
    """Reading, compacting and replying give the same ids, reports and slots with and without asyncio."""

    async def awaited(session: Session) -> list[int]:
        read = await session.aread(tiny_chat.ids(90), compact="after")
        compacted = await session.acompact(target=24)
        reply = await session.agenerate(max_new_tokens=12, do_sample=False)
        return [len(read), compacted.index if compacted else -1, *reply.ids]

    def blocking(session: Session) -> list[int]:
        read = session.read(tiny_chat.ids(90), compact="after")
        compacted = session.compact(target=24)
        reply = session.generate(max_new_tokens=12, do_sample=False)
        return [len(read), compacted.index if compacted else -1, *reply.ids]

    with tiny_chat.runtime(2) as made:
        one, other = made.session(), made.session()
        assert asyncio.run(awaited(one)) == blocking(other)
        assert one.stats.compactions == other.stats.compactions > 1
        for mine, its in zip(tiny_chat.slots(one), tiny_chat.slots(other), strict=True):
            assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_a_task_that_is_cancelled_leaves_a_session_that_goes_on() -> None:
    """``agenerate`` cancelled after its first forward: the turn is over, and the next one replies."""

    async def cancelled(session: Session) -> None:
        task = asyncio.create_task(session.agenerate(max_new_tokens=500, do_sample=False, keep_open=True))
        await until(lambda: len(session.ids) > 31)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with tiny_chat.runtime(1) as made:
        session = tiny_chat.filled(made, 30)
        asyncio.run(cancelled(session))
        assert not session.busy
        assert len(tiny_chat.on(session, 5)) == 5
