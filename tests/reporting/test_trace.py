"""The trace of a run: what is written is what is read, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from agentmem.errors import SettingsRefused
from agentmem.reporting.report import CompactionReport, LayerReport, SpanError
from agentmem.reporting.trace import Trace, TraceWriter, read_trace
from support import forked


class Usage(NamedTuple):
    """The fields of the memory's own usage."""

    tokens_seen: int
    total_slots: int
    resident_bytes: int
    used_bytes: int
    peak_bytes: int


def compaction(index: int = 0, *, output_error: float | None = 0.07, tokens_seen: int = 64) -> CompactionReport:
    """A report of one layer."""
    layer = LayerReport(
        layer=0,
        slots_before=64,
        slots_after=32,
        output_error=output_error,
        log_mass_error=None if output_error is None else output_error / 2,
        bias_min=-0.5,
        bias_max=1.5,
        condition=12.0,
        fallbacks=("ridge raised",),
    )
    return CompactionReport(
        index=index,
        row=0,
        policy="am-halving",
        tokens_seen=tokens_seen,
        slots_before=64,
        slots_after=32,
        bytes_before=4096,
        bytes_after=4096,
        bytes_peak=6000,
        queries="replay+spread",
        outside_cap=True,
        probe_tokens=16,
        seconds=0.1,
        seconds_by_stage={"fit": 0.1},
        layers=(layer,),
        worst_spans=(SpanError(start=3, stop=9, output_error=0.2, log_mass_error=0.1),),
    )


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    """A trace file gives back its start, its usages and its compaction reports, field by field and in order."""
    path = tmp_path / "new folder" / "run.jsonl"
    with TraceWriter(path, cap_bytes=8192, policy="am-halving") as writer:
        writer(Usage(64, 128, 4096, 2048, 4100))
        writer(compaction())
        writer(Usage(65, 66, 4096, 1056, 6000))

    trace = read_trace(path)

    assert (trace.cap_bytes, trace.policy) == (8192, "am-halving")
    assert [point.tokens_seen for point in trace.points] == [64, 65]
    assert [point.used_bytes for point in trace.points] == [2048, 1056]
    assert [point.peak_bytes for point in trace.points] == [4100, 6000]
    assert trace.compactions == [compaction()]
    assert trace.compacted_at == [64]


def test_every_line_has_kind_and_time(tmp_path: Path) -> None:
    """Each line is one JSON object with ``kind`` and a ``t`` that never falls."""
    path = tmp_path / "run.jsonl"
    with TraceWriter(path, cap_bytes=8192, policy="window") as writer:
        for tokens in range(1, 6):
            writer(Usage(tokens, tokens, 4096, tokens * 32, 4096))

    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    assert [event["kind"] for event in events] == ["start", *["usage"] * 5]
    assert sorted(event["t"] for event in events) == [event["t"] for event in events]


def test_a_recorder_and_a_file_hold_the_same(tmp_path: Path) -> None:
    """A Trace that was subscribed itself equals the one read from the file, times aside."""
    recorded = Trace(cap_bytes=8192, policy="am-halving")
    with TraceWriter(tmp_path / "run.jsonl", cap_bytes=8192, policy="am-halving") as writer:
        for event in (Usage(64, 128, 4096, 2048, 4100), compaction(), Usage(65, 66, 4096, 1056, 6000)):
            writer(event)
            recorded(event)

    found = read_trace(tmp_path / "run.jsonl")

    assert found.compactions == recorded.compactions
    assert found.compacted_at == recorded.compacted_at
    assert [point.total_slots for point in found.points] == [point.total_slots for point in recorded.points]


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    """Cutting the file at any byte loses only the line that was cut, and never raises."""
    path = tmp_path / "run.jsonl"
    with TraceWriter(path, cap_bytes=8192, policy="window") as writer:
        writer(Usage(1, 1, 4096, 32, 4096))
        writer(Usage(2, 2, 4096, 64, 4096))
    whole = path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]

    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert len(read_trace(path).points) <= sum(end <= cut for end in ends)
    path.write_bytes(whole[: ends[1] + 10])
    assert len(read_trace(path).points) == 1


def test_a_broken_line_elsewhere_is_refused(tmp_path: Path) -> None:
    """A line that is no event is refused with its number, unless a kill can explain it."""
    path = tmp_path / "run.jsonl"
    path.write_text('{"kind": "usage", "t": 0.0}\n{"kind": "start", "t": 0, "cap_bytes": 1, "policy": "x"}\n')

    with pytest.raises(SettingsRefused, match="line 1"):
        read_trace(path)


def test_unreadable_and_unwritable_files_are_refused(tmp_path: Path) -> None:
    """A missing trace, and a trace where a folder is, are refused by name."""
    with pytest.raises(SettingsRefused, match=r"missing\.jsonl"):
        read_trace(tmp_path / "missing.jsonl")
    with pytest.raises(SettingsRefused, match="cannot write"):
        TraceWriter(tmp_path, cap_bytes=1, policy="window")


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_run_leaves_a_valid_trace(tmp_path: Path) -> None:
    """After SIGKILL in mid-run the file holds every event that was written, without being closed."""
    path = tmp_path / "run.jsonl"
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from agentmem.reporting.trace import TraceWriter\n"
        "writer = TraceWriter(Path(sys.argv[1]), cap_bytes=8192, policy='window')\n"
        "for n in range(1, 51):\n"
        "    writer(SimpleNamespace(tokens_seen=n, total_slots=n, resident_bytes=9, used_bytes=n, peak_bytes=9))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = forked.run([sys.executable, "-c", script, str(path)])

    assert ended.returncode == -signal.SIGKILL
    assert [point.tokens_seen for point in read_trace(path).points] == list(range(1, 51))
