"""What a session's methods are called with: keywords by their names, values that can work, and refusals at once."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from agentmem.errors import SettingsRefused, UnsupportedGeneration
from agentmem.sessions import Session
from support import talk, tiny_chat

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


@pytest.mark.parametrize(("how", "message"), [
    ({"focus": 5}, "^focus=5: give a text"),
    ({"policy": 3}, "^policy=3: give a text"),
    ({"policy": ["window"]}, "^policy="),
    ({"deadline": "x"}, "^deadline='x': give a number of seconds"),
    ({"deadline": float("nan")}, "^deadline=nan"),
    ({"pin": "yes"}, "^pin='yes': give True or False"),
    ({"compact": ["after"]}, "is unknown; write 'after'"),
], ids=lambda given: next(iter(given)) if isinstance(given, dict) else "")  # fmt: skip
def test_how_a_text_is_read_is_checked(how: dict[str, Any], message: str) -> None:
    """By name and value, with ``compact`` and without."""
    with talk.session() as session:
        for given in (how, {"compact": "after"} | how):
            refused(session, lambda one, given=given: one.append("user", FACT, **given), message)
            refused(session, lambda one, given=given: one.read(FACT, **given), message)


@pytest.mark.parametrize(("call", "message"), [
    (lambda one: one.extend(["x"]), "^message 'x' is none; write"),
    (lambda one: one.extend({"role": "user", "content": "x"}), "^messages: .* is no list of them"),
    (lambda one: one.extend(3), "^messages: 3 is no list"),
    (lambda one: one.extend([{1: "user"}]), "^message {1: 'user'} is none"),
    (lambda one: one.append("assistant", "", tool_calls="x"), "^message: tool_calls"),
    (lambda one: one.append("assistant", "", tool_calls=["x"]), "^message: tool_calls.0"),
    (lambda one: one.read(5), "^read=5: give a text, or ids, which are whole numbers"),
    (lambda one: one.read(["a"]), "^read="),
    (lambda one: one.read([1.5]), "^read="),
    (lambda one: one.read(None), "^read=None"),
    (lambda one: one.say(None), "^say=None: give a text"),
    (lambda one: one.pin("a", 3), "^pin: start='a': give a whole number, 0 at least"),
    (lambda one: one.pin(0, 3.0), "^pin: stop=3.0"),
    (lambda one: one.compact(focus=5), "^focus=5"),
    (lambda one: one.compact(policy=3), "^policy=3"),
    (lambda one: one.generate(deadline="x"), "^deadline='x'"),
    (lambda one: one.astream(deadline="x"), "^deadline='x'"),
])  # fmt: skip
def test_what_no_session_can_read_is_refused(call: Any, message: str) -> None:
    """With the argument's name and value; the session goes on."""
    with talk.session("chatml", "am-halving") as session:
        session.append("user", FACT)
        refused(session, call, message)
        assert len(talk.greedy(session, 3)) == 3


@pytest.mark.parametrize("config", [3, "x", {"max_new_tokens": 3}])
def test_what_is_no_generation_config_is_refused(config: Any) -> None:
    """As other options of ``generate`` that cannot be served."""
    with talk.session() as session:
        session.append("user", FACT)
        with pytest.raises(UnsupportedGeneration, match=r"^generation_config: .* is no transformers.GenerationConfig"):
            session.generate(generation_config=config)
        assert len(talk.greedy(session, 3)) == 3
