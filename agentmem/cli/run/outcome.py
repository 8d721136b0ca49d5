"""The outcome of ``agentmem run``, as JSON with stable keys and as a small table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentmem.cli.console import table
from agentmem.settings import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.table import Table

    from agentmem.cli.run.generation import Generated
    from agentmem.errors import AgentmemError
    from agentmem.reporting.report import CompactionReport, RunReport
    from agentmem.reporting.trace import Trace


@dataclass(frozen=True)
class FullRun:
    """The comparison run with full memory.

    ``bytes`` is the size of the full KV cache at the end, in bytes. ``common`` is the number of new tokens before the
    first difference from the capped run.
    """

    generated: Generated
    bytes: int
    common: int


@dataclass
class Outcome:
    """A complete or incomplete capped run; ``error`` is the error that ended the run, if there was one."""

    generated: Generated
    report: RunReport
    trace: Trace
    num_prompt_tokens: int
    error: AgentmemError | None = None
    full: FullRun | None = None
    pictures: tuple[Path, ...] = ()

    @property
    def interrupted(self) -> bool:
        """True if Ctrl-C ended the run or the comparison run after it."""
        runs = [self.generated, *([self.full.generated] if self.full else [])]
        return any(run.finish == "interrupted" for run in runs)

    def as_json(self) -> dict[str, Any]:
        """Return the report of the memory as JSON data, with the text, times and token counts of this run added."""
        found: dict[str, Any] = self.report.model_dump(mode="json")
        found |= {
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_new_tokens": len(self.generated.ids),
            "text": self.generated.text,
            "seconds": self.generated.seconds,
            "tokens_per_second": self.generated.tokens_per_second,
            "finish": self.generated.finish,
            "error": None if self.error is None else str(self.error),
            "pictures": [str(path) for path in self.pictures],
        }
        if self.full is not None:
            found["full"] = {
                "bytes": self.full.bytes,
                "peak_ratio": self.report.peak_bytes / self.full.bytes,
                "num_new_tokens": len(self.full.generated.ids),
                "common_prefix_tokens": self.full.common,
                "seconds": self.full.generated.seconds,
                "tokens_per_second": self.full.generated.tokens_per_second,
                "finish": self.full.generated.finish,
                "text": self.full.generated.text,
            }
        return found

    def table(self, paths: Sequence[tuple[str, Path | str]]) -> Table:
        """Return a table of two columns for people to read; ``paths`` are the kinds and paths of the files written."""
        report, generated = self.report, self.generated
        share = report.peak_bytes / report.cap_bytes
        lines = [
            ("cap", f"{format_bytes(report.cap_bytes)} ({report.cap_bytes:,} bytes)"),
            ("peak, workspace included", f"{format_bytes(report.peak_bytes)} ({share:.1%} of the cap)"),
            ("compactions", f"{report.num_compactions} by {report.policy}, {report.capacity} slots per head when full"),
            ("tokens", f"{self.num_prompt_tokens} read, {len(generated.ids)} generated ({generated.finish})"),
            ("speed", f"{generated.tokens_per_second:.1f} tokens/s"),
            ("time", f"{generated.seconds:.1f} s, {report.seconds_compacting:.1f} s of it compacting"),
            ("held-out errors", _errors(report.compactions)),
            *self._full_lines(),
            *((name, str(path)) for name, path in paths),
        ]
        shown = table(None, ("", ""), lines, left=(0, 1))
        shown.show_header = False
        return shown

    def _full_lines(self) -> list[tuple[str, str]]:
        if self.full is None:
            return []
        generated, ratio = self.full.generated, self.report.peak_bytes / self.full.bytes
        return [
            ("full memory", f"{format_bytes(self.full.bytes)} of KV at the end; the capped peak is {ratio:.2f} of it"),
            ("", f"{len(generated.ids)} generated, {generated.tokens_per_second:.1f} tokens/s"),
            ("", f"the first {self.full.common} tokens are the same"),
        ]


def _errors(compactions: Sequence[CompactionReport]) -> str:
    def mean(measure: Callable[[CompactionReport], float | None]) -> str:
        found = [value for report in compactions if (value := measure(report)) is not None]
        return f"{sum(found) / len(found):.4f}" if found else "none measured"

    if not compactions:
        return "no compaction, nothing was lost"
    output, mass = mean(lambda report: report.output_error), mean(lambda report: report.log_mass_error)
    return f"output {output}, log-mass {mass} (mean over compactions)"
