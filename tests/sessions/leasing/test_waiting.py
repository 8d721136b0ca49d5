"""Waiting for a lease: in the order of asking, bounded in number and time, and nothing is kept by who gives up."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from agentmem.errors import RuntimeBusy
from agentmem.sessions import Runtime, Session
from support import tiny_chat
from support.waiting import LIMIT, join, until


async def begun(made: Runtime) -> tuple[Session, Any]:
    """A session in mid-turn, and its stream."""
    session = tiny_chat.filled(made, 20)
    stream = session.astream(max_new_tokens=50, do_sample=False)
    await anext(stream)
    return session, stream


async def test_leases_are_granted_in_the_order_of_asking() -> None:
    """Each of six that wait is served when its turn comes, a small one behind a large one included."""
    with tiny_chat.runtime(1.2, pressure=("disk",)) as made:
        _, stream = await begun(made)
        order: list[int] = []

        async def ask(number: int) -> None:
            share = made.cap if number == 0 else made.cap // 2 if number % 2 else made.cap // 3
            session = made.session(share=share, keep_first=0, keep_recent=4)
            await session.aappend("user", f"number {number}")
            order.append(number)

        tasks = []
        for number in range(6):
            tasks.append(asyncio.create_task(ask(number)))
            await until(lambda: made.stats.waiting == len(tasks) and made.waiters[0].tried)
        with pytest.raises(RuntimeBusy, match=r"6 turn.*wait for it already and come first"):
            made.session(share=1 << 16).read("hello")
        assert order == []
        await stream.aclose()
        await asyncio.gather(*tasks)
        assert order[0] == 0
        assert sorted(order) == list(range(6))
        assert made.stats.waiting == 0
        tiny_chat.audit(made)


async def test_who_asks_first_among_equals_ends_first() -> None:
    """Under a cap for one, ten sessions that ask in a row end in that row."""
    with tiny_chat.runtime(1, pressure=("disk",)) as made:
        _, stream = await begun(made)
        order: list[int] = []

        async def ask(number: int, session: Session) -> None:
            await session.aappend("user", "hello")
            order.append(number)

        tasks = [asyncio.create_task(ask(number, made.session())) for number in range(10)]
        await until(lambda: made.stats.waiting == 10)
        await stream.aclose()
        await asyncio.gather(*tasks)
        assert order == list(range(10))


async def test_nobody_is_refused_who_need_not_wait() -> None:
    """Six turns that ask at once under a cap for six are all served, though none may wait."""
    with tiny_chat.runtime(6, pressure=(), max_waiting=0) as made:
        sessions = [made.session() for _ in range(6)]
        await asyncio.gather(*(each.aappend("user", "hello") for each in sessions))
        assert made.stats.charged_bytes == made.cap


async def test_a_full_queue_refuses_at_once() -> None:
    """Who would be one too many is told so at once, and who waits is not disturbed."""
    for limit in (0, 2):
        with tiny_chat.runtime(1, pressure=("disk",), max_waiting=limit) as made:
            _, stream = await begun(made)
            tasks = [asyncio.create_task(made.session().aappend("user", "hello")) for _ in range(limit)]
            await until(lambda limit=limit, made=made: made.stats.waiting == limit)
            late = made.session(name="late")
            for _ in range(2):
                with pytest.raises(RuntimeBusy, match=rf"'late' would have to wait, and {limit} turns.*max_waiting"):
                    await late.aappend("user", "hello")
            assert not late.busy
            assert made.stats.waiting == limit
            await stream.aclose()
            await asyncio.gather(*tasks)
            await late.aappend("user", "hello")


async def test_waiting_ends_after_its_time() -> None:
    """After ``wait`` seconds, or at the turn's deadline if that is sooner, a clear refusal; the lease is not leaked."""
    with tiny_chat.runtime(1, wait=0.2, pressure=("disk",)) as made:
        _, stream = await begun(made)
        session = made.session()
        for how, least in (({}, 0.2), ({"deadline": 0.05}, 0.05)):
            began = time.perf_counter()
            with pytest.raises(RuntimeBusy, match=r"waited \S+ s for its lease"):
                await session.aappend("user", "hello", **how)  # type: ignore[arg-type]  # of several kinds
            assert least <= time.perf_counter() - began
        assert (made.stats.waiting, session.busy, len(session.ids)) == (0, False, 0)
        await stream.aclose()
        await session.aappend("user", "hello", deadline=0.0)  # there is room: nothing is waited for
        assert session.stats.pending == len(session.ids) > 5


async def test_who_is_cancelled_while_waiting_keeps_nothing() -> None:
    """The head and the middle of the queue are cancelled: the others move up, and no lease is kept."""
    with tiny_chat.runtime(1, pressure=("disk",)) as made:
        _, stream = await begun(made)
        sessions = [made.session() for _ in range(4)]
        tasks = [asyncio.create_task(each.aappend("user", "hello")) for each in sessions]
        await until(lambda: made.stats.waiting == 4)
        for task in (tasks[0], tasks[2]):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await stream.aclose()
        await asyncio.gather(tasks[1], tasks[3])
        assert [len(each.ids) > 0 for each in sessions] == [False, True, False, True]
        assert not any(each.busy for each in sessions)
        assert made.stats.waiting == 0


async def test_who_is_cancelled_during_admission_keeps_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that is cancelled while its memory is brought back from disk gives the lease back at once."""
    with tiny_chat.runtime(1, pressure=("disk",)) as made:
        session, other = tiny_chat.filled(made), tiny_chat.filled(made)
        entered, go = threading.Event(), threading.Event()
        wake = session.holding.wake

        def slowly(lease: int) -> None:
            entered.set()
            assert go.wait(LIMIT)
            wake(lease)

        monkeypatch.setattr(session.holding, "wake", slowly)
        task = asyncio.create_task(session.aappend("user", "hello"))
        await until(entered.is_set)
        waiting = asyncio.create_task(other.aappend("user", "hello"))
        task.cancel()
        await asyncio.sleep(0.01)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not session.busy
        assert len(session.ids) == 100
        await waiting
        monkeypatch.undo()
        assert tiny_chat.on(session)


async def test_a_synchronous_turn_wakes_who_waits() -> None:
    """The end of a turn in another thread, and the closing of a session, serve the first that waits at once."""
    with tiny_chat.runtime(1, pressure=("disk",)) as made:
        holder = tiny_chat.filled(made, 20)
        turn = holder.stream(max_new_tokens=5)
        next(turn)
        task = asyncio.create_task(made.session().aappend("user", "hello"))
        await until(lambda: made.stats.waiting == 1)
        await asyncio.to_thread(turn.close)  # type: ignore[attr-defined]  # a generator
        async with asyncio.timeout(LIMIT):
            await task
    with tiny_chat.runtime(1, pressure=()) as made:
        idle = tiny_chat.filled(made, 20)
        task = asyncio.create_task(made.session().aappend("user", "hello"))
        await until(lambda: made.stats.waiting == 1)
        idle.close()
        async with asyncio.timeout(LIMIT):
            await task


def test_two_event_loops_share_a_runtime() -> None:
    """Loops in two threads wait for the same leases and wake one another."""
    with tiny_chat.runtime(8) as alone:
        expected = [tiny_chat.on(tiny_chat.filled(alone, 30, seed), 8) for seed in range(6)]
    with tiny_chat.runtime(1, pressure=("trim", "disk")) as made, tiny_chat.watched(made.cap):
        found: dict[int, list[int]] = {}

        async def one(seed: int) -> None:
            session = made.session()
            session.ids.extend(tiny_chat.ids(30, seed))
            await tiny_chat.events(session, max_new_tokens=8, keep_open=True)
            found[seed] = list(session.ids[30:])

        async def some(seeds: range) -> None:
            await asyncio.gather(*map(one, seeds))

        threads = [threading.Thread(target=asyncio.run, args=(some(range(low, low + 3)),)) for low in (0, 3)]
        for thread in threads:
            thread.start()
        join(*threads)
        assert [found[seed] for seed in range(6)] == expected


async def test_sixteen_sessions_under_a_cap_for_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """All finish with the tokens they have alone, the ledgers keep the cap at every allocation, and none is passed."""
    texts = ("a long way to go ", "and so on ")
    with tiny_chat.runtime(1) as alone:
        expected = []
        for number in range(16):
            session = alone.session()
            for text in texts:
                session.append("user", text * (1 + number % 3))
                session.generate(max_new_tokens=6, do_sample=False)
            expected.append(list(session.ids))
            session.close()
    with tiny_chat.runtime(4, pressure=("trim", "disk")) as made, tiny_chat.watched(made.cap):
        sessions, waits = [made.session(name=str(number)) for number in range(16)], []
        granted, admit = [], made.try_admit

        def noted(session: Session, turn: object) -> bool:
            admitted = admit(session, turn)
            granted.extend([session.name] if admitted else [])
            return admitted

        def audited() -> None:
            with made.scheduler.lock:
                tiny_chat.audit(made)

        monkeypatch.setattr(made, "try_admit", noted)

        async def talk(session: Session) -> None:
            for text in texts:
                asked = len(granted)
                await session.aappend("user", text * (1 + int(session.name) % 3))
                waits.append(granted.index(session.name, asked) - asked)
                await tiny_chat.events(session, max_new_tokens=6)
                await asyncio.to_thread(audited)

        await asyncio.gather(*map(talk, sessions))
        assert [list(session.ids) for session in sessions] == expected
        assert made.stats.on_disk > 0
        assert max(waits) <= 15  # each of the others once
