"""HTTP connections that are closed if the head of a request (first line and headers) takes too long to arrive."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0
"""Seconds within which the first line and the headers of a request must arrive."""


class Impatient(H11Protocol):
    """uvicorn's h11 protocol with a time limit for the head of each request; uvicorn limits only the head's size."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the timer for the head of the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Process received data, and stop the timer when the head of a request is complete."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Restart the timer for the head of the next request."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer when the connection is closed."""
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
    """Raise this process's limit of open files, and so of connections, to the operating system's hard limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
