"""``agentmem model``: fetch the default model, or print its folder."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from agentmem import models
from agentmem.cli.console import ERR, OUT, note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

app = typer.Typer(help="The default model.", no_args_is_help=True)


@app.command()
def fetch(*, licence: Annotated[bool, typer.Option(help="Print the licence text in full.")] = False) -> None:
    """Fetch, verify and convert the default model, unless that was done before; print its folder."""
    there = models.is_fetched()
    with _stages() as progress:
        folder = models.fetch_default(progress=progress)
    text = models.default_licence()
    first = next(line.strip() for line in text.splitlines() if line.strip())
    state = "was already there" if there else "is ready"
    note(f"{models.DEFAULT.name} {state}; licence: {first} ({folder / 'LICENSE'})")
    if licence:
        note(text)
    OUT.print(str(folder), markup=False)


@app.command()
def path() -> None:
    """Print the folder of the default model; exit code 1 if it was not fetched."""
    models.default_licence()  # raises an error with the remedy if the model was not fetched
    OUT.print(str(models.default_folder()), markup=False)


@contextmanager
def _stages() -> Iterator[Callable[[str, float], None]]:
    """Yield a function that shows progress: on a terminal as one bar per stage, else as one line per stage."""
    columns = (TextColumn("{task.description:9}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    seen: dict[str, object] = {}
    with Progress(*columns, console=ERR, disable=not ERR.is_terminal) as bars:

        def tell(stage: str, fraction: float) -> None:
            if stage not in seen:
                seen[stage] = bars.add_task(stage, total=1.0)
                if not ERR.is_terminal:
                    note(stage)
            bars.update(seen[stage], completed=fraction)  # type: ignore[arg-type]  # add_task's own id

        yield tell
