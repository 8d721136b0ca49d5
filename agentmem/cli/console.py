"""Output of the command line: results go to stdout, everything else goes to stderr."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentmem.cli.printable import escaped, printable
from agentmem.errors import SettingsRefused

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Both consoles look up sys.stdout or sys.stderr at each use, so that a test or a live display may replace the stream.
OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False)
_UNLIMITED = 400
STDOUT = "-"
"""The value of a path option that stands for stdout instead of a file."""


def refuse(error: Exception) -> None:
    """Print an error as ``agentmem: …`` to stderr, without line wrapping, so that its text can be searched for."""
    ERR.print(printable(f"agentmem: {error}"), style="red" if ERR.is_terminal else None, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a remark to stderr."""
    ERR.print(printable(text), style="dim" if ERR.is_terminal else None, markup=False, soft_wrap=True)


def table(title: str | None, columns: Sequence[str], lines: Iterable[Sequence[str]], *, left: Sequence[int]) -> Table:
    """Make a table; the columns whose indices are in ``left`` are left-aligned, all others right-aligned."""
    # Title and heads are Text objects, so that rich does not parse their brackets (a policy with options) as markup.
    made = Table(
        title=None if title is None else Text(printable(title)),
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for index, column in enumerate(columns):
        made.add_column(Text(printable(column)), justify="left" if index in left else "right", overflow="fold")
    for line in lines:
        made.add_row(*(Text(printable(cell)) for cell in line))
    return made


def show(made: Table, *, on: Console = OUT) -> None:
    """Print a table; if the output is a pipe or a file, no column is narrowed to fit a terminal."""
    (on if on.is_terminal else Console(file=on.file, width=_UNLIMITED, highlight=False)).print(made)


def write_json(value: object, target: str, option: str) -> None:
    """Write ``value`` as JSON to the file ``target``, or to stdout if ``target`` is ``-``.

    An error names the command-line option ``option``.

    Raises:
        SettingsRefused: the file cannot be written.

    """
    text = escaped(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
    if target == STDOUT:
        OUT.file.write(text + "\n")
        OUT.file.flush()
        return
    path = Path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SettingsRefused(f"{option}: cannot write {target}: {error.strerror or error}") from error


def require_writable(path: Path, option: str) -> None:
    """Check before a long computation that its result can be written to ``path``.

    An error names the command-line option ``option``.

    Raises:
        SettingsRefused: the file cannot be written.

    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("a", encoding="utf-8").close()
        if not there:  # a later error must not leave an empty file
            path.unlink()
    except OSError as error:
        raise SettingsRefused(f"{option}: cannot write {path}: {error.strerror or error}") from error


def require_folder(path: Path, option: str) -> None:
    """Check that files can be written into the folder ``path``; create the folder if it is missing.

    An error names the command-line option ``option``.

    Raises:
        SettingsRefused: the folder cannot be created or written into.

    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise SettingsRefused(
            f"{option}: cannot write into {path}: {error.strerror or error}; give a folder, or leave {option} out"
        ) from error
