"""Record a run as JSON lines, one line per event.

Each event is written when it happens, so the file of a killed run can be read; at most its last line is cut off.

Every line has a ``kind`` and ``t``, the seconds since the start. There are three kinds: ``start`` has the cap and the
policy and is written once; ``usage`` is written after every forward; ``compaction`` has the fields of a
:class:`~agentmem.reporting.report.CompactionReport`.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from agentmem.errors import SettingsRefused
from agentmem.reporting.report import CompactionReport, RebaseReport
from agentmem.untrusted.files import read_plain
from agentmem.untrusted.json_text import parsed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class UsageLike(Protocol):
    """Values that a memory reports after every forward; slots and bytes are sums over rows."""

    @property
    def tokens_seen(self) -> int: ...  # noqa: D102  # the fields of a Usage, described there
    @property
    def total_slots(self) -> int: ...  # noqa: D102
    @property
    def resident_bytes(self) -> int: ...  # noqa: D102
    @property
    def used_bytes(self) -> int: ...  # noqa: D102
    @property
    def peak_bytes(self) -> int: ...  # noqa: D102


_MAX_BYTES, _MAX_LINE = 1 << 30, 8 << 20
_USAGE_FIELDS = ("tokens_seen", "total_slots", "resident_bytes", "used_bytes", "peak_bytes")


@dataclass(frozen=True, slots=True)
class UsagePoint:
    """State of a memory after one forward; ``t`` is in seconds since the start."""

    t: float
    tokens_seen: int
    total_slots: int
    resident_bytes: int
    used_bytes: int
    peak_bytes: int


@dataclass
class Trace:
    """Hold the events of one run in order.

    Record a memory's events with ``memory.subscribe(trace)``, or read a recorded trace with :func:`read_trace`.
    """

    cap_bytes: int | None = None
    policy: str | None = None
    full_bytes: Callable[[int], int] | None = None
    """The bytes that a cache without a cap would hold after so many tokens; ``None`` if that is not known."""
    points: list[UsagePoint] = field(default_factory=list)
    compactions: list[CompactionReport] = field(default_factory=list)
    compacted_at: list[int] = field(default_factory=list)
    """Tokens that all rows together had seen at each compaction; a report counts the tokens of its own row only."""
    _started: float = field(default_factory=time.perf_counter, repr=False)

    def __call__(self, event: CompactionReport | RebaseReport | UsageLike) -> None:
        """Record one event; re-basings are ignored."""
        if isinstance(event, CompactionReport):
            self.compacted(event)
        elif not isinstance(event, RebaseReport):
            elapsed = time.perf_counter() - self._started
            self.points.append(UsagePoint(elapsed, *(int(getattr(event, name)) for name in _USAGE_FIELDS)))

    def compacted(self, report: CompactionReport) -> None:
        """Record one compaction, and the number of tokens that all rows together had seen after the last forward."""
        self.compactions.append(report)
        self.compacted_at.append(self.points[-1].tokens_seen if self.points else report.tokens_seen)


class TraceWriter:
    """Write a memory's events to the file ``path``, each when it happens; an existing file is overwritten.

    Record the events with ``memory.subscribe(writer)``.

    Raises:
        SettingsRefused: the file cannot be written.

    """

    def __init__(self, path: Path, *, cap_bytes: int, policy: str) -> None:
        """Open the file and write the ``start`` line."""
        self.path = path
        self._started = time.perf_counter()
        with ExitStack() as undo:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                # Line-buffered: unless the machine itself stops, the file always ends with a whole line.
                self._file: TextIO = undo.enter_context(path.open("w", encoding="utf-8", buffering=1))
            except OSError as error:
                raise SettingsRefused(f"trace: cannot write {path}: {error.strerror or error}") from error
            self._line("start", {"cap_bytes": cap_bytes, "policy": policy})
            self._close = undo.pop_all().close

    def __call__(self, event: CompactionReport | RebaseReport | UsageLike) -> None:
        """Write one event; re-basings are not written."""
        if isinstance(event, CompactionReport):
            self._line("compaction", event.model_dump(mode="json"))
        elif not isinstance(event, RebaseReport):
            self._line("usage", {name: int(getattr(event, name)) for name in _USAGE_FIELDS})

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        self._close()

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def _line(self, kind: str, fields: dict[str, object]) -> None:
        elapsed = round(time.perf_counter() - self._started, 6)
        try:
            self._file.write(json.dumps({"kind": kind, "t": elapsed, **fields}) + "\n")
        except OSError as error:
            raise SettingsRefused(f"trace: cannot write {self.path}: {error.strerror or error}") from error


def read_trace(path: Path) -> Trace:
    """Read the events of a trace file; a last line that was cut off is ignored.

    Raises:
        SettingsRefused: the file cannot be read, or a complete line is no trace event.

    """
    try:
        lines = read_plain(path, _MAX_BYTES).decode("utf-8", "replace").splitlines(keepends=True)
    except OSError as error:
        raise SettingsRefused(f"trace: cannot read {path}: {error.strerror or error}") from error
    trace = Trace()
    for number, line in enumerate(lines, start=1):
        try:
            _add(trace, parsed(line.encode(), _MAX_LINE, strict=False))
        except (ValueError, KeyError):
            if number == len(lines) and not line.endswith("\n"):
                break
            raise SettingsRefused(
                f"trace: line {number} of {path} is no trace event: {line[:200].strip()[:60]!r}"
            ) from None
    return trace


def _add(trace: Trace, event: dict[str, object]) -> None:
    kind, elapsed = event.pop("kind"), event.pop("t")
    if kind == "start":
        trace.cap_bytes, trace.policy = int(str(event["cap_bytes"])), str(event["policy"])
    elif kind == "usage":
        trace.points.append(UsagePoint(float(str(elapsed)), *(int(str(event[name])) for name in _USAGE_FIELDS)))
    elif kind == "compaction":
        trace.compacted(CompactionReport.model_validate(event))
    else:
        raise ValueError(kind)
