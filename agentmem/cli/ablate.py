"""``agentmem ablate``: measure a grid of policies, caps and settings from one file; write one table and one report."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agentmem.calibration import Team
from agentmem.cli.console import ERR, note, require_folder, show, table
from agentmem.cli.evaluate.options import CacheDir, kept_in
from agentmem.errors import SettingsRefused
from agentmem.models.files import write_whole

if TYPE_CHECKING:
    from agentmem.evaluation.ablation import Ablation, Row

_EXTRA = ("inspect_ai", "math_verify", "matplotlib", "scipy", "yaml")


def ablate(
    *,
    config: Annotated[Path, typer.Argument(help="The grid, as YAML; see docs/guide/7-ablations.md.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of rows and report: out/CONFIG's name.", show_default=False)
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Try cells again that were refused.")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Measure nothing; draw the report of what is there.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="List the cells and leave.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Measure every combination of policies, caps and settings, and write a table, CSV and one HTML report.

    A stopped ablation goes on where it was. The processes of `accelerate launch` share the cells.
    """
    _require_extra()
    from agentmem.evaluation import ablation

    asked, folder = ablation.read_config(config), config.resolve().parent
    if dry:
        _list(ablation.cells(asked))
        return
    target = out or Path("out") / config.stem
    require_folder(target, "--out")
    logits = kept_in(cache_dir, "fidelity")
    if draw:
        _deliver(asked, ablation.finished(asked, folder, target, cache_dir=logits), config, target)
        return
    try:
        with _progress() as progress:
            rows = ablation.run(asked, folder, target, cache_dir=logits, again=again, progress=progress)
    except KeyboardInterrupt:
        note(f"stopped: finished rows are in {target}; the same command goes on there, --draw shows them")
        raise
    if Team.joined().rank == 0:
        _deliver(asked, rows, config, target)


def _require_extra() -> None:
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsRefused(
            f"agentmem ablate needs {', '.join(missing)}, not installed. "
            "Install the extra: pip install 'agentmem-runtime[cli,eval]'"
        )


def _list(cells: Sequence[object]) -> None:
    for cell in cells:
        typer.echo(getattr(cell, "label"))  # noqa: B009  # imported for types alone
    typer.echo(f"{len(cells)} cells")


def _deliver(asked: Ablation, rows: Sequence[Row], config: Path, out: Path) -> None:
    from agentmem.evaluation.ablation import report, tables
    from agentmem.evaluation.ablation.lines import lines

    if not rows:
        raise SettingsRefused(f"--draw: {out} holds no finished row of this grid; leave --draw out to measure")
    pooled = lines(asked, rows)
    for found in tables.tables(asked, pooled):
        show(table(found.title, found.columns, found.lines, left=range(found.texts)))
    command = shlex.join(["agentmem", "ablate", config.name])
    files = {
        "rows.csv": tables.as_csv(rows),
        "report.md": tables.as_markdown(asked, pooled),
        "report.html": report.as_html(asked, rows, pooled, source=config.read_text(encoding="utf-8"), command=command),
    }
    for name, text in files.items():
        write_whole(out / name, text, what="ablation", remedy="choose another place with --out")
        note(f"wrote {out / name}")
    for reason in tables.refusals(pooled):
        note(f"refused: {reason}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function that shows progress: as a bar on a terminal, else as one line per cell."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERR, disable=not ERR.is_terminal, transient=True) as bars:
        task = bars.add_task("ablation", total=None)

        def tell(done: int, cells: int, label: str) -> None:
            bars.update(task, completed=done, total=cells, description=label)
            if label and not ERR.is_terminal:
                note(f"{done + 1}/{cells} {label}")

        yield tell
