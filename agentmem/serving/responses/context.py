"""Conversion of a request's input items to a context: messages, possibly after a compaction item."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from agentmem.errors import RequestRefused, SettingsRefused
from agentmem.sessions import Message

Items = str | list[dict[str, Any]]
_FIELDS = {
    "message": {"type", "role", "content", "id", "status", "phase"},
    "function_call": {"type", "call_id", "name", "arguments", "id", "status"},
    "function_call_output": {"type", "call_id", "output", "id", "status"},
    "compaction": {"type", "encrypted_content", "id", "created_by"},
    "compaction_trigger": {"type", "id"},
}
_ROLES = ("user", "assistant", "system", "developer")


class Context(BaseModel):
    """Everything before a reply: messages, possibly after a compaction item that stands for all earlier messages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: str | None = None
    """``encrypted_content`` of the newest compaction item, or ``None`` without an item."""
    messages: tuple[Message, ...] = ()
    """Messages after the compaction item, or all messages without an item."""
    trigger: bool = False
    """True if the input ends with a compaction trigger, which asks to compact the conversation instead of replying."""

    def then(self, other: Context) -> Context:
        """Return this context continued by ``other``.

        If ``other`` has a compaction item, the result is ``other``, because its item stands for all earlier messages.
        """
        if other.token is not None:
            return other
        return Context(token=self.token, messages=self.messages + other.messages, trigger=other.trigger)

    @classmethod
    def of(cls, items: Items) -> Context:
        """Convert input items in OpenAI's format to a context.

        Raises:
            RequestRefused: an item is invalid or of an unsupported type; the error gives its index.

        """
        if isinstance(items, str):
            return cls(messages=(Message(role="user", content=items),))
        made = cls()
        for at, item in enumerate(items):
            kind = _kind(item, at)
            if kind == "compaction_trigger" and at != len(items) - 1:
                raise _refused(at, "a compaction_trigger is the last item; move it there")
            if kind == "compaction":
                made = cls(token=_text(item, "encrypted_content", at))
            elif kind == "compaction_trigger":
                made = made.model_copy(update={"trigger": True})
            else:
                made = made.model_copy(update={"messages": _with(made.messages, kind, item, at)})
        return made


def _kind(item: object, at: int) -> str:
    if not isinstance(item, Mapping):
        raise _refused(at, "an item is an object with a type")
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind not in _FIELDS:
        raise _refused(
            at, f"items of the type {str(kind)[:40]!r} are not supported; leave it out", "unsupported_parameter"
        )
    unknown = {name for name, value in item.items() if value is not None} - _FIELDS[kind]
    if unknown:
        raise _refused(at, f"{min(map(str, unknown))[:80]!r} is no field of a {kind}; leave it out")
    return str(kind)


def _with(messages: tuple[Message, ...], kind: str, item: Mapping[str, Any], at: int) -> tuple[Message, ...]:
    """Return ``messages`` with the input item at index ``at`` added.

    A function call becomes part of the last message if that is an assistant's message.
    """
    try:
        if kind == "message":
            role = item.get("role")
            if role not in _ROLES:
                raise _refused(at, f"role {str(role)[:40]!r} is unknown; roles are {', '.join(_ROLES)}")
            return (*messages, Message.of(role=role, content=_parts(item.get("content"))))
        call_id = _text(item, "call_id", at)
        if kind == "function_call_output":
            output = _parts(item.get("output"))
            return (*messages, Message.of(role="tool", content=output, tool_call_id=call_id))
        function = {"name": _text(item, "name", at), "arguments": _text(item, "arguments", at)}
        call = {"id": call_id, "type": "function", "function": function}
        if messages and messages[-1].role == "assistant":
            before = messages[-1]
            calls = (*(before.tool_calls or ()), call)
            return (*messages[:-1], Message.of(role="assistant", content=before.content, tool_calls=calls))
        return (*messages, Message.of(role="assistant", tool_calls=[call]))
    except SettingsRefused as error:
        raise _refused(at, str(error)) from None


def _parts(content: Any) -> Any:
    """Return message content without ``annotations`` and ``logprobs``, which output items of OpenAI's SDK have."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return content
    extra = ("annotations", "logprobs")
    plain = [isinstance(part, Mapping) and {k: v for k, v in part.items() if k not in extra} for part in content]
    return plain if all(plain) else content


def _text(item: Mapping[str, Any], name: str, at: int) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise _refused(at, f"{name} is missing, or no text")
    return value


def _refused(at: int, said: str, code: str = "invalid_request") -> RequestRefused:
    return RequestRefused(f"input[{at}]: {said}", code=code, param=f"input[{at}]")


def listed(items: Items) -> list[dict[str, Any]]:
    """Return input items in the form in which the API lists them.

    A plain text becomes a user's message, and each item gets an id, a status and a type.
    """
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    made = []
    for item in items:
        kind = item.get("type") or "message"
        content = item.get("content")
        if kind == "message" and isinstance(content, str):
            part = "output_text" if item.get("role") == "assistant" else "input_text"
            item = {**item, "content": [{"type": part, "text": content, "annotations": []}]}  # noqa: PLW2901  # a copy
            if part == "input_text":
                item["content"] = [{"type": part, "text": content}]
        made.append(
            {"id": item.get("id") or f"item_{secrets.token_hex(12)}", "status": "completed", **item, "type": kind}
        )
    return made
