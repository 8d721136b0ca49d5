"""Calls of tools in texts: each family's format, and everything that is text after all."""

from __future__ import annotations

import json

import pytest

from agentmem.serving.reply_text import ReplyText
from agentmem.serving.tool_calls import HERMES, LLAMA3, MISTRAL, ToolFormat, tool_format
from support import chat_templates


def known(name: str, _: object) -> bool:
    """The tools of a request."""
    return name in {"weather", "time"}


PARIS = {"city": "Paris", "note": "a </tool_call> [ARGS] {"}
ONE = json.dumps({"name": "weather", "arguments": PARIS})
TWO = json.dumps({"name": "time", "arguments": {}})

CALLS = [
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", ["weather"], ""),
    (HERMES, f"Let me see.\n<tool_call>{ONE}</tool_call>\n<tool_call>\n{TWO}", ["weather", "time"], "Let me see."),
    (HERMES, f"<tool_call>{ONE}</tool_call> Done.", ["weather"], "Done."),
    (LLAMA3, json.dumps({"name": "weather", "parameters": PARIS}), ["weather"], ""),
    (LLAMA3, f'<|python_tag|>{ONE}; {{"name": "time", "parameters": {{}}}}', ["weather", "time"], ""),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}, {TWO}]", ["weather", "time"], ""),
    (MISTRAL, f"Well.[TOOL_CALLS]weather[ARGS]{json.dumps(PARIS)}", ["weather"], "Well."),
]
TEXTS = [
    (HERMES, f"<tool_call>{ONE[:-3]}"),
    (HERMES, '<tool_call>{"name": "bomb", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
    (HERMES, "a <tool_ and then nothing"),
    (HERMES, "<tool_call>" + "[" * 10_000),
    (LLAMA3, '{"colour": "red"}'),
    (LLAMA3, f"The call is {ONE}"),
    (LLAMA3, "{not json"),
    (MISTRAL, "[TOOL_CALLS] [3]"),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}] and more"),
    (MISTRAL, "[TOOL_CALLS]"),
]


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(("family", "text", "names", "said"), CALLS)
def test_calls_are_taken_out_of_the_text(family: ToolFormat, text: str, names: list[str], said: str, size: int) -> None:
    """In pieces of any size: the calls with their arguments, the text beside them, and no piece of a call as text."""
    reply = ReplyText((), family, known)
    told = "".join(reply.push(text[at : at + size]) for at in range(0, len(text), size)) + reply.end()

    assert told == reply.sent == said
    assert [call.name for call in reply.calls] == names
    assert json.loads(reply.calls[0].arguments) == PARIS
    assert len({call.id for call in reply.calls}) == len(names)


@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize(("family", "text"), TEXTS)
def test_what_is_no_call_stays_text(family: ToolFormat, text: str, size: int) -> None:
    """Malformed JSON, a tool that the request does not have and JSON that is an answer come through whole."""
    reply = ReplyText((), family, known)
    told = "".join(reply.push(text[at : at + size]) for at in range(0, len(text), size)) + reply.end()

    assert (told, reply.calls) == (text, [])


def test_without_tools_a_call_is_text() -> None:
    """Calls are looked for only where the request has tools."""
    reply = ReplyText((), HERMES)
    assert reply.push(CALLS[0][1]) + reply.end() == CALLS[0][1]


def test_the_identifiers_of_mistral_have_nine_letters() -> None:
    """Its chat template refuses others."""
    found = MISTRAL.calls(f"[TOOL_CALLS] [{ONE}]", known)
    assert found is not None
    assert len(found[0][0].id) == 9
    assert found[0][0].id.isalnum()


@pytest.mark.parametrize(
    ("family", "expected"), [("qwen3", HERMES), ("llama3", LLAMA3), ("mistral", MISTRAL), ("gemma", None)]
)
def test_the_template_says_which_format_a_model_writes(family: str, expected: ToolFormat | None) -> None:
    """By the words of its source; one that knows no calls has no format."""
    assert tool_format(str(chat_templates.FAMILIES[family].source)) is expected


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_reply_ends_before_the_first_stop_sequence(size: int) -> None:
    """No part of a stop sequence is shown, nor anything after it; what only began like one is."""
    text, stop = "one two st stop sta END rest", ("stop", "END")
    reply = ReplyText(stop)
    told = "".join(reply.push(text[at : at + size]) for at in range(0, len(text), size)) + reply.end()

    assert told == reply.sent == "one two st "
    assert reply.stopped

    other = ReplyText(stop)
    assert other.push("a st") == "a "
    assert other.push("art EN") + other.end() == "start EN"
    assert not other.stopped
