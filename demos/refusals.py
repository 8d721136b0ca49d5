"""How a demo ends that agentmem refuses something: with the message alone, as at the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from agentmem.errors import AgentmemError


def run(main: Callable[[], None]) -> None:
    """Run a demo; a refusal's message goes to stderr, and the exit code is 1."""
    try:
        main()
    except AgentmemError as error:
        sys.exit(f"agentmem: {error}")
