"""Log events: which session and runtime each is about, and that moves, forks and files are events."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from agentmem.sessions import Session
from support import tiny_chat


def seen(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The events so far, each with its fields."""
    return [{"event": each.message, **vars(each)} for each in caplog.records if each.name == "agentmem"]


def named(events: list[dict[str, Any]], event: str) -> list[str]:
    """The sessions that an event was about."""
    return [each["session"] for each in events if each["event"] == event]


def go_on(session: Session) -> None:
    """A turn that needs the session's lease."""
    session.append("user", "and on")
    session.generate(max_new_tokens=2, do_sample=False)


def test_every_event_has_its_session_and_its_runtime(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Under a cap for one session, whatever happens to two of them and to a fork."""
    caplog.set_level(logging.DEBUG, "agentmem")
    with tiny_chat.runtime(1, pressure=("trim", "disk"), spill=tmp_path / "spill", name="desk") as made:
        first = tiny_chat.filled(made, 100, name="first")
        second = tiny_chat.filled(made, 40, name="second")
        go_on(first)
        fork = first.fork("branch")
        go_on(fork)
        first.save(tmp_path / "saved")
        made.load(tmp_path / "saved", name="again").close()

    events = seen(caplog)
    assert {each["runtime"] for each in events} == {"desk"}
    assert {each["session"] for each in events} == {"first", "second", "branch", "again"}
    assert named(events, "session_opened") == ["first", "second", "again"]
    assert "first" in named(events, "compaction_started")
    assert named(events, "compaction_started") == named(events, "compaction_finished")
    assert named(events, "memory_spilled")[:2] == ["first", "second"]
    assert named(events, "memory_restored")[0] == "first"
    assert [(each["session"], each["source"]) for each in events if each["event"] == "session_forked"] == [
        ("branch", "first")
    ]
    assert named(events, "session_saved") == ["first"]
    assert named(events, "session_loaded") == ["again"]
    assert sorted(named(events, "session_closed")) == ["again", "branch", "first", "second"]
    assert second.closed


def test_a_copied_memory_is_named_by_who_uses_it(caplog: pytest.LogCaptureFixture) -> None:
    """A fork's compaction is the fork's, not that of the session whose memory it began with."""
    with tiny_chat.runtime(3) as made:
        session = tiny_chat.filled(made, 50, name="trunk")
        fork = session.fork("twig")
        caplog.set_level(logging.INFO, "agentmem")
        fork.read(tiny_chat.ids(60))

    assert set(named(seen(caplog), "compaction_finished")) == {"twig"}


def test_runtimes_have_names_of_their_own() -> None:
    """Numbered where none is given."""
    with tiny_chat.runtime() as one, tiny_chat.runtime() as other:
        assert one.name != other.name
        assert one.name.startswith("runtime-")
