"""ASGI middleware that logs and counts every request, including refused ones, but never logs a body."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import Any

from agentmem.serving import logs
from agentmem.serving.gate import Application, Receive, Scope, Send
from agentmem.serving.metrics import Metrics

_OWNER = 8
"""Number of digits of the owner's key digest that the log shows."""
_PATH = 200
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
NO_STATUS = 499
"""Status that is logged if the client left before the server sent one."""


class Access:
    """The outermost middleware, which counts and logs each HTTP request when the request ends."""

    def __init__(self, app: Application, metrics: Metrics) -> None:
        """Wrap the application ``app``, and count its requests in ``metrics``."""
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application; then count it, and log its status, duration and bytes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen = _Seen(receive, send)
        start = time.monotonic()
        try:
            await self.app(scope, seen.receive, seen.send)
        except Exception:
            seen.status = 500
            raise
        finally:
            route = str(getattr(scope.get("route"), "path", "none"))  # not the client's path: labels need few values
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.requests.labels(method, route, str(seen.status)).inc()
            logs.request(
                owner=str(scope.get("state", {}).get("owner", ""))[:_OWNER],
                method=method,
                path=scope["path"][:_PATH],
                status=seen.status,
                seconds=time.monotonic() - start,
                received=seen.received,
                sent=seen.sent,
            )


class _Seen:
    """Wrapper of one request's ``receive`` and ``send`` that notes the HTTP status and the bytes of both bodies."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.status, self.received, self.sent = NO_STATUS, 0, 0

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.sent += len(message.get("body", b""))
        await self._send(message)
