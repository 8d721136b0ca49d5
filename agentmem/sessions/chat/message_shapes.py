"""Conversion of messages, as clients of OpenAI's interface write them, to the shape that chat templates read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from agentmem.errors import SettingsRefused
from agentmem.sessions.arguments import refusal
from agentmem.untrusted.json_text import parsed

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""For each type of content part that is text, the key of the text."""
_MAX_ARGUMENTS = 8 << 20
"""Most bytes of the arguments of a call."""
_DROPPED = ("annotations",)
"""Fields that are ignored: notes of a service about a message, which models do not read."""


def plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a message in the shape that chat templates read.

    A content that is a list of text parts becomes one text. The arguments of each call become a dict. The role
    ``developer`` becomes ``system``. If the message has no content, the text of its field ``refusal`` becomes the
    content. Fields that are null are left out.

    Raises:
        SettingsRefused: a part of the content is not text, the message has the old field ``function_call`` or an
            audio reply, or the arguments of a call are not a JSON object.

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
    """Return the joined text of a list of content parts.

    Any other value is returned unchanged, since :class:`.dialogue.Message` checks it later.
    """
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
    """Return a tool call with its arguments as a dict; arguments that are a JSON text are parsed.

    Values that are not tool calls are returned unchanged, since :class:`.dialogue.Message` checks them later.
    """
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
