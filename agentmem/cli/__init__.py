"""The entry point of the command line, which prints how to install the extra ``cli`` if a package is missing."""

from __future__ import annotations

import sys

from agentmem import __version__

EXTRA = frozenset({"typer", "rich", "matplotlib", "gguf"})
"""Top-level modules that are installed only with the extra ``cli``."""


def main() -> int:
    """Run the command line; return its exit code (0 done, 1 refused input or missing extra, 2 wrong usage)."""
    if sys.argv[1:] == ["--version"]:  # torch and transformers, which the commands import, take seconds
        print(f"agentmem {__version__}")  # noqa: T201  # there is no console yet
        return 0
    try:
        from agentmem.cli import app  # this import fails if the extra is missing
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        print(  # noqa: T201 - there is no console to print with
            f"agentmem: the command line needs {error.name}, which is not installed. "
            "Install the extra: pip install 'agentmem-runtime[cli]'",
            file=sys.stderr,
        )
        return 1
    return app.main() or 0
