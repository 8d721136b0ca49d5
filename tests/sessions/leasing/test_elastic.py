"""Elastic leases, the default: turns that run at once divide the cap, give bytes back, and wait instead of failing."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, closing
from typing import Any

import pytest

from agentmem.errors import CapTooSmall, RuntimeBusy
from agentmem.sessions import Runtime, Session
from agentmem.sessions.leasing.swapping import MOST_PARTS
from support import tiny_chat
from support.waiting import LIMIT, join, until


def runtime(parts: float = 4, **options: Any) -> Runtime:
    """A runtime whose cap is so many leases of 64 slots, with the default share."""
    return tiny_chat.runtime(parts, **options | {"share": None})


def writing(session: Session, tokens: int, errors: list[BaseException]) -> threading.Thread:
    """A thread that has a session write so many tokens."""

    def write() -> None:
        try:
            session.append("user", "hello")
            session.generate(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        except BaseException as error:  # noqa: BLE001  # the test looks at it
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_who_runs_alone_has_the_whole_cap() -> None:
    """One turn after the other: each is charged all of the cap, as with share=1.0."""
    with runtime() as made:
        for session in (made.session(), made.session()):
            with closing(begun(session)):
                assert session.stats.lease_bytes == made.cap


def begun(session: Session) -> Any:
    """A turn of a session that has run to its first token."""
    session.append("user", "hello")
    turn = session.stream(max_new_tokens=200, min_new_tokens=200, do_sample=False)
    next(turn)
    return turn


def test_four_threads_are_all_served_under_one_cap() -> None:
    """With defaults none of four threads is refused, all run at once in a quarter, and the cap holds throughout."""
    errors: list[BaseException] = []
    with runtime() as made, tiny_chat.watched(made.cap):
        sessions = [made.session() for _ in range(4)]
        threads = [writing(session, 120, errors) for session in sessions]
        for thread in threads:
            join(thread)
        assert errors == []
        assert all(len(session.last.ids) == 120 for session in sessions)
        tiny_chat.audit(made)


async def test_a_running_turn_compacts_to_its_part_for_who_waits() -> None:
    """A turn that fills the cap gives half of it back before its next forward; its events tell of the compaction."""
    with runtime(2) as made, tiny_chat.watched(made.cap):
        first, second = tiny_chat.filled(made, 110), made.session()
        assert first.stats.compactions == 0
        async with aclosing(first.astream(max_new_tokens=60, min_new_tokens=60, do_sample=False)) as events:
            await anext(events)
            assert first.stats.lease_bytes == made.cap
            waiting = asyncio.create_task(second.aappend("user", "hello"))
            await until(lambda: bool(made.waiters) and made.waiters[0].tried)
            seen = [(event.type, first.stats.lease_bytes) async for event in events]
        await waiting
        assert "compaction_finished" in dict(seen)
        assert min(lease for _, lease in seen) == made.cap // 2
        tiny_chat.audit(made)


async def test_a_full_memory_takes_the_room_of_those_who_have_ended_before_it_compacts() -> None:
    """The part of a turn grows again when others have ended: it then writes on without a compaction."""
    with runtime(4) as made, tiny_chat.watched(made.cap):
        first, second = made.session(), made.session()
        await first.aappend("user", "hello")
        async with aclosing(first.astream(max_new_tokens=150, min_new_tokens=150, do_sample=False)) as events:
            await anext(events)
            waiting = asyncio.create_task(second.aappend("user", "hello"))
            await until(lambda: bool(made.waiters) and made.waiters[0].tried)
            leases = [first.stats.lease_bytes async for _ in events]
        await waiting
        assert (min(leases), leases[-1]) == (made.cap // 2, made.cap)
        assert first.stats.compactions == 0
        tiny_chat.audit(made)


def test_a_call_waits_for_turns_of_other_threads_only() -> None:
    """What this thread holds itself is never waited for; a turn of another thread is, up to wait seconds."""
    with tiny_chat.runtime(1, pressure=("disk",), wait=0.2) as made:
        first, second = tiny_chat.filled(made, 20), made.session()
        turn = first.stream(max_new_tokens=3)
        next(turn)
        with pytest.raises(RuntimeBusy, match=r"1 session\(s\) are in mid-turn"):
            second.read("hello")
        errors: list[BaseException] = []
        join(writing(second, 2, errors))
        assert len(errors) == 1
        assert "waited 0.2 s" in str(errors[0])
        made.wait = LIMIT
        thread = writing(second, 2, errors)
        while not (made.waiters and made.waiters[0].tried):
            pass
        turn.close()
        join(thread)
        assert len(errors) == 1
        assert second.last.ids


async def test_pins_that_need_more_than_a_part_wait_for_more() -> None:
    """A pinned message that a part cannot hold is read when enough of the cap is free, and not refused before."""
    with runtime(4) as made:
        first, second = made.session(), made.session()
        await first.aappend("user", "hello")
        writing = asyncio.create_task(first.agenerate(max_new_tokens=900, min_new_tokens=900, do_sample=False))
        await until(lambda: first.stats.tokens > 20)
        pinning = asyncio.create_task(second.aappend("user", "x" * 75, pin=True))
        await until(lambda: second.holding.least > 0)
        writing.cancel()
        await pinning
        assert second.stats.pinned_tokens > 75
        assert second.stats.lease_bytes == made.cap
        with pytest.raises(CapTooSmall, match="pinned tokens"):
            await second.aappend("user", "x" * 300, pin=True)


def test_sessions_that_never_compact_keep_the_whole_cap() -> None:
    """A part would make them fail where waiting does not."""
    with runtime(4) as made:
        for options in ({"policy": "full"}, {"mode": "manual"}):
            assert not made.session(**options).holding.elastic
        assert made.session().holding.elastic
        assert MOST_PARTS == 8
