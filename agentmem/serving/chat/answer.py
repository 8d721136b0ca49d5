"""The JSON of a chat completion in OpenAI's format: one whole object, or the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from agentmem.serving.pieces import Ended, Text, Usage
from agentmem.serving.tool_calls import ToolCall

_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "deadline": "length"}


class ChatAnswer:
    """Builder of the JSON of one chat completion: one whole object, or stream chunks with a common id."""

    def __init__(self, model: str, *, usage: bool = False) -> None:
        """Begin an answer with a new id; if ``usage`` is true, a stream ends with a chunk of token counts."""
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._usage = usage

    def whole(self, ended: Ended) -> dict[str, Any]:
        """Return the completion of a turn that has ended, as one object."""
        message: dict[str, Any] = {"role": "assistant", "content": ended.text or None, "refusal": None}
        if ended.calls:
            message["tool_calls"] = [_call(call) for call in ended.calls]
        elif not ended.text:
            message["content"] = ""
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _REASONS[ended.reason]}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": ended.usage.chat(),
            "agentmem": ended.facts,
        }

    def first(self) -> dict[str, Any]:
        """Return the first chunk of a stream, which has the role and empty content."""
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, piece: Text) -> dict[str, Any]:
        """Return the stream chunk for a piece of the reply's text."""
        return self._chunk({"content": piece.text})

    def last(self, ended: Ended) -> Iterator[dict[str, Any]]:
        """Yield the chunks that follow the text: tool calls, the finish reason, and token counts if asked for."""
        for index, call in enumerate(ended.calls):
            yield self._chunk({"tool_calls": [{"index": index, **_call(call)}]})
        yield self._chunk({}, _REASONS[ended.reason]) | {"agentmem": ended.facts}
        if self._usage:
            yield self._chunk(None, usage=ended.usage)

    def _chunk(
        self, delta: dict[str, Any] | None, reason: str | None = None, usage: Usage | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [] if delta is None else [choice]}
        if self._usage:
            chunk["usage"] = None if usage is None else usage.chat()
        return chunk


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
