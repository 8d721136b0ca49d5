"""Forks: they share a memory until one goes on, and from then on each is a session of its own."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from agentmem import hf
from agentmem.errors import MemoryClosed, RuntimeBusy, SettingsRefused
from agentmem.reporting.report import CompactionReport
from agentmem.sessions import Session
from agentmem.sessions.conversation import Interrupted
from support import tiny_chat

KINDS: dict[str, dict[str, Any]] = {
    "replay": {},
    "live": {"policy": "am-halving[probe=live,probe_tokens=24]"},
    "context and random": {"policy": "am-halving[probe=context+random,probe_tokens=24]"},
    "scores": {"policy": "heavy-hitters"},
    "random subset": {"policy": "random-subset"},
    "sliding windows": {"on": tiny_chat.model("gemma3_text", layers=2)},
    "unequal heads": {"policy": "head-roles"},
    "pinned": {"keep_first": 0, "pin_roles": ("system",)},
}


def talk(session: Session, *texts: str) -> list[int]:
    """Turns, each answered by five tokens; returns all ids."""
    for text in texts:
        session.append("user", text)
        session.generate(max_new_tokens=5, do_sample=session.settings.seed is not None)
    return list(session.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_forks_go_on_as_sessions_that_never_forked(kind: str) -> None:
    """Whatever policy or family: parent and fork end with the ids and slots of two sessions that shared nothing."""
    shared, left, right = ("a long way to go " * 4,), ("to the left " * 5, "again"), ("to the right " * 6, "once more")
    with tiny_chat.runtime(4, **KINDS[kind]) as made:
        alone = [made.session(seed=5), made.session(seed=5)]
        for session, path in zip(alone, (left, right), strict=True):
            session.append("system", "be kind")
            talk(session, *shared, *path)
        parent = made.session(seed=5)
        parent.append("system", "be kind")
        talk(parent, *shared)
        fork = parent.fork()
        for session, path, twin in zip((fork, parent), (right, left), reversed(alone), strict=True):
            assert talk(session, *path) == list(twin.ids)
            assert tiny_chat.same(tiny_chat.slots(session), tiny_chat.slots(twin))
            assert session.stats.compactions == twin.stats.compactions > 0
            assert session.transcript == twin.transcript
        tiny_chat.audit(made)


def test_a_fork_costs_nothing_until_it_is_written() -> None:
    """Forks of forks share one memory, charged once; the first to go on is charged for its own."""
    with tiny_chat.runtime(3) as made:
        session = tiny_chat.filled(made)
        forks = [session.fork(), session.fork()]
        forks.append(forks[0].fork())

        assert {each.holding for each in forks} == {session.holding}
        assert made.stats.charged_bytes == session.stats.lease_bytes
        assert session.stats.shared_with == 3
        before = tiny_chat.slots(session)
        ids = tiny_chat.on(forks[1])
        assert made.stats.charged_bytes == 2 * session.stats.lease_bytes
        assert (session.stats.shared_with, forks[1].stats.shared_with) == (2, 0)
        assert tiny_chat.same(tiny_chat.slots(session), before)
        assert tiny_chat.on(session) == tiny_chat.on(forks[2]) == ids
        tiny_chat.audit(made)


def test_a_fork_outlives_its_parent() -> None:
    """Closing the parent first leaves its fork the memory, without a copy."""
    with tiny_chat.runtime(1) as made:
        session = tiny_chat.filled(made)
        fork, holding = session.fork(), session.holding
        session.close()

        assert tiny_chat.on(fork)
        assert fork.holding is holding
        fork.close()
        assert made.leases.holdings == []
        with pytest.raises(MemoryClosed, match="was closed"):
            fork.fork()


def grown(session: Session, depth: int, name: str = "") -> dict[str, list[int]]:
    """The ids at the leaves of a tree of forks in which every branch reads a text of its own."""
    if not depth:
        return {name: list(session.ids)}
    branches = [session, session.fork()]
    for branch, text in zip(branches, ("one " * 6, "two " * 6), strict=True):
        talk(branch, text)
        tiny_chat.audit(session.runtime)
    return {k: v for at, each in enumerate(branches) for k, v in grown(each, depth - 1, f"{name}{at}").items()}


@cache
def grown_with_room_for_all() -> dict[str, list[int]]:
    """What nothing gives way for."""
    with tiny_chat.runtime(8) as made:
        return grown(tiny_chat.filled(made, 30), 3)


@pytest.mark.parametrize("pressure", [("disk",), ("trim", "disk"), ("trim", "compact", "disk")])
def test_a_tree_of_forks_under_a_cap_for_two(pressure: tuple[str, ...]) -> None:
    """Eight branches, most on disk at any time, end with the ids they have with room for all, if none is compacted."""
    with tiny_chat.runtime(2, pressure=pressure) as made:
        found = grown(tiny_chat.filled(made, 30), 3)
        stats = made.stats

    assert len(found) == 8
    assert stats.on_disk >= 3
    assert stats.on_disk + stats.idle == 8
    assert found == grown_with_room_for_all() or "compact" in pressure


def test_a_cap_for_one_serves_a_fork_from_disk() -> None:
    """Where the cap has room for one lease, what a fork is copied from is preempted to the disk first."""
    with tiny_chat.runtime(1, pressure=("trim", "disk")) as made:
        session = tiny_chat.filled(made)
        fork = session.fork()
        ids = tiny_chat.on(fork)

        assert session.stats.state == "on disk"
        assert tiny_chat.on(session) == ids
        tiny_chat.audit(made)
    with tiny_chat.runtime(1, pressure=("trim",)) as made:
        session = tiny_chat.filled(made)
        fork = session.fork()
        with pytest.raises(RuntimeBusy, match="cannot be preempted further"):
            tiny_chat.on(fork)


def test_a_memory_on_disk_can_be_forked() -> None:
    """A fork of a session that is on disk reads it there; the file goes with the last who needs it."""
    with tiny_chat.runtime(2, pressure=("disk",)) as made:
        session = tiny_chat.filled(made)
        others = [tiny_chat.filled(made, seed=1), tiny_chat.filled(made, seed=2)]
        assert session.stats.state == "on disk"
        fork = session.fork()
        others.pop().close()
        ids = tiny_chat.on(fork)

        assert session.stats.state == "on disk"
        assert tiny_chat.on(session) == ids
        session.close()
        fork.close()
        assert sum(1 for _ in made.folder().glob("idle-*")) == sum(each.stats.state == "on disk" for each in others)


def test_forks_of_an_interrupted_compaction_both_finish_it() -> None:
    """A fork of a session whose compaction was interrupted finishes it alike, and both are told once."""
    told: list[CompactionReport] = []
    with tiny_chat.runtime(3) as made:
        whole, session = tiny_chat.filled(made), tiny_chat.filled(made, after_compact=told.append)
        expected = whole.compact()

        def stop(calls: list[int] = []) -> None:  # noqa: B006  # counts
            calls.append(1)
            if len(calls) == 2:
                raise Interrupted("cancelled")

        made.admit(session, stop)
        session.memory.boundary = stop
        told.clear()
        with pytest.raises(Interrupted), hf.forward_context.own_frame():
            session.engine.compact(session.memory.sequences[0])
        made.end(session, stop)
        assert session.memory.sequences[0].job is not None
        fork = session.fork()
        ids = tiny_chat.on(fork)

        assert ids == tiny_chat.on(session) == tiny_chat.on(whole)
        assert expected is not None
        assert [report.slots_after for report in told] == [expected.slots_after] * 2  # the parent's, and the fork's


def test_a_fork_compacts_as_its_parent_does_before_any_forward() -> None:
    """The scale of the logits travels with a copy: a compaction right after a fork is the parent's, bit for bit."""
    with tiny_chat.runtime(3) as made:
        session = tiny_chat.filled(made)
        session.compact(target=24)
        session.read(tiny_chat.ids(20, 7))
        fork = session.fork()
        fork.compact(target=8)
        session.compact(target=8)

        assert tiny_chat.same(tiny_chat.slots(fork), tiny_chat.slots(session))


def test_a_session_in_mid_turn_cannot_be_forked() -> None:
    """A fork during a turn is refused with the remedy; after it, it works."""
    with tiny_chat.runtime(2) as made:
        session = tiny_chat.filled(made)
        turn = session.stream(max_new_tokens=4, do_sample=False)
        next(turn)
        with pytest.raises(SettingsRefused, match="end the turn first"):
            session.fork()
        turn.close()  # type: ignore[attr-defined]  # a generator

        assert session.fork().ids == session.ids


def test_a_fork_is_not_told_of_what_was_before() -> None:
    """Re-basings of before the fork are no events of the fork's turns."""
    on = tiny_chat.model(max_position_embeddings=160)
    with tiny_chat.runtime(3, on=on, rebase=True) as made:
        session = tiny_chat.filled(made, 200)
        assert session.stats.rebases
        fork = session.fork()
        kinds = [event.type for event in fork.stream(max_new_tokens=2, do_sample=False)]

        assert "rebased" not in kinds
        assert fork.stats.rebases == session.stats.rebases


def test_forks_draw_alike_from_the_same_seed() -> None:
    """The state of a session's sampling goes with the fork; without a seed the global generator is used."""
    with tiny_chat.runtime(3) as made:
        session = made.session(seed=9)
        session.read(tiny_chat.ids(20))
        tiny_chat.on(session, 5, do_sample=True)
        fork = session.fork()
        torch.manual_seed(1)
        drawn = tiny_chat.on(session, 20, do_sample=True)

        assert tiny_chat.on(fork, 20, do_sample=True) == drawn
