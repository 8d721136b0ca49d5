"""The command line; where its packages are missing it says what to install."""

from __future__ import annotations

import sys

EXTRA = frozenset({"typer", "rich", "matplotlib", "gguf"})
"""Top-level modules that only the extra ``cli`` installs."""


def main() -> int:
    """Run the command line; return its exit code (0 done, 1 refused input or a missing extra, 2 usage)."""
    try:
        from agentmem.cli import app  # the import is what may fail
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
