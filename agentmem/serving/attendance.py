"""Functions that run a turn (a request to the model) for one HTTP request, until its end or until the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from starlette.requests import Request as HttpRequest

from agentmem.errors import RequestRefused
from agentmem.serving.pieces import Begun, Ended, Piece
from agentmem.serving.server import Server
from agentmem.serving.turns import Request, Turn

GRACE = 10.0
"""Seconds for which a streamed request waits for its turn's first piece before the HTTP status is sent.

An error within this time becomes an HTTP status; a later error becomes an event of the stream.
"""
CLIENT_LEFT = 499


@asynccontextmanager
async def turn_of(server: Server, request: Request) -> AsyncIterator[Turn]:
    """Start a turn, yield it, and end it when the ``async with`` block ends.

    Raises:
        RequestRefused: status 503 if the server is shutting down; status 400 if the reply cannot be constrained to
            the requested form.

    """
    if server.closing:
        raise RequestRefused("this server is shutting down; try another one", status=503, code="shutting_down")
    param = "text.format" if request.response else "response_format"
    grammar = server.constraints.of(request.forced, request.schema, param)
    turn = Turn(server, replace(request, sampling=replace(request.sampling, grammar=grammar)))
    server.turns.add(turn)
    try:
        yield turn
    finally:
        await turn.stop()
        server.turns.discard(turn)


async def ended(server: Server, request: Request, http: HttpRequest) -> tuple[list[Piece], Ended]:
    """Run a turn to its end; return the list of all pieces of its result, and the last piece by itself as well.

    If the client disconnects first, the turn is stopped.

    Raises:
        AgentmemError: the turn failed, or the client disconnected.

    """
    async with turn_of(server, request) as turn:
        reading = asyncio.ensure_future(_all(turn))
        leaving = asyncio.ensure_future(_left(http))
        try:
            await asyncio.wait([reading, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise RequestRefused("the client left", status=CLIENT_LEFT, code="client_left")
            return reading.result()
        finally:
            for each in (reading, leaving):
                each.cancel()
            await asyncio.wait([reading, leaving])


async def _all(turn: Turn) -> tuple[list[Piece], Ended]:
    pieces = [piece async for piece in turn.pieces()]
    last = pieces[-1]
    assert isinstance(last, Ended)  # noqa: S101  # the last piece is Ended, or an error was raised
    return pieces, last


async def _left(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def begun(server: Server, request: Request) -> tuple[AsyncGenerator[Piece], Begun | None]:
    """Start a turn, and wait up to :data:`GRACE` seconds for its first piece, a :class:`Begun`.

    Return two things. The first is an iterator over the pieces; the caller must close it, which ends the turn. The
    second is the ``Begun`` piece if it came in time, else ``None``. If ``Begun`` is returned, the iterator does not
    yield it again.

    Raises:
        AgentmemError: the turn failed within :data:`GRACE` seconds.

    """
    pieces = _pieces(server, request)
    first = asyncio.ensure_future(anext(pieces))
    try:
        await asyncio.wait([first], timeout=GRACE)
        if first.done():
            found = first.result()
            return pieces, found if isinstance(found, Begun) else None
    except BaseException:
        first.cancel()
        await asyncio.wait([first])
        await pieces.aclose()
        raise
    return _resumed(first, pieces), None


async def _pieces(server: Server, request: Request) -> AsyncGenerator[Piece]:
    async with turn_of(server, request) as turn:
        async for piece in turn.pieces():
            yield piece


async def _resumed(first: asyncio.Future[Piece], rest: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
    """Wait for the first piece of a turn and yield it, then yield the remaining pieces."""
    try:
        yield await first
        async for piece in rest:
            yield piece
    finally:
        first.cancel()
        await asyncio.wait([first])
        await rest.aclose()
