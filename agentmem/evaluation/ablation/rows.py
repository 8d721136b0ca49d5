"""Keep the results of an ablation's cells on disk, one JSON line per finished cell.

The result of one cell is called a *row*. Each row is written and synchronised to disk before the next cell is measured.
Every process appends to a file of its own (``rows-0.jsonl``, ``rows-1.jsonl`` and so on) and reads the files of all
processes. If a process is killed while it writes, the incomplete last line is dropped and its cell is measured again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

from filelock import FileLock, Timeout
from pydantic import ValidationError

from agentmem.errors import AgentmemError, SettingsRefused
from agentmem.evaluation.ablation.grid import Cell
from agentmem.evaluation.fidelity import Measurement
from agentmem.evaluation.recall import Recalled
from agentmem.evaluation.tasks.attempt import Attempt
from agentmem.evaluation.terms import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

Run = Measurement | Recalled | Attempt


class Provenance(Frozen):
    """The software versions, model, text and device with which a cell was measured."""

    agentmem: str
    torch: str
    transformers: str
    python: str
    commit: str | None
    """Git commit of agentmem, followed by ``+`` if files were changed since; ``None`` if it is not known."""
    model_sha256: str
    """Digest of configuration and weights; see :func:`agentmem.evaluation.full_logits.model_digest`."""
    text_sha256: str | None
    """SHA-256 of the text; ``None`` for tasks."""
    device: str
    dtype: str
    threads: int


class Row(Frozen):
    """The result of one finished cell: its measurements, or the reason why the cell could not be measured."""

    key: str
    """Digest of everything that the result depends on, including agentmem's own code."""
    cell: Cell
    provenance: Provenance
    refused: str | None = None
    """Message of the error that prevented the measurement; ``None`` if the cell was measured."""
    runs: tuple[Run, ...] = ()
    """Measurements of the cell: one for fidelity, one per document for recall, one per sample and epoch for a task."""
    memories: int = 0
    """Number of memories that were opened; questions about a shared context use one memory together."""
    peak_bytes: int = 0
    """Greatest peak of any run: resident and temporary bytes together."""
    compactions: int = 0
    """Number of compactions; like the fields below, a sum over the runs."""
    seconds: float = 0.0
    compact_seconds: float = 0.0
    tokens: int = 0
    """Tokens read and generated."""

    @classmethod
    def measured(cls, key: str, cell: Cell, provenance: Provenance, runs: Iterable[Run]) -> Self:
        """Make the row of a cell from the cell's measurements ``runs``.

        Compactions, seconds and tokens of the measurements are added up; ``peak_bytes`` is the greatest peak.
        """
        runs = tuple(runs)
        return cls(
            key=key,
            cell=cell,
            provenance=provenance,
            runs=runs,
            memories=sum(_fresh(run) for run in runs),
            peak_bytes=max(run.bytes for run in runs),
            compactions=sum(_compactions(run) for run in runs if _fresh(run)),
            seconds=sum(run.seconds for run in runs),
            compact_seconds=sum(run.compact_seconds for run in runs),
            tokens=sum(_tokens(run) for run in runs),
        )


def _fresh(run: Run) -> bool:
    return not isinstance(run, Attempt) or run.fresh


def _compactions(run: Run) -> int:
    return run.compactions if isinstance(run, Attempt) else len(run.compacted)


def _tokens(run: Run) -> int:
    if isinstance(run, Attempt):
        return run.tokens_read + run.tokens_generated
    return run.moments[-1].tokens if run.moments else 0


def read_rows(folder: Path) -> dict[str, Row]:
    """Return all rows in ``folder``, by key; lines that this version of agentmem cannot read are ignored."""
    found: dict[str, Row] = {}
    for path in sorted(folder.glob("rows-*.jsonl")):
        for row in _rows(path):
            found[row.key] = row
    return found


def _rows(path: Path) -> Iterator[Row]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AgentmemError(f"ablation: cannot read {path}: {error.strerror or error}; choose another --out") from error
    for line in content.split(b"\n")[:-1]:  # text after the last newline is an incomplete row
        try:
            yield Row.model_validate_json(line)
        except ValidationError:
            continue


class RowFile:
    """The file to which one process, with the number ``rank``, appends its rows.

    Use the object as a context manager. Entering the context locks the file against other processes and raises the
    errors below.

    Raises:
        SettingsRefused: another process has the file open.
        AgentmemError: the file cannot be written.

    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rows-{rank}.jsonl"
        self._lock = FileLock(folder / f"rows-{rank}.lock", timeout=0)

    def __enter__(self) -> Self:
        try:
            self._lock.acquire()
        except Timeout:
            raise SettingsRefused(
                f"--out: another process is writing {self.path}; wait for it, or choose another folder"
            ) from None
        try:
            self._file = self.path.open("ab")
            self._drop_half_a_line()
        except OSError as error:
            self._lock.release()
            raise self._unwritable(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.release()

    def append(self, row: Row) -> None:
        """Write one row; the row is synchronised to disk when the method returns.

        Raises:
            AgentmemError: the file cannot be written.

        """
        try:
            self._file.write(row.model_dump_json().encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _drop_half_a_line(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
            os.fsync(self._file.fileno())

    def _unwritable(self, error: OSError) -> AgentmemError:
        return AgentmemError(
            f"ablation: cannot write {self.path}: {error.strerror or error}; free some space or choose another --out, "
            "and start the same command again: finished rows are kept"
        )
