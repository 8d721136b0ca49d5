"""Configuration of logging to stderr through structlog; no other module of the project configures logging."""

from __future__ import annotations

import logging
import warnings

import structlog
from rich.text import Text
from transformers.utils import logging as transformers_logging

from agentmem.cli.console import ERR
from agentmem.cli.printable import printable

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class _ConsoleHandler(logging.Handler):
    """Log handler that prints records through the console, so that a live progress line stays below the records."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        ERR.print(Text.from_ansi(self.format(record)), soft_wrap=True)


def _printable_values(_logger: object, _name: str, values: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Replace control characters in the values of a log record, which may quote the text of a model.

    This processor must run before the renderer adds colours.
    """
    return {name: printable(value) if isinstance(value, str) else value for name, value in values.items()}


def configure(verbosity: int) -> None:
    """Configure logs by verbosity: 0 shows warnings, 1 also compactions and other memory events, 2 everything."""
    level = _LEVELS[min(verbosity, len(_LEVELS) - 1)]
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="%H:%M:%S"),
    ]
    handler = _ConsoleHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                _printable_values,
                structlog.dev.ConsoleRenderer(
                    colors=ERR.is_terminal, pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
                ),
            ],
        )
    )
    logger = logging.getLogger("agentmem")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
    _quiet_transformers(verbosity)


def log_requests() -> None:
    """Log to stderr one JSON line per request that the server answers, and one per warning or failure of the server."""
    handler = logging.StreamHandler()  # to stderr
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.ExtraAdder(),
                structlog.processors.TimeStamper(fmt="iso"),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    for name, level in (("agentmem.access", logging.INFO), ("agentmem.serving", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _quiet_transformers(verbosity: int) -> None:
    """Turn off the progress bars and advice of transformers, which are not meant for users of the command line."""
    loud = verbosity >= len(_LEVELS) - 1
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.WARNING if loud else logging.ERROR)
    if not loud:
        warnings.simplefilter("ignore")
