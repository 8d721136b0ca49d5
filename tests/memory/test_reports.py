"""A compaction that has finished has its report, wherever an interrupt comes."""

from __future__ import annotations

import pytest

from agentmem.memory.memory import Memory
from agentmem.reporting.report import SummaryReport
from support import tiny


def stop(*_: object) -> None:
    """Interrupt what calls it."""
    raise KeyboardInterrupt


def test_a_report_counts_once_though_it_was_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there at once, and the next operation records it: no report is lost and none is told twice."""
    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(30))
        with monkeypatch.context() as patch:
            patch.setattr(Memory, "record", stop)
            with pytest.raises(KeyboardInterrupt):
                memory.compact(slots=8)
        (report,) = memory.compactions
        row = memory.memory.sequences[0]
        assert (row.compactions, memory.report().num_compactions, row.job) == (1, 1, None)
        memory.memory.take_back()
        assert (memory.compactions, row.state.report) == ((report,), None)
        tiny.feed(memory, tiny.ids(12, seed=1))
        memory.compact(slots=8)
        assert [each.index for each in memory.compactions] == list(range(row.compactions))
        assert row.compactions >= 2


@pytest.mark.parametrize("recorded", [False, True])
def test_a_summary_that_nobody_was_told_of_is_told_of_by_the_next_report(recorded: bool) -> None:
    """The report that an interrupt kept back comes without it; one that was recorded keeps it."""
    summary = SummaryReport(text="so", tokens=2, start=4, stop=9, position=9, slots_before=30, slots_after=20)
    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(30))
        memory.compact(slots=8)
        inner, row = memory.memory, memory.memory.sequences[0]
        report = inner.compactions[-1].model_copy(update={"index": len(inner.compactions), "summary": summary})
        row.change(report=report)
        if recorded:
            inner.reports.compactions.append(report)
        count = len(inner.compactions)
        for _ in range(2):
            inner.take_back()
            assert (row.state.summary, row.state.report) == (None if recorded else summary, None)
            assert inner.compactions[-1].summary == (summary if recorded else None)
            assert len(inner.compactions) == count
