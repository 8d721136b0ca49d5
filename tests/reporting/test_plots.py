"""The pictures of a run: what they show, and that they leave matplotlib alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agentmem.errors import SettingsRefused
from agentmem.reporting import plots
from agentmem.reporting.report import CompactionReport, LayerReport
from agentmem.reporting.trace import Trace, UsagePoint

CAP = 24 * 2**20
SLOT = 46_440
PNG = b"\x89PNG\r\n\x1a\n"


def report(index: int, *, output_error: float | None) -> CompactionReport:
    """A compaction whose scratch peaks at 95 % of the cap."""
    layer = LayerReport(
        layer=0,
        slots_before=400,
        slots_after=200,
        output_error=output_error,
        log_mass_error=output_error,
        bias_min=0.0,
        bias_max=0.0,
        condition=1.0,
    )
    return CompactionReport(
        index=index,
        row=0,
        policy="am-halving",
        tokens_seen=400 + 200 * index,
        slots_before=400,
        slots_after=200,
        bytes_before=400 * SLOT,
        bytes_after=400 * SLOT,
        bytes_peak=int(CAP * 0.95),
        probe_tokens=0,
        seconds=0.1,
        seconds_by_stage={},
        layers=(layer,),
    )


def saw_tooth(compactions: int, *, output_error: float | None = 0.05) -> Trace:
    """A memory of 400 slots that is halved whenever it is full."""
    trace, held, seen = Trace(cap_bytes=CAP, policy="am-halving"), 0, 0
    while len(trace.compactions) < compactions or held < 400:
        held, seen = held + 1, seen + 1
        trace.points.append(UsagePoint(seen * 0.01, seen, held, 400 * SLOT, held * SLOT, int(CAP * 0.95)))
        if held == 400 and len(trace.compactions) < compactions:
            trace.compacted(report(len(trace.compactions), output_error=output_error))
            held = 200
    return trace


def test_full_memory_is_a_line_of_its_own() -> None:
    """It grows with every token and leaves the picture, so that the cap stays readable; unknown, it is left out."""
    trace = saw_tooth(3)
    (axes,) = plots.bytes_figure(trace).axes
    assert "full memory" not in [line.get_label() for line in axes.get_lines()]
    trace.full_bytes = lambda tokens: tokens * 3 * SLOT
    (axes,) = plots.bytes_figure(trace).axes
    (full,) = [line for line in axes.get_lines() if line.get_label() == "full memory"]
    points = trace.points

    assert [float(value) for value in full.get_ydata()] == [point.tokens_seen * 3 * SLOT / 2**20 for point in points]  # type: ignore[union-attr]  # an array
    assert axes.get_ylim()[1] == pytest.approx(1.12 * 1.5 * 24)


def test_both_pictures_are_written(tmp_path: Path) -> None:
    """A run with compactions gives two PNG files in a folder that is made."""
    paths = plots.draw(saw_tooth(3), tmp_path / "a" / "b")

    assert [path.name for path in paths] == ["bytes.png", "errors.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths)


@pytest.mark.parametrize(("compactions", "output_error"), [(0, 0.05), (2, None)])
def test_without_measured_errors_there_is_one_picture(
    tmp_path: Path, compactions: int, output_error: float | None
) -> None:
    """No compaction, or none that measured an error, gives the bytes alone."""
    paths = plots.draw(saw_tooth(compactions, output_error=output_error), tmp_path)

    assert [path.name for path in paths] == ["bytes.png"]


def test_the_bytes_are_drawn_to_scale_under_the_cap() -> None:
    """Lines: allocated, used, peaks of compactions, and the cap at its own height in the same unit."""
    trace = saw_tooth(3)
    (axes,) = plots.bytes_figure(trace).axes
    resident, used, peaks, cap = axes.get_lines()

    assert axes.get_ylabel() == "KV memory (MiB)"
    assert list(used.get_ydata()) == pytest.approx([point.used_bytes / 2**20 for point in trace.points])
    assert max(resident.get_ydata()) == pytest.approx(400 * SLOT / 2**20)
    assert list(peaks.get_xdata()) == [400, 600, 800]
    assert set(peaks.get_ydata()) == {int(CAP * 0.95) / 2**20}
    assert set(cap.get_ydata()) == {24.0}
    assert axes.get_ylim()[1] > 24


def test_small_memories_get_a_small_unit() -> None:
    """The unit follows the cap: a memory of a few KiB is not drawn as zeros."""
    trace = Trace(cap_bytes=4096, points=[UsagePoint(0.0, 1, 1, 2048, 1024, 2048)])
    (axes,) = plots.bytes_figure(trace).axes

    assert axes.get_ylabel() == "KV memory (KiB)"
    assert axes.get_title(loc="left") == "KV memory under a hard cap: 0 compactions"


def test_the_errors_are_drawn_once_per_compaction() -> None:
    """Both errors have one point per compaction, numbered from 1."""
    (axes,) = plots.error_figure(saw_tooth(3)).axes
    output, mass = axes.get_lines()

    assert list(output.get_xdata()) == list(mass.get_xdata()) == [1, 2, 3]
    assert list(output.get_ydata()) == pytest.approx([0.05] * 3)


@pytest.mark.parametrize("output_error", [0.05, 0.0])
def test_no_marker_touches_the_frame(output_error: float) -> None:
    """The highest error has room above it; the scale begins at 0, also where nothing was lost."""
    (axes,) = plots.error_figure(saw_tooth(3, output_error=output_error)).axes
    bottom, top = axes.get_ylim()

    assert bottom == 0
    assert top >= 1.1 * output_error
    assert top > 0


def test_nothing_global_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing never imports pyplot, which would choose a backend for the whole process."""
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)

    plots.draw(saw_tooth(1), tmp_path)

    assert "matplotlib.pyplot" not in sys.modules


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    """An empty trace, and a folder that is a file, are refused by message."""
    (tmp_path / "file").write_text("", encoding="utf-8")

    with pytest.raises(SettingsRefused, match="nothing to draw"):
        plots.draw(Trace(cap_bytes=CAP), tmp_path)
    with pytest.raises(SettingsRefused, match="cannot write into"):
        plots.draw(saw_tooth(1), tmp_path / "file")
