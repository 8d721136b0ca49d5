"""The route ``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from agentmem.serving.attendance import begun, ended
from agentmem.serving.chat.answer import ChatAnswer
from agentmem.serving.chat.request import ChatRequest
from agentmem.serving.event_stream import EventStream, event
from agentmem.serving.pieces import Ended, Piece, Text
from agentmem.serving.refusals import error_object, refusal
from agentmem.serving.server import Server

SESSION = "X-Agentmem-Session"
"""HTTP header that holds the name of a conversation, in requests and in answers."""


def router(server: Server) -> APIRouter:
    """Return a router with the chat completions route of ``server``."""
    made = APIRouter()

    @made.post("/v1/chat/completions")
    async def create(body: ChatRequest, http: Request) -> Response:
        model = server.model(body.model)
        request = body.asks(http.state.owner, http.headers.get(SESSION), server.settings)
        answer = ChatAnswer(model, usage=body.stream_options is not None and body.stream_options.include_usage)
        if not body.stream:
            _, end = await ended(server, request, http)
            return JSONResponse(answer.whole(end), headers={SESSION: end.facts["session"]})
        pieces, first = await begun(server, request)
        headers = {} if first is None else {SESSION: first.conversation}
        return EventStream(_chunks(answer, pieces), server.settings.send_seconds, headers)

    return made


async def _chunks(answer: ChatAnswer, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[bytes]:
    """Yield the server-sent events of a streamed completion, up to ``[DONE]``.

    If the turn fails, an event with the error precedes ``[DONE]``.
    """
    async with aclosing(pieces):
        try:
            yield event(answer.first())
            async for piece in pieces:
                if isinstance(piece, Text):
                    yield event(answer.text(piece))
                elif isinstance(piece, Ended):
                    for chunk in answer.last(piece):
                        yield event(chunk)
        except Exception as error:  # noqa: BLE001  # the status has been sent: the stream reports it
            yield event({"error": error_object(refusal(error))})
        yield event("[DONE]")
