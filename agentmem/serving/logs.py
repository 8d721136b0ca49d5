"""What a server logs, without a word of what is said. Nothing is configured here; the command line does that."""

from __future__ import annotations

import logging

import structlog

ACCESS = "agentmem.access"
"""The logger of requests, one line each; everything else is ``agentmem.serving``."""


def _wrapped(name: str) -> structlog.stdlib.BoundLogger:
    made: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
    )
    return made


LOG, _ACCESS = _wrapped("agentmem.serving"), _wrapped(ACCESS)


def request(*, owner: str, method: str, path: str, status: int, seconds: float, received: int, sent: int) -> None:
    """``request``: one was answered. ``owner`` is the first digits of a digest; bytes of both bodies."""
    _ACCESS.info(
        "request",
        owner=owner,
        method=method,
        path=path,
        status=status,
        seconds=round(seconds, 4),
        received_bytes=received,
        sent_bytes=sent,
    )


def failed(error: BaseException) -> None:
    """``request_failed``: the server's own fault."""
    LOG.error("request_failed", error=type(error).__name__, exc_info=error)
