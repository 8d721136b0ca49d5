"""How a demo runs: what it prints cannot steer a terminal, and a refusal ends it with the message alone.

And the ``type=`` functions of its options, so that what cannot work is refused before anything is loaded.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import TextIO, TypeVar

from agentmem.cli.printable import printable
from agentmem.errors import AgentmemError

Read = TypeVar("Read")


def run(main: Callable[[], None]) -> None:
    """Run a demo; a refusal's message goes to stderr, and the exit code is 1.

    Demos print what a model wrote and what its code printed, so control characters are made visible.
    """
    try:
        with redirect_stdout(_Visible(sys.stdout)):
            main()
    except AgentmemError as error:
        sys.exit(printable(f"agentmem: {error}"))


class _Visible(io.TextIOBase):
    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> int:
        self._out.write(printable(text))
        return len(text)

    def flush(self) -> None:
        self._out.flush()


def count(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not (number := count(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is too few; give at least 1")
    return number


def file_for(read: Callable[[str], Read]) -> Callable[[str], Read]:
    """What ``read`` makes of a file, which may raise OSError and ValueError."""

    def found(path: str) -> Read:
        try:
            return read(path)
        except OSError as error:
            raise argparse.ArgumentTypeError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return found
