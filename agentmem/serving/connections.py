"""Connections that never come to a request: each has so many seconds for the head of one, then it is closed."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0
"""In which the first line and the headers of a request must have arrived."""


class Impatient(H11Protocol):
    """uvicorn's protocol by h11, which bounds the bytes of a head; this bounds its time."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The time for the first head begins."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """It ends when a request has begun; a later head of the same connection has as long again."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The time for the next head begins."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for."""
        super().connection_lost(exc)
        self._forget()

    @property
    def _busy(self) -> bool:
        cycle: Any = self.cycle  # None before the first request, whatever its annotation says
        return cycle is not None and not cycle.response_complete

    def _watch(self) -> None:
        if self._busy:
            self._forget()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self._too_late)

    def _forget(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.cancel()

    def _too_late(self) -> None:
        self._waiting = None
        if not self._busy:
            self.transport.abort()


def allow_many() -> None:
    """Let this process have as many connections and files open as its user may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
