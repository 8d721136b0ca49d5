"""Input of ``agentmem chat``: lines that a person types or that come from a pipe, one line per turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from agentmem.cli.console import ERR, OUT, note
from agentmem.errors import SettingsRefused


def read_lines(prompt: Callable[[], str]) -> Iterator[str]:
    """Yield all non-empty lines, without surrounding white space, until the input ends.

    At a terminal's prompt, Ctrl-C discards the line typed so far.

    Raises:
        SettingsRefused: the input is not UTF-8.
        KeyboardInterrupt: Ctrl-C was pressed while a pipe was read.

    """
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # Windows has no readline module
            import readline  # noqa: F401  # gives input() its history and its editing
    while (line := _line(prompt, interactive=interactive)) is not None:
        if line.strip():
            yield line.strip()


def _line(prompt: Callable[[], str], *, interactive: bool) -> str | None:
    """Return the next line, or ``None`` at the end of the input."""
    try:
        line = _typed(prompt()) if interactive else sys.stdin.readline()
        line.encode()  # fails if the locale let bytes through that are not UTF-8
    except UnicodeError as error:
        raise SettingsRefused("chat: the input is not UTF-8; convert it first, for example with iconv") from error
    except EOFError:
        OUT.print()
        return None
    except KeyboardInterrupt:
        if not interactive:
            raise
        note("\n/quit or Ctrl-D leaves")
        return "\n"
    return line or None


def _typed(prompt: str) -> str:
    if OUT.is_terminal:
        return input(prompt) + "\n"
    ERR.print(prompt, end="", markup=False)  # stdout is for replies
    return sys.stdin.readline()
