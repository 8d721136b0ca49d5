"""An HTTP response of server-sent events, which ends early if the client disconnects or reads too slowly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PING = 15.0
"""Seconds without an event after which a comment line is sent, so that proxies keep the connection open."""


def event(data: Mapping[str, Any] | str, name: str | None = None) -> bytes:
    """Return one server-sent event as bytes; ``data`` is an object to write as JSON, or a word such as ``[DONE]``."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


class EventStream(Response):
    """An HTTP response of server-sent events. The iterator ``events`` is always closed before the response ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], send_seconds: float, headers: Mapping[str, str]) -> None:
        """Prepare the response; ``send_seconds`` is the time within which the client must receive each event."""
        self.status_code, self.background, self.body = 200, None, b""
        self._events, self._seconds = events, send_seconds
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI
        """Send the events until they end, the client disconnects, or the client reads too slowly."""
        leaving = asyncio.create_task(_left(receive))
        try:
            async with aclosing(self._events) as events:  # type: ignore[type-var]  # a generator
                with suppress(OSError, TimeoutError):  # a client that left needs no answer
                    await self._send(send, {"type": "http.response.start", "headers": self.raw_headers, "status": 200})
                    if await self._all(events, send, leaving):
                        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()

    async def _all(self, events: AsyncIterator[bytes], send: Send, leaving: asyncio.Task[None]) -> bool:
        """Send all events; return ``False`` if the client disconnected before the last event."""
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                await asyncio.wait([coming, leaving], timeout=PING, return_when=asyncio.FIRST_COMPLETED)
                if leaving.done():
                    return False
                body: bytes | None = b": ping\n\n"
                if coming.done():
                    body = coming.result()
                    if body is None:
                        return True
                    coming = asyncio.ensure_future(anext(events, None))
                await self._send(send, {"type": "http.response.body", "body": body, "more_body": True})
        finally:
            coming.cancel()
            await asyncio.wait([coming])

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(self._seconds):
            await send(message)


async def _left(receive: Receive) -> None:
    """Wait until the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
