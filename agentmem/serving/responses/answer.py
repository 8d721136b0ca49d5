"""The object of a response while its turn runs, and the stream events in the order that OpenAI's SDK expects."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any, Literal

from agentmem.serving.pieces import Begun, Ended, Made, Piece, Text
from agentmem.serving.refusals import error_object, refusal
from agentmem.serving.responses.request import ResponseRequest
from agentmem.serving.tool_calls import ToolCall

CANCELLED = "cancelled"
"""Error code with which a cancelled turn ends."""
Event = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponseAnswer:
    """A response, built from the pieces of its turn. Pass each piece to :meth:`events`, which yields stream events."""

    def __init__(self, model: str, body: ResponseRequest) -> None:
        """Begin an empty response with a new id."""
        self.id = f"resp_{secrets.token_hex(24)}"
        self.output: list[dict[str, Any]] = []
        self.status: Status = "in_progress"
        self._fields = _echoed(body) | {"id": self.id, "created_at": int(time.time()), "model": model}
        self._end: dict[str, Any] = {"usage": None, "error": None, "incomplete_details": None}
        self._number, self._message = 0, ""
        self._text = ""

    def object(self) -> dict[str, Any]:
        """Return the response in its present state, as OpenAI's JSON object."""
        return {**self._fields, "object": "response", "status": self.status, "output": self.output, **self._end}

    def begin(self) -> Iterator[Event]:
        """Yield the events with which the stream begins, before the first piece."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.object())

    def events(self, piece: Piece) -> Iterator[Event]:
        """Update the response with a piece of its turn, and yield the stream events for this piece."""
        if isinstance(piece, Text):
            yield from self._delta(piece.text)
        elif isinstance(piece, Made):
            item = {"id": f"cmp_{piece.id}", "type": "compaction", "encrypted_content": piece.token}
            yield from self._whole(item)
        elif isinstance(piece, Ended):
            yield from self._ended(piece)
        else:
            assert isinstance(piece, Begun)  # noqa: S101  # there is no other piece

    def failed(self, error: Exception) -> Iterator[Event]:
        """Mark the response as failed or cancelled, depending on ``error``, and yield the last events of the stream."""
        described = error_object(refusal(error))
        self.status = "failed"
        code = "rate_limit_exceeded" if described["code"] == "rate_limit_exceeded" else "server_error"
        self._end["error"] = {"code": code, "message": described["message"]}
        if described["code"] == CANCELLED:
            self.status = "cancelled"
            self._end["error"] = None
            yield self._event("response.incomplete", response=self.object())
            return
        yield self._event("error", code=described["code"], message=described["message"], param=described["param"])
        yield self._event("response.failed", response=self.object())

    # ---- text

    def _delta(self, text: str) -> Iterator[Event]:
        if not self._message:
            yield from self._open()
        self._text += text
        yield self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def _open(self) -> Iterator[Event]:
        self._message = f"msg_{secrets.token_hex(24)}"
        yield self._event("response.output_item.added", output_index=len(self.output), item=self._item("in_progress"))
        yield self._event("response.content_part.added", **self._place(), part=_part(""))

    def _close(self, status: str) -> Iterator[Event]:
        place = self._place()
        yield self._event("response.output_text.done", **place, text=self._text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=_part(self._text))
        item = self._item(status)
        yield self._event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message, "output_index": len(self.output), "content_index": 0}

    def _item(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [_part(self._text)]
        return {"id": self._message, "type": "message", "role": "assistant", "status": status, "content": content}

    # ---- other items, and the end

    def _whole(self, item: dict[str, Any]) -> Iterator[Event]:
        """Add an output item that is complete from the start, and yield its events."""
        yield self._event("response.output_item.added", output_index=len(self.output), item=item)
        yield self._event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)

    def _call(self, call: ToolCall) -> Iterator[Event]:
        index, name = len(self.output), f"fc_{secrets.token_hex(24)}"
        item = {"id": name, "type": "function_call", "call_id": call.id, "name": call.name}
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        place = {"item_id": name, "output_index": index}
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        yield self._event("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
        done = {**item, "arguments": call.arguments, "status": "completed"}
        yield self._event("response.output_item.done", output_index=index, item=done)
        self.output.append(done)

    def _ended(self, piece: Ended) -> Iterator[Event]:
        cut = piece.reason in ("length", "deadline")
        if not self._message and not piece.calls and piece.reason != "read":
            yield from self._open()
        if self._message:
            yield from self._close("incomplete" if cut else "completed")
        for call in piece.calls:
            yield from self._call(call)
        self.status = "incomplete" if cut else "completed"
        self._end["usage"], self._end["agentmem"] = piece.usage.responses(), piece.facts
        self._end["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        if not cut:
            self._end["completed_at"] = int(time.time())
        yield self._event(f"response.{self.status}", response=self.object())

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _echoed(body: ResponseRequest) -> dict[str, Any]:
    """Return the fields of a response that repeat fields of its request."""
    tools = [
        {"type": "function", "name": tool.name, "description": tool.description, "parameters": tool.parameters}
        | {"strict": bool(tool.strict)}
        for tool in body.tools
    ]
    form = body.text.format
    return {
        "background": body.background,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "store": body.store,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": body.tool_choice or "auto",
        "tools": tools,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
    }
