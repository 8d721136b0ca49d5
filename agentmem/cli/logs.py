"""Logging is configured here and nowhere else in the project: to stderr, through structlog."""

from __future__ import annotations

import logging
import warnings

import structlog
from rich.text import Text

from agentmem.cli.console import ERR

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class _ConsoleHandler(logging.Handler):
    """Prints through the console, so that a live progress line stays below the logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        ERR.print(Text.from_ansi(self.format(record)), soft_wrap=True)


def configure(verbosity: int) -> None:
    """Show warnings; from 1 on also what happened to the memory, from 2 on everything."""
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
                structlog.dev.ConsoleRenderer(colors=ERR.is_terminal, pad_event_to=0),
            ],
        )
    )
    logger = logging.getLogger("agentmem")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
    _quiet_transformers(verbosity)


def _quiet_transformers(verbosity: int) -> None:
    """Its bars and advice are about how transformers is called, which is not the user's business here."""
    # Read when transformers is imported, which no command has done yet; its import takes seconds.
    import os  # noqa: PLC0415

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error" if verbosity < len(_LEVELS) - 1 else "warning")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbosity:
        warnings.simplefilter("ignore")
