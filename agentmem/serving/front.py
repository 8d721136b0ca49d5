"""The front of several replicas: admits requests, and passes each to the replica that holds its conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, MutableMapping
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers

from agentmem.errors import RequestRefused
from agentmem.serving import refusals
from agentmem.serving.affinity import parsed, routing_key
from agentmem.serving.dashboard.route import OPEN
from agentmem.serving.event_stream import event
from agentmem.serving.gate import Gate, Receive, Scope, Send
from agentmem.serving.inprocess import Message
from agentmem.serving.keys import ApiKeys
from agentmem.serving.logs import LOG
from agentmem.serving.responses.stored import StoredResponses
from agentmem.serving.settings import ServerSettings

Call = Callable[[str, Scope, bytes], AsyncGenerator[Message]]
"""Has a replica, chosen by a routing key, answer a request; closing the iterator ends the request there."""
_PASSED_ON = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "client",
    "server",
)
_TRIES = 2
"""How often a request is passed on, if the replica that has it dies before the first byte of its answer."""


def create_front(
    call: Call, died: tuple[type[Exception], ...], settings: ServerSettings, keys: ApiKeys, replicas: int
) -> FastAPI:
    """Return the ASGI application in front of so many ``replicas``.

    ``call`` passes a request to a replica, and raises one of ``died`` if that replica dies in the midst of it.
    """
    app = FastAPI(title="agentmem", docs_url=None, redoc_url=None, openapi_url=None)
    limits = settings.model_copy(update={"max_requests": replicas * settings.max_requests})
    app.add_middleware(Gate, settings=limits, keys=keys, also_open=OPEN)
    refusals.handle(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    app.mount("/", Relay(call, died, settings))
    return app


class Relay:
    """ASGI application that has a replica answer each request."""

    def __init__(self, call: Call, died: tuple[type[Exception], ...], settings: ServerSettings) -> None:
        """Pass requests on by ``call``; see :func:`create_front`."""
        self._call, self._died, self._seconds = call, died, settings.send_seconds
        self._stored = StoredResponses(settings.max_responses, settings.item_seconds, settings.responses)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, once more if its replica dies before the answer begins, and end it if the client leaves.

        Raises:
            RequestRefused: status 503: no replica could answer.

        """
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        body = bytes((await receive()).get("body", b""))
        key, plain = self._key(scope, body), {name: scope[name] for name in _PASSED_ON if name in scope}
        answered = _Answered(send, self._seconds)
        leaving = asyncio.create_task(_left(receive))
        try:
            for _ in range(_TRIES):
                try:
                    await _copy(self._call(key, plain, body), answered, leaving)
                except self._died as error:
                    LOG.warning("replica_lost", path=scope["path"][:200], error=type(error).__name__)
                    if answered.begun:
                        break
                else:
                    return
            await answered.break_off()
        finally:
            leaving.cancel()

    def _key(self, scope: Scope, body: bytes) -> str:
        owner = str(scope.get("state", {}).get("owner", ""))
        given = parsed(body) if body else None
        return routing_key(owner, scope["path"], Headers(scope=scope), given, partial(self._stored.route, owner=owner))


class _Answered:
    """A request's ``send``, which knows how far the answer has come."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self.begun = self._ended = self._streams = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Send a message.

        Raises:
            TimeoutError: the client does not read.

        """
        if message["type"] == "http.response.start":
            self.begun, self._streams = (
                True,
                dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event"),
            )
        self._ended = message["type"] == "http.response.body" and not message.get("more_body")
        async with asyncio.timeout(self._seconds):
            await self._send(message)

    async def break_off(self) -> None:
        """Tell the client that no more of the answer comes: by a status, a stream's event or a broken connection.

        Raises:
            RequestRefused: status 503: the answer has not begun.
            ConnectionError: the answer has begun, and is no stream of events.

        """
        lost = RequestRefused(
            "the replica that had this request was lost; send it again, and the conversation goes on elsewhere",
            status=503,
            code="replica_lost",
        )
        if not self.begun:
            raise lost
        if self._ended:
            return
        if not self._streams:
            raise ConnectionError(str(lost))
        await self({"type": "http.response.body", "body": event({"error": refusals.error_object(lost)})})


async def _copy(messages: AsyncGenerator[Message], send: Send, leaving: asyncio.Task[None]) -> None:
    """Send all messages; stop at the client's leaving, or if it does not read."""
    try:
        while True:
            coming = asyncio.ensure_future(anext(messages, None))
            try:
                await asyncio.wait([coming, leaving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait([coming])
            if coming.cancelled() or (message := coming.result()) is None:
                return
            await send(message)
    except TimeoutError:
        return
    finally:
        await messages.aclose()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
