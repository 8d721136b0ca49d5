"""The reports of a memory's compactions and re-basings, which are complete wherever an interrupt comes.

A compaction or re-basing finishes in one assignment, which also stores its report in the state of its sequence. From
then on the report counts. It is moved to the lists here afterwards; after an interrupt, the next operation does that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from agentmem.reporting.report import CompactionReport, RebaseReport

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from agentmem.memory.sequence import TokenSequence

WHOLE_REPORTS = 128
"""How many of the newest compaction reports keep their figures for each layer; older reports lose these figures."""

_R = TypeVar("_R", bound=CompactionReport | RebaseReport)


@dataclass(slots=True)
class Reports:
    """The reports that a memory has recorded, in order; those in the states of sequences come after them."""

    compactions: list[CompactionReport] = field(default_factory=list)
    rebases: list[RebaseReport] = field(default_factory=list)

    def all_compactions(self, sequences: Iterable[TokenSequence]) -> list[CompactionReport]:
        """Return the reports of all finished compactions, those that are not recorded yet included."""
        return _with_newest(self.compactions, sequences, CompactionReport)

    def all_rebases(self, sequences: Iterable[TokenSequence]) -> list[RebaseReport]:
        """Return the reports of all finished re-basings, those that are not recorded yet included."""
        return _with_newest(self.rebases, sequences, RebaseReport)

    def record(self, sequence: TokenSequence, report: CompactionReport | RebaseReport) -> None:
        """Add the report of a sequence and take it out of the sequence's state; an interrupted call can be repeated."""
        if isinstance(report, RebaseReport):
            _add(self.rebases, report)
        else:
            if len(self.compactions) >= WHOLE_REPORTS:
                self.compactions[-WHOLE_REPORTS] = self.compactions[-WHOLE_REPORTS].brief()
            _add(self.compactions, report)
        sequence.change(report=None)

    def recover(self, sequence: TokenSequence) -> None:
        """Record the report that an interrupt left in a sequence's state, if there is one.

        Nobody has seen the report. A summary that it tells of is told of once more by the next compaction's report.
        """
        report = sequence.state.report
        if report is None:
            return
        summary = report.summary if isinstance(report, CompactionReport) else None
        if summary is not None and not _is_last(report, self.compactions):
            report = report.model_copy(update={"summary": None})
            sequence.change(report=report, summary=summary)
        self.record(sequence, report)


def _is_last(report: object, recorded: Sequence[object]) -> bool:
    return bool(recorded) and recorded[-1] is report


def _add(recorded: list[_R], report: _R) -> None:
    if not _is_last(report, recorded):
        recorded.append(report)


def _with_newest(recorded: list[_R], sequences: Iterable[TokenSequence], kind: type[_R]) -> list[_R]:
    waiting = [each.state.report for each in sequences]
    new: list[_R] = [report for report in waiting if isinstance(report, kind) and not _is_last(report, recorded)]
    return recorded + new if new else recorded
