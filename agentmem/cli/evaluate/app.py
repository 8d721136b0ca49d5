"""``agentmem eval``: measure what a policy costs in fidelity and in recall."""

from __future__ import annotations

import typer

from agentmem.cli.evaluate.fidelity import fidelity
from agentmem.cli.evaluate.recall import recall

app = typer.Typer(help="Measure what a policy costs.", no_args_is_help=True)
app.command()(fidelity)
app.command()(recall)


@app.callback()
def group() -> None:
    """Measure what a policy costs."""
