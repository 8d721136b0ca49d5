"""The routes under ``/v1/responses`` to create, get, delete and cancel a response, and to list its input items."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from agentmem.errors import RequestRefused
from agentmem.serving.affinity import parsed, routing_key
from agentmem.serving.attendance import begun, ended
from agentmem.serving.chat.route import SESSION
from agentmem.serving.event_stream import EventStream
from agentmem.serving.responses.answer import CANCELLED, ResponseAnswer
from agentmem.serving.responses.creation import Creation, event_lines, in_background
from agentmem.serving.responses.origin import origin_of
from agentmem.serving.responses.request import ResponseRequest, asks
from agentmem.serving.responses.stored import StoredResponses
from agentmem.serving.server import Server


def router(server: Server, stored: StoredResponses) -> APIRouter:
    """Return a router with the routes under ``/v1/responses`` of ``server``; responses are kept in ``stored``."""
    made = APIRouter()
    _creating(made, server, stored)
    _keeping(made, stored)
    _cancelling(made, server, stored)
    return made


def _creating(made: APIRouter, server: Server, stored: StoredResponses) -> None:
    behind: set[asyncio.Task[None]] = set()

    @made.post("/v1/responses")
    async def create(body: ResponseRequest, http: Request) -> Response:
        model = server.model(body.model)
        body.check()
        origin = origin_of(server, stored, body, http)
        route = routing_key(
            origin.owner,
            http.url.path,
            http.headers,
            parsed(await http.body()),
            partial(stored.route, owner=origin.owner),
        )
        creation = Creation(body, origin, ResponseAnswer(model, body), stored, route)
        request = replace(asks(body, origin, server.settings), response=creation.answer.id)
        if body.background:
            creation.store()
            task = asyncio.create_task(in_background(server, request, creation))
            behind.add(task)
            task.add_done_callback(behind.discard)
            return JSONResponse(creation.answer.object())
        if not body.stream:
            pieces, end = await ended(server, request, http)
            for piece in pieces:
                creation.take(piece)
            return JSONResponse(creation.answer.object(), headers={SESSION: end.facts["session"]})
        coming, first = await begun(server, request)
        headers = {} if first is None else {SESSION: first.conversation}
        return EventStream(event_lines(creation, coming), server.settings.send_seconds, headers)


def _keeping(made: APIRouter, stored: StoredResponses) -> None:
    @made.get("/v1/responses/{name}")
    async def get(name: str, http: Request, stream: Annotated[bool, Query()] = False) -> JSONResponse:  # noqa: FBT002  # a query
        if stream:
            raise RequestRefused("stream: a stored response is not streamed again; leave it out", param="stream")
        return JSONResponse(stored.get(name, http.state.owner).response)

    @made.get("/v1/responses/{name}/input_items")
    async def input_items(
        name: str,
        http: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> JSONResponse:
        return JSONResponse(_page(stored.get(name, http.state.owner).input, limit, order, after))

    @made.delete("/v1/responses/{name}")
    async def delete(name: str, http: Request) -> JSONResponse:
        stored.get(name, http.state.owner)
        stored.drop(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})


def _cancelling(made: APIRouter, server: Server, stored: StoredResponses) -> None:
    @made.post("/v1/responses/{name}/cancel")
    async def cancel(name: str, http: Request) -> JSONResponse:
        found = stored.get(name, http.state.owner)
        for turn in [each for each in server.turns if each.request.response == name]:
            await turn.stop(RequestRefused("the response was cancelled", status=409, code=CANCELLED))
        if found.response["status"] != "in_progress":
            raise RequestRefused(
                f"response {name!r} is {found.response['status']}; only one in progress can be cancelled",
                code="response_not_in_progress",
            )
        stored.put(found.model_copy(update={"response": {**found.response, "status": "cancelled"}}))
        return JSONResponse(stored.get(name, http.state.owner).response)


def _page(items: list[dict[str, Any]], limit: int, order: str, after: str | None) -> dict[str, Any]:
    """Return one page of ``items`` as OpenAI's list object.

    The page has at most ``limit`` items in the given ``order``. It begins after the item with the id ``after``.
    """
    ordered = items if order == "asc" else items[::-1]
    start = next((at + 1 for at, item in enumerate(ordered) if item["id"] == after), 0)
    page = ordered[start : start + limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": "", "last_id": ""}
    return {"object": "list", "data": page, "has_more": start + limit < len(ordered), **ends}
