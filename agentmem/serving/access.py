"""ASGI middleware that logs and counts every request, refused ones too, without a word of what it says."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import Any

from agentmem.serving import logs
from agentmem.serving.gate import Application, Receive, Scope, Send
from agentmem.serving.metrics import Metrics

_OWNER = 8
"""Digits of an owner's digest that a log shows."""
_PATH = 200
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
NO_STATUS = 499
"""Logged where the client left before any status was sent."""


class Access:
    """Around everything else."""

    def __init__(self, app: Application, metrics: Metrics) -> None:
        """Around ``app``."""
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and write down what came of it."""
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
            route = str(getattr(scope.get("route"), "path", "none"))  # never a client's own words: they are a label
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
    """What passes through a request's two channels."""

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
