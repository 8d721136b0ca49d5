"""Requests of ``/v1/responses`` whose answers are checked against the SDK's models."""

from __future__ import annotations

import json
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from support.serving import MODEL

ROUTE = "/v1/responses"
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "Of a city.",
    "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


def body(given: Any, **fields: Any) -> dict[str, Any]:
    """The body of a response, greedy."""
    return {"model": MODEL, "input": given, "temperature": 0, "max_output_tokens": 6} | fields


async def respond(http: Any, given: Any, **fields: Any) -> Response:
    """A response, checked against the SDK's model."""
    answer = await http.post(ROUTE, json=body(given, **fields))
    assert answer.status_code == 200, answer.text
    return Response.model_validate(answer.json(), strict=True)


async def events(http: Any, given: Any, **fields: Any) -> list[Any]:
    """The events of a stream, each checked against the SDK's types, numbered from 0 on and named by their types."""
    answer = await http.post(ROUTE, json=body(given, stream=True, **fields))
    assert answer.status_code == 200, answer.text
    found = []
    for block in filter(None, answer.text.split("\n\n")):
        name, data = (line.partition(": ")[2] for line in block.split("\n"))
        found.append(EVENTS.validate_python(json.loads(data), strict=True))
        assert (found[-1].type, found[-1].sequence_number) == (name, len(found) - 1)
    return found
