"""What a session's methods are called with: keywords by their names, values that can work, and refusals at once."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import talk
import tiny_chat
from agentmem.errors import SettingsRefused
from agentmem.sessions import Session

FACT = "The quick brown fox jumps over the lazy dog. "
HOW = ("pin", "compact", "target", "focus", "policy", "deadline")


@pytest.mark.parametrize("name", ["append", "aappend", "extend", "aextend", "read", "appending"])
def test_what_reads_says_what_it_takes(name: str) -> None:
    """The signature names every keyword, and a wrong one is a TypeError that names the method."""
    parameters = inspect.signature(getattr(Session, name)).parameters
    assert [parameter for parameter in parameters if parameter in HOW] == list(HOW)
    assert all(parameters[each].kind is inspect.Parameter.KEYWORD_ONLY for each in HOW)
    with talk.session() as session, pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected .*'pinn'"):
        getattr(session, name)("user", pinn=True)


def test_messages_for_asyncio_have_every_field() -> None:
    """``aappend`` takes what ``append`` takes."""
    sync, others = (inspect.signature(method).parameters for method in (Session.append, Session.aappend))

    assert list(sync.values()) == list(others.values())


async def test_a_tools_answer_is_read_by_asyncio() -> None:
    """With its name and the call that it answers, the same ids as without asyncio."""
    answer: dict[str, Any] = {"name": "weather", "tool_call_id": "c1"}
    with tiny_chat.runtime(2) as made:
        one, other = made.session(), made.session()
        one.append("tool", "sunny", **answer)
        await other.aappend("tool", "sunny", **answer)
        assert list(one.ids) == list(other.ids)
        assert [each.dialogue.messages[-1].tool_call_id for each in (one, other)] == ["c1", "c1"]


# ---- values


def refused(session: Session, call: Any, message: str) -> None:
    """The call is refused with that message, and the session is idle and as it was."""
    before = list(session.ids), session.dialogue, list(session.entries), session.stats
    with pytest.raises(SettingsRefused, match=message):
        call(session)
    assert (list(session.ids), session.dialogue, list(session.entries), session.stats) == before


@pytest.mark.parametrize("target", [True, "0.2", 0, -3, 0.0, 1.0, float("nan"), [1]])
def test_a_target_that_is_none_is_refused(target: Any) -> None:
    """By value, whoever is asked to compact to it, with ``compact`` and without."""
    message = "^target=.*: give a fraction between 0 and 1, such as 0.25, or slots per head$"
    with talk.session("chatml", "am-halving") as session:
        session.append("user", FACT)
        for how in ({}, {"compact": "after"}):
            refused(session, lambda one, how=how: one.append("user", FACT, target=target, **how), message)
            refused(session, lambda one, how=how: one.read(FACT, target=target, **how), message)
        refused(session, lambda one: one.compact(target=target), message)
        assert len(talk.greedy(session, 3)) == 3


def test_a_target_without_a_compaction_is_refused() -> None:
    """As a focus and a policy are: nobody would look at it."""
    with talk.session() as session:
        refused(
            session, lambda one: one.append("user", FACT, target=0.1), "^target, focus and policy steer a compaction"
        )
        refused(session, lambda one: one.read(FACT, target=4), "compact='after'")
