"""Messages as clients of OpenAI's interface write them, in the one shape that chat templates read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from agentmem.errors import SettingsRefused
from agentmem.sessions.arguments import refusal
from agentmem.untrusted.json_text import parsed

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are text, and where it stands in them."""
_MAX_ARGUMENTS = 8 << 20
"""Bytes of a call's arguments."""
_DROPPED = ("annotations",)
"""Notes of a service about a message, which no model reads."""


def plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """A message's fields: text for content, calls with their arguments as objects, nothing that is null.

    The role developer is the system's. A refusal is what the assistant said where it has no other content.

    Raises:
        SettingsRefused: a part of the content that is no text, a function call of the old kind, an audio reply, or
            arguments of a call that are no JSON object.

    """
    fields = {name: value for name, value in given.items() if value is not None and name not in _DROPPED}
    if fields.get("role") == "developer":
        fields["role"] = "system"
    for name, remedy in (
        ("function_call", "write it as tool_calls=[{'type': 'function', 'function': {...}}]"),
        ("audio", "sessions read text; give its transcript as content"),
    ):
        if name in fields:
            raise refusal(f"message: {name}", fields[name], remedy)
    refused = fields.pop("refusal", "")
    fields["content"] = _text(fields.get("content", "")) or refused
    if "tool_calls" in fields:
        fields["tool_calls"] = _calls(fields["tool_calls"]) or None
    return fields


def _text(content: object) -> object:
    """The text of a list of parts; all else is left for the message to check."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return content
    return "".join(map(_part, content))


def _part(part: object) -> str:
    part = part.model_dump() if isinstance(part, BaseModel) else part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(_TEXTS[kind]) if isinstance(part, Mapping) and kind in _TEXTS else None
    if not isinstance(text, str):
        raise refusal(
            "message: content",
            part,
            f"a part of the type {kind!r} cannot be read, only text; write {{'type': 'text', 'text': ...}}, and "
            "describe images, audio and files in words",
        )
    return text


def _calls(calls: object) -> object:
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        return calls
    return tuple(map(_call, calls))


def _call(call: object) -> object:
    """One call; the arguments that clients send as a JSON text become the object that templates write."""
    call = call.model_dump(exclude_none=True) if isinstance(call, BaseModel) else call
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _object(arguments)
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _object(text: str) -> dict[str, Any]:
    try:
        return parsed((text or "{}").encode("utf-8", "surrogatepass"), _MAX_ARGUMENTS, strict=False)
    except ValueError as error:
        raise _wrong(text) from error


def _wrong(text: str) -> SettingsRefused:
    return refusal(
        "message: tool_calls.function.arguments", text, "give a JSON object, as text or as a dict; repair it first"
    )
