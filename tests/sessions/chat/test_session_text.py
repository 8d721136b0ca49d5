"""Text that no tokenizer can read and ids that the model does not know: refused by name, and nothing was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import agentmem
from agentmem.errors import AgentmemError, SettingsRefused, UnsupportedGeneration
from agentmem.sessions import Message, Runtime, Session
from agentmem.testing import tiny_model
from support import talk, tiny_chat

CUT = json.loads('"the build failed \\ud83d"')
TEXT = "The quick brown fox jumps over the lazy dog. "


def state(session: Session) -> Any:
    """All that a call could have changed."""
    row, reply = session.memory.sequences[0], session.reply
    said = None if reply is None else (list(reply.ids), reply.text, reply.end)
    held = list(row.ids), list(row.pins.spans), row.held
    return list(session.ids), session.dialogue, list(session.entries), said, session.reply_start, session.stats, held


@pytest.mark.parametrize("reply", ["none", "open", "ended"])
@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda one: one.append("user", CUT), SettingsRefused, r"content: the character '\\ud83d' at 17 is half"),
    (lambda one: one.append("tool", TEXT, name=CUT), SettingsRefused, "name: the character"),
    (lambda one: one.extend([{"role": "user", "content": CUT}], pin=True), SettingsRefused, "content: the character"),
    (lambda one: one.read(CUT), SettingsRefused, "^read: the character"),
    (lambda one: one.say(CUT), SettingsRefused, "^say: the character"),
    (lambda one: one.append("tool", TEXT, compact="after", focus=CUT), SettingsRefused, "^focus: the character"),
    (lambda one: one.compact(focus=CUT), SettingsRefused, "^focus: the character"),
    (lambda one: one.generate(max_new_tokens=2, stop_strings=[CUT]), UnsupportedGeneration, "surrogates"),
    (lambda one: one.read([5, -1]), SettingsRefused, r"^read: \[-1\] are no ids of this model"),
    (lambda one: one.read([5, 1 << 40], pin=True), SettingsRefused, "^read: .* are no ids of this model"),
    (lambda one: one.generate(num_beams=2), UnsupportedGeneration, "num_beams"),
])  # fmt: skip
def test_a_failed_call_changes_nothing(
    reply: str, call: Callable[[Session], Any], error: type[AgentmemError], message: str
) -> None:
    """Neither ids nor the dialogue, pins, the memory or an open reply; the next turn goes on."""
    with talk.session("chatml", "am-halving", pin_pattern="build") as session:
        session.append("user", TEXT)
        if reply != "none":
            session.say("It is")
            session.generate(max_new_tokens=3, do_sample=False, keep_open=True)
        if reply == "ended" and session.reply is not None:
            session.reply.end = session.ids[-1]
        before = state(session)
        if not (reply == "ended" and error is UnsupportedGeneration):  # which has nothing to go on from
            with pytest.raises(error, match=message):
                call(session)
            assert state(session) == before
        session.append("user", TEXT)
        assert len(talk.greedy(session, 3)) == 3


@pytest.mark.parametrize("call", [
    lambda one: one.append("user", "È"),
    lambda one: one.read("aÈ", pin=True),
    lambda one: one.say("È"),
    lambda one: one.append("user", "text", compact="after", focus="È"),
])  # fmt: skip
def test_ids_that_the_model_lacks_are_refused(call: Callable[[Session], Any]) -> None:
    """Whether a text, a focus or a message makes them: a tokenizer may know more tokens than the model."""
    words = tiny_chat.tokenizer()
    small = tiny_model("llama", num_hidden_layers=2, vocab_size=words.convert_tokens_to_ids("È"))
    with tiny_chat.runtime(on=small, slots=128) as made, made.session("am-halving") as session:
        session.append("user", "hello")
        before = state(session)
        with pytest.raises(SettingsRefused, match=r"are no ids of this model, which knows 0\.\.\d+; use the token"):
            call(session)
        assert state(session) == before


def test_a_tool_and_a_name_that_cannot_be_encoded_are_refused() -> None:
    """Before there is a session."""
    tool = {"type": "function", "function": {"name": "f", "description": CUT, "parameters": {}}}
    with tiny_chat.runtime() as made:
        with pytest.raises(SettingsRefused, match=r"^tools\.function\.description: the character"):
            made.session(tools=[tool])
        with pytest.raises(SettingsRefused, match=r"^name: the character"):
            made.session(name=CUT)
        assert not made.leases.holdings


# ---- OpenAI's shapes

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SPOKEN = {**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(("given", "plain"), [
    ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
     {"content": "ab"}),
    ({"role": "assistant", "content": None, "tool_calls": [SPOKEN]}, {"tool_calls": (CALL,)}),
    ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
    ({"role": "assistant", "content": "x", "reasoning_content": "y"}, {"content": "x", "reasoning_content": "y"}),
    (
        {"role": "assistant", "content": "x", "refusal": None, "audio": None, "annotations": [], "function_call": None},
        {"content": "x"},
    ),
    ({"role": "assistant", "content": None, "refusal": "I will not."}, {"content": "I will not."}),
    ({"role": "assistant", "content": "x", "tool_calls": []}, {"content": "x"}),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": ""}}]},
     {"tool_calls": ({"function": {"name": "now", "arguments": {}}},)}),
])  # fmt: skip
def test_openai_shapes_are_read(given: dict[str, Any], plain: dict[str, Any]) -> None:
    """As the same message in the shape that chat templates read."""
    wanted = Message.model_validate({"role": given["role"]} | plain)

    assert Message.each([given]) == [wanted]


@pytest.mark.parametrize(("given", "message"), [
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
     "content=.*type 'image_url'.*text"),
    ({"role": "user", "content": ["x"]}, "content='x'"),
    ({"role": "assistant", "function_call": {"name": "f"}}, "function_call=.*tool_calls"),
    ({"role": "assistant", "audio": {"id": "a"}}, "audio=.*transcript"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
     ".*arguments='{'.*JSON object"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, ".*JSON object"),
    ({"role": "user", "content": "x", "colour": "red"}, "colour: Extra inputs.*A message has: role, content"),
])  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    """With the field, the value and the remedy."""
    with pytest.raises(SettingsRefused, match=f"^message: {message}"):
        Message.each([given])


def test_append_takes_the_content_and_the_calls_of_openai() -> None:
    """The same ids as for the plain shape."""
    with tiny_chat.runtime(2) as made:
        one, other = made.session(), made.session()
        one.append("user", "ab")
        other.append("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
        assert list(one.ids) == list(other.ids)


@pytest.mark.parametrize(("template", "remedy"), [
    ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", "template_options"),
    ("{{ raise_exception('only users') }}", "only users.*order the messages"),
    ("{% for m in messages %}{{ m.content", "no Jinja template"),
    ("{{ 1 / 0 }}{{ messages }}", "division by zero"),
])  # fmt: skip
def test_a_template_that_fails_is_named_with_the_remedy(template: str, remedy: str) -> None:
    """Whatever the template raises; the session is as it was."""
    with tiny_chat.runtime() as made:
        words = tiny_chat.tokenizer()
        kept, words.chat_template = words.chat_template, template
        try:
            session = made.session()
            with pytest.raises(SettingsRefused, match=f"^chat_template: .*{remedy}"):
                session.append("user", "x")
            assert not session.ids
            assert not session.dialogue.messages
        finally:
            words.chat_template = kept


@pytest.mark.parametrize("policy", ["am-halving[probe=focus+replay,focus=aÈ]", "summary[instruction=È]"])
def test_a_policy_s_texts_are_made_of_ids_that_the_model_knows(policy: str) -> None:
    """A text that the tokenizer turns into unknown ids is refused when the memory is made, not in every compaction."""
    words = tiny_chat.tokenizer()
    small = tiny_model("llama", num_hidden_layers=2, vocab_size=words.convert_tokens_to_ids("È"))

    with pytest.raises(SettingsRefused, match=r"^policy '.*' with the text 'a?È': \[\d+\] are no ids of this model"):
        agentmem.wrap(small, words, cap="8MiB", policy=policy)


def test_a_generation_prompt_is_made_of_ids_that_the_model_knows() -> None:
    """A template whose generation prompt has other ids is refused before the session is changed."""
    words = tiny_chat.tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}È{% endif %}"
    )
    small = tiny_model("llama", num_hidden_layers=2, vocab_size=words.convert_tokens_to_ids("È"))
    with Runtime(small, words, cap="8MiB", **tiny_chat.SETTINGS) as made:
        session = made.session()
        session.append("user", "hi")
        before = list(session.ids)
        with pytest.raises(SettingsRefused, match=r"^chat_template: .* are no ids of this model"):
            session.generate(max_new_tokens=2)
        assert (list(session.ids), session.reply) == (before, None)
