"""The log messages of a server, which contain no text of conversations. The command line configures logging."""

from __future__ import annotations

import logging

import structlog

ACCESS = "agentmem.access"
"""Name of the logger for requests, one line each; all other messages go to the logger ``agentmem.serving``."""


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
    """Log a request that was answered.

    ``owner`` is the beginning of the digest of the owner's API key. ``received`` and ``sent`` are the bytes of the
    request's body and of the answer's body.
    """
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
    """Log an unexpected error of the server, with its traceback."""
    LOG.error("request_failed", error=type(error).__name__, exc_info=error)
