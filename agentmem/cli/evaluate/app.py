"""``agentmem eval``: measure what a policy costs in fidelity and in recall."""

from __future__ import annotations

import typer

from agentmem.cli.console import OUT
from agentmem.cli.evaluate.fidelity import fidelity
from agentmem.cli.evaluate.options import CacheDir, kept_in
from agentmem.cli.evaluate.recall import recall
from agentmem.evaluation import full_logits
from agentmem.settings import format_bytes

app = typer.Typer(help="Measure what a policy costs.", no_args_is_help=True)
app.command()(fidelity)
app.command()(recall)


@app.command()
def clean(*, cache_dir: CacheDir = None) -> None:
    """Delete the logits of full memory that were kept; finished rows stay, and print how many bytes were freed."""
    folder = kept_in(cache_dir, "fidelity")
    freed = full_logits.clean(folder)
    OUT.print(f"{format_bytes(freed)} of logits deleted in {folder}", markup=False)


@app.callback()
def group() -> None:
    """Measure what a policy costs."""
