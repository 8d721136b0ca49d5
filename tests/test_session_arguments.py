"""What a session's methods are called with: keywords by their names, values that can work, and refusals at once."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import talk
import tiny_chat
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
