"""Tokens of a session that are unpinned: forks, files, disk, transcripts, and interrupts at any line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import SettingsRefused
from agentmem.memory.pinning import settle
from agentmem.sessions import Session
from support import talk, tiny_chat

SYSTEM, QUESTION = "You are terse.", "What is the capital of France?"


def positions(session: Session) -> list[list[int]]:
    """The positions that every head of every layer holds, in order."""
    row = session.memory.sequences[0]
    for _, store in row.full():
        settle(row, store)
    return [
        store.segment(head, 0, 0).positions.tolist() for _, store in row.full() for head in range(len(store.lengths))
    ]


def pinned(session: Session) -> list[str | None]:
    """The roles of what the transcript says is pinned."""
    return [entry.role for entry in session.transcript.entries if entry.pinned]


def test_what_is_unpinned_is_compacted_like_the_rest() -> None:
    """A system prompt was kept through compactions; unpinned, the next ones take it, and the slots are given out."""
    with talk.session(**talk.TIGHT) as session:
        session.append("system", SYSTEM)
        session.append("user", QUESTION)
        system = session.transcript.entries[0]
        assert pinned(session) == ["system"]
        while session.stats.compactions < 2:
            session.append("user", QUESTION)
        tokens = set(range(4, system.stop))
        assert all(tokens <= set(held) for held in positions(session))
        session.unpin(0, system.stop)
        assert session.stats.pinned_tokens == 0
        assert pinned(session) == []
        while session.stats.compactions < 4:
            session.append("user", QUESTION)
        assert not any(tokens & set(held) for held in positions(session))
        assert session.memory.sequences[0].front(4) == 4


def test_a_transcript_says_what_is_pinned_whole() -> None:
    """A message of which a part was unpinned is not; pinned again it is; an open reply likewise."""
    with talk.session(**talk.ROOMY, pin_roles=("system", "assistant")) as session:
        session.append("system", SYSTEM)
        session.append("user", QUESTION)
        system, user = session.transcript.entries
        session.generate(max_new_tokens=4, do_sample=False, keep_open=True)
        assert pinned(session) == ["system", "assistant", "assistant"]
        reply = session.transcript.entries[-1]
        session.unpin(reply.stop - 2, reply.stop - 1)
        session.unpin(system.start + 1, system.start + 2)
        assert pinned(session) == ["assistant"]
        session.pin(system.start, user.stop)
        assert pinned(session) == ["system", "user", "assistant"]
        session.unpin(user.start, user.stop)
        assert pinned(session) == ["system", "assistant"]
        session.append("user", QUESTION)
        assert pinned(session) == ["system", "assistant"]


def test_unpinning_is_refused_as_pinning_is() -> None:
    """Tokens that are not there and what is no number are refused; what is not pinned stays as it is."""
    with talk.session(**talk.TIGHT) as session:
        session.append("system", SYSTEM)
        session.append("user", QUESTION)
        before = session.stats
        with pytest.raises(SettingsRefused, match=r"^unpin: tokens 0..1000 are not among the"):
            session.unpin(0, 1000)
        with pytest.raises(SettingsRefused, match=r"^unpin: start='a': give a whole number"):
            session.unpin("a", 3)  # type: ignore[arg-type]
        session.unpin(len(session.ids) - 3, len(session.ids))
        assert session.stats == before


@pytest.mark.parametrize("way", ["fork", "disk", "file"])
@pytest.mark.parametrize("policy", ["window", "am-halving", "heavy-hitters"])
def test_unpinned_tokens_are_forked_moved_and_saved(way: str, policy: str, tmp_path: Path) -> None:
    """Before their slots have moved back: whoever goes on has the same slots and tokens as a session that stayed."""
    with tiny_chat.runtime(3.2, policy, pressure=("trim", "disk")) as made:
        session, twin = made.session(), made.session()
        for each in (session, twin):
            each.append("system", "be kind")
            each.read(tiny_chat.ids(80))
            each.unpin(6, 20)
            assert each.memory.sequences[0].promoted == ((4, each.transcript.entries[0].stop),)
        if way == "fork":
            session = session.fork()
        elif way == "file":
            session.save(tmp_path)
            session = made.load(tmp_path)
        else:
            with made.scheduler.lock:
                session.holding.preempt("disk", made.folder)
            assert session.stats.state == "on disk"
            assert session.stats.pinned_tokens == twin.stats.pinned_tokens
            assert session.transcript == twin.transcript
            session.unpin(5, 6)
            twin.unpin(5, 6)
        for each in (session, twin):
            each.read(tiny_chat.ids(70, 3))
        assert tiny_chat.on(session) == tiny_chat.on(twin)
        assert session.memory.sequences[0].pins == twin.memory.sequences[0].pins
        assert session.memory.sequences[0].promoted == twin.memory.sequences[0].promoted
        assert tiny_chat.same(tiny_chat.slots(session), tiny_chat.slots(twin))
        tiny_chat.audit(made)


def test_a_fork_keeps_the_pins_that_its_parent_gives_up() -> None:
    """A memory is shared until one of the two changes its pins; each has its own then."""
    with tiny_chat.runtime(3.2, "window") as made:
        session = made.session()
        session.append("system", "be kind")
        session.read(tiny_chat.ids(80))
        fork = session.fork()
        count = session.stats.pinned_tokens
        session.unpin(0, count)
        assert (session.stats.pinned_tokens, fork.stats.pinned_tokens) == (0, count)
        for each in (session, fork):
            each.read(tiny_chat.ids(80, 2))
        assert session.memory.sequences[0].promoted == ()
        assert fork.memory.sequences[0].promoted == ((4, count),)


@pytest.mark.parametrize("stage", ["compact", "trim"])
def test_an_idle_memory_gives_back_what_was_unpinned(stage: Any) -> None:
    """Compacted further while it is idle, it halves a segment that has what was unpinned."""
    with tiny_chat.runtime(2, "window", slots=96) as made:
        session = made.session()
        session.append("system", "x" * 10)
        session.read(tiny_chat.ids(50))
        session.unpin(0, session.stats.pinned_tokens)
        held, resident = session.stats.total_slots, session.memory.ledger.resident
        with made.scheduler.lock:
            session.holding.preempt(stage, made.folder)
        segment = (held - 6 * 12) // 6
        left = 6 * (12 + segment // 2) if stage == "compact" else held
        assert session.stats.total_slots == left
        assert session.memory.ledger.resident < resident
        assert tiny_chat.on(session)
        tiny_chat.audit(made)
