"""``POST /v1/responses/compact``: compact a conversation, and return a compaction item that stands for its memory."""

from __future__ import annotations

import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from agentmem.serving.attendance import ended
from agentmem.serving.chat.route import SESSION
from agentmem.serving.pieces import Made
from agentmem.serving.responses.origin import origin_of
from agentmem.serving.responses.request import CompactRequest, Origin, asks_compaction
from agentmem.serving.responses.stored import StoredResponses
from agentmem.serving.server import Server


def router(server: Server, stored: StoredResponses) -> APIRouter:
    """Return a router with the compaction route of ``server``."""
    made = APIRouter()

    @made.post("/v1/responses/compact")
    async def compact(body: CompactRequest, http: Request) -> JSONResponse:
        server.model(body.model)
        origin = origin_of(server, stored, body, http)
        pieces, end = await ended(server, asks_compaction(body, origin), http)
        (item,) = [piece for piece in pieces if isinstance(piece, Made)]
        answer = {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [*_user_messages(origin), _item(item)],
            "usage": end.usage.responses(),
            "agentmem": end.facts,
        }
        return JSONResponse(answer, headers={SESSION: end.facts["session"]})

    return made


def _item(made: Made) -> dict[str, Any]:
    return {"id": f"cmp_{made.id}", "type": "compaction", "encrypted_content": made.token}


def _user_messages(origin: Origin) -> list[dict[str, Any]]:
    """Return an output item, for people to read, for each message that the user sent after the last compaction item.

    Without a compaction item, all messages of the user are returned. The compaction item that this request makes
    stands for a memory, which contains these messages as well.
    """
    return [
        {
            "id": f"msg_{secrets.token_hex(24)}",
            "type": "message",
            "role": "user",
            "status": "completed",
            "content": [{"type": "input_text", "text": message.content}],
        }
        for message in origin.context.messages
        if message.role == "user"
    ]
