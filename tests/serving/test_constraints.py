"""Replies that are held to a form: calls that a client demands, and JSON of its schema."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import httpx2
import pytest
from jsonschema import validate
from openai.types.chat import ChatCompletion

from agentmem import Runtime
from agentmem.errors import RequestRefused
from agentmem.serving import launch
from agentmem.serving.constraints import Constraints
from agentmem.serving.tool_calls import HERMES, LLAMA3, MISTRAL, ToolFormat
from agentmem.serving.tools import Function
from support import chat_templates, serving, talk
from support.responses import events, respond

CHAT = "/v1/chat/completions"
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ROOM = {"max_tokens": 60}


@cache
def tokenizer() -> Any:
    """One of bytes, whose template has a place for tools."""
    made = copy.deepcopy(chat_templates.tokenizer("chatml"))  # others share it
    made.chat_template = launch.read_template("chatml-tools")
    return made


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a random model."""
    made = Runtime(talk.model(), tokenizer(), cap="64MiB", share=0.25, policy="window", **talk.ROOMY)
    async with serving.client(serving.server(made)) as client:
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_call_that_is_demanded_is_written(http: httpx2.AsyncClient, choice: Any) -> None:
    """One of the tools, or the one that is named, with arguments of its schema, whatever the model would have said."""
    body = serving.chat("Hello", tools=[WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=False, **ROOM)
    answer = await http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    (one,) = ChatCompletion.model_validate(answer.json(), strict=True).choices
    assert (one.finish_reason, one.message.content) == ("tool_calls", None)
    (call,) = one.message.tool_calls or ()
    assert call.type == "function"
    if choice == "required":
        assert call.function.name in ("weather", "clock")
    else:
        assert call.function.name == "weather"
    schema = {"weather": CITY, "clock": {"type": "object", "maxProperties": 0}}[call.function.name]
    validate(json.loads(call.function.arguments), schema)

    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain"}
    told = [*body["messages"], one.message.model_dump(exclude_none=True), result]
    more = (await http.post(CHAT, json=serving.chat(tools=[WEATHER, CLOCK]) | {"messages": told})).json()
    assert more["agentmem"]["continued"]


async def test_responses_and_streams_demand_calls_too(http: httpx2.AsyncClient) -> None:
    """In the shapes of that route."""
    tool = {"type": "function", **WEATHER["function"], "strict": True}  # type: ignore[dict-item]  # a mapping
    fields = {"tools": [tool], "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 60}
    made = await respond(http, "Hello", **fields)
    (call,) = made.output
    assert call.type == "function_call"
    validate(json.loads(call.arguments), CITY)
    told = await events(http, "Hello", **fields)
    (arguments,) = [each.arguments for each in told if each.type == "response.function_call_arguments.done"]
    assert arguments == call.arguments


async def test_json_fits_the_schema(http: httpx2.AsyncClient) -> None:
    """On both routes."""
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": CITY, "strict": True}}
    made = (await http.post(CHAT, json=serving.chat("Hello", response_format=form, **ROOM))).json()["choices"][0]
    assert made["finish_reason"] == "stop"
    validate(json.loads(made["message"]["content"]), CITY)
    flat = {"type": "json_schema", "name": "trip", "schema": CITY}
    other = await respond(http, "Hello", text={"format": flat}, max_output_tokens=60)
    validate(json.loads(other.output_text), CITY)
    assert other.text is not None
    assert other.text.format is not None
    assert other.text.format.to_dict() == flat
    anything = await http.post(CHAT, json=serving.chat("Hello", response_format={"type": "json_object"}))
    assert anything.json()["choices"][0]["message"]["content"].startswith("{")
    plain = await http.post(CHAT, json=serving.chat("Hello", response_format={"type": "text"}))
    assert plain.status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "bomb"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": ["required"]}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {"type": "string"}}}}}, None),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
async def test_what_cannot_be_kept_is_refused(
    http: httpx2.AsyncClient, fields: dict[str, Any], param: str | None
) -> None:
    """Before anything is read, with the field."""
    answer = await http.post(CHAT, json=serving.chat("Hello", **fields))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == (param or "response_format")


@pytest.mark.parametrize("writes", [HERMES, LLAMA3, MISTRAL], ids=lambda each: each.name)
def test_what_a_grammar_allows_is_read_as_a_call(writes: ToolFormat) -> None:
    """In every format: a call as that is written is allowed to its end, and nothing else."""
    begin, key, end = writes.written
    text = f'{begin}{{"name": "weather", "{key}": {{"city": "Rome", "days": 3}}}}{end}'
    constraints = Constraints(tokenizer(), writes)
    tool = Function(name="weather", parameters=CITY)
    matcher = constraints.follow(constraints.of_calls([tool]))._matcher
    ids = tokenizer().encode(text, add_special_tokens=False)
    assert matcher.validate_tokens(ids) == len(ids)
    assert matcher.validate_tokens(tokenizer().encode("Hello", add_special_tokens=False)) == 0
    found = writes.calls(text, lambda name, _: name == "weather")
    assert found is not None
    assert json.loads(found[0][0].arguments) == {"city": "Rome", "days": 3}


def test_models_without_a_format_cannot_be_made_to_call() -> None:
    """Neither where the template teaches none, nor where the tokenizer cannot be followed."""
    with pytest.raises(RequestRefused, match="teaches no format"):
        Constraints(tokenizer(), None).of_calls([Function(name="x")])
    with pytest.raises(RequestRefused, match="tokenizer cannot be held to a form"):
        Constraints(serving.tiny_chat.tokenizer(), HERMES).of_calls([Function(name="x")])
