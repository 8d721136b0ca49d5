"""Checks of each request before its route: the API key, the number of running requests, and the size of the body."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers

from agentmem.errors import RequestRefused
from agentmem.serving.keys import ApiKeys
from agentmem.serving.refusals import response
from agentmem.serving.settings import ServerSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/health", "/ready"})
"""Routes that need no API key, since they reveal no user's data."""


class Gate:
    """ASGI middleware that admits or refuses requests, and notes the API key's owner in ``request.state.owner``."""

    def __init__(
        self, app: Application, settings: ServerSettings, keys: ApiKeys, also_open: frozenset[str] = frozenset()
    ) -> None:
        """Wrap the application ``app``; the routes in :data:`OPEN` and in ``also_open`` need no API key."""
        self.app, self.settings, self.keys = app, settings, keys
        self._open = OPEN | also_open
        self.requests = 0
        """Number of POST requests that are running or waiting."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request; pass it to the application if it is admitted, otherwise answer with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["path"] not in self._open:
                scope.setdefault("state", {})["owner"] = self.keys.owner(headers.get("authorization"))
            if scope["method"] != "POST":
                await self.app(scope, receive, send)
                return
            await self._posted(scope, headers, receive, send)
        except RequestRefused as refused:
            await response(refused)(scope, receive, send)

    async def _posted(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        if self.requests >= self.settings.max_requests:
            raise RequestRefused(
                f"{self.requests} requests are at work or wait, the most that may; try again in a moment",
                status=429,
                code="rate_limit_exceeded",
                retry_after=self.settings.retry_after,
            )
        self.requests += 1
        try:
            body = await self._body(headers, receive)
            if body is not None:
                await self.app(scope, _again(body, receive), send)
        finally:
            self.requests -= 1

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Receive and return the whole body; return ``None`` if the client disconnected first.

        Raises:
            RequestRefused: status 413 if the body is too large; status 408 if the body took too long to arrive.

        """
        most = self.settings.max_body_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise self._too_large(int(length))
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise self._too_large(len(body))
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise RequestRefused(
                f"the body did not arrive in {self.settings.body_seconds:g} s; send it at once",
                status=408,
                code="request_timeout",
            ) from None

    def _too_large(self, size: int) -> RequestRefused:
        return RequestRefused(
            f"the body has {size} bytes or more; this server takes {self.settings.max_body_bytes}. Send less, or "
            "continue a conversation that the server holds",
            status=413,
            code="request_too_large",
        )


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` callable that first gives the body, which was read already, and then later messages."""
    given = False

    async def next_message() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
