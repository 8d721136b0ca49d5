"""``agentmem policies``: list the installed policies."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from agentmem.cli.console import STDOUT, refuse, show, table, write_json
from agentmem.errors import SettingsRefused
from agentmem.plugins import catalogue


def policies(
    *, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False
) -> None:
    """List the installed policies."""
    found = catalogue()
    if as_json:
        write_json([asdict(row) for row in found], STDOUT, "--json")
        return
    lines = [(row.name, row.summary, row.source, row.distribution) for row in found if row.error is None]
    show(table(None, ("name", "what it does", "source", "from"), lines, left=(0, 1, 2, 3)))
    for row in found:
        if row.error is not None:
            refuse(SettingsRefused(row.error))
