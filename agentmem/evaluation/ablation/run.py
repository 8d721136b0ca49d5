"""Measure every cell of an ablation, in one process or several; an interrupted run can be resumed.

A cell is one combination of the grid's settings, measured by one instrument. Its result is called a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch

from agentmem.calibration import Team
from agentmem.errors import AgentmemError
from agentmem.evaluation.ablation.bench import Bench
from agentmem.evaluation.ablation.config import Ablation, Text
from agentmem.evaluation.ablation.grid import Cell, cells
from agentmem.evaluation.ablation.rows import Row, RowFile, read_rows
from agentmem.evaluation.passage import default_text, read_text

Progress = Callable[[int, int, str], None]
"""Callback that receives the number of cells done, the total number of cells, and the label of the next cell."""


def run(
    ablation: Ablation,
    folder: Path,
    out: Path,
    *,
    cache_dir: Path,
    again: bool = False,
    progress: Progress = lambda _done, _all, _next: None,
) -> tuple[Row, ...]:
    """Measure the cells that have no row in the folder ``out`` yet; return the rows of all cells, in grid order.

    Relative paths of texts and models start from ``folder``. Logits of full memory are kept in ``cache_dir``. Several
    processes of ``accelerate launch`` share the cells. If a cell cannot be measured, its row has the reason instead of
    a result; with ``again``, the cells of such rows are tried again.

    Raises:
        SettingsRefused: a text cannot be read, or another run writes into ``out``.
        ModelUnavailable: a model cannot be loaded.
        AgentmemError: a row cannot be written; rows that were written before stay on disk.

    """
    team, keys = Team.joined(), list[str]()
    total, turn = len(cells(ablation)), 0
    _make(out)
    if ablation.threads is not None:
        torch.set_num_threads(ablation.threads)
    with RowFile(out, team.rank) as file:
        known = {key for key, row in read_rows(out).items() if not (again and row.refused)}
        team.wait()  # every process has read the same rows before one of them writes
        for bench, cell in _benches(ablation, folder, cache_dir, out):
            keys.append(bench.key(cell))
            if keys[-1] in known:
                continue
            if turn % team.size == team.rank:
                progress(len(keys) - 1, total, cell.label)
                file.append(bench.row(cell))
            turn += 1
        progress(total, total, "")
        team.wait()
    found = read_rows(out)
    return tuple(found[key] for key in keys)


def finished(ablation: Ablation, folder: Path, out: Path, *, cache_dir: Path) -> tuple[Row, ...]:
    """Return the rows (results) that are in ``out`` already, in the order of the grid; nothing is measured.

    Raises:
        AgentmemError: see :func:`run`.

    """
    found = read_rows(out)
    keys = (bench.key(cell) for bench, cell in _benches(ablation, folder, cache_dir, out))
    return tuple(found[key] for key in keys if key in found)


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AgentmemError(f"ablation: cannot make {out}: {error.strerror or error}; choose another --out") from error


def _benches(ablation: Ablation, folder: Path, cache_dir: Path, out: Path) -> Iterator[tuple[Bench, Cell]]:
    """Yield every cell with the bench that measures it; each model is loaded when its first cell is reached."""
    texts = {text: _words(text, folder) for text in ablation.texts}
    for name, group in groupby(cells(ablation), key=lambda cell: cell.model):
        bench = Bench.open(ablation, name, texts, folder, cache_dir, out)
        for cell in group:
            yield bench, cell


def _words(text: Text, folder: Path) -> str:
    return default_text() if text.path is None else read_text(folder / text.path.expanduser())
