"""How a demo ends that agentmem refuses something: with the message alone, as at the command line.

And the ``type=`` functions of its options, so that what cannot work is refused before anything is loaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

from agentmem.errors import AgentmemError

Read = TypeVar("Read")


def run(main: Callable[[], None]) -> None:
    """Run a demo; a refusal's message goes to stderr, and the exit code is 1."""
    try:
        main()
    except AgentmemError as error:
        sys.exit(f"agentmem: {error}")


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
