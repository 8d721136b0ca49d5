"""Draw two plots of a run: bytes against tokens with the cap as a line, and held-out errors per compaction.

Only Matplotlib's object interface is used. It changes no global state, so a caller's own figures are not affected.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from agentmem.errors import SettingsRefused
from agentmem.settings import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from agentmem.reporting.trace import Trace

_DPI = 150
_FULL = 1.5
"""Most of the picture's height that full memory may add, as a multiple of what is highest without it."""
_BLUE, _PALE, _RED, _ORANGE, _GREEN, _INK = "#1f5fa8", "#a9c8ea", "#c0392b", "#e08a1e", "#2f7d4f", "#333333"
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def draw(trace: Trace, folder: Path) -> tuple[Path, ...]:
    """Write the plots of ``trace`` as PNG files and return their paths.

    ``folder`` is created if it does not exist. The error plot is left out if no compaction has a held-out error.

    Raises:
        SettingsRefused: the folder cannot be written, or the trace has no point to draw.

    """
    if not trace.points:
        raise SettingsRefused("plot: the trace holds no forward, so there is nothing to draw; generate a token first")
    pictures = [(bytes_figure(trace), folder / "bytes.png")]
    if any(report.output_error is not None for report in trace.compactions):
        pictures.append((error_figure(trace), folder / "errors.png"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure, path in pictures:
            figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise SettingsRefused(f"plot: cannot write into {folder}: {error.strerror or error}") from error
    return tuple(path for _, path in pictures)


def bytes_figure(trace: Trace) -> Figure:
    """Plot used bytes, allocated bytes and each compaction's peak against tokens seen.

    The cap is a dashed line, and full memory a dotted one, which may leave the picture at its top.
    """
    figure, axes = _axes()
    highest = max([trace.cap_bytes or 0, *(point.peak_bytes for point in trace.points)])
    size, unit = next((size, unit) for size, unit in _UNITS if highest >= size or size == 1)
    tokens = [point.tokens_seen for point in trace.points]
    resident = [point.resident_bytes / size for point in trace.points]
    axes.plot(tokens, resident, color=_PALE, linewidth=2.2, label="allocated for slots (R)")
    axes.fill_between(tokens, [point.used_bytes / size for point in trace.points], color=_BLUE, alpha=0.10)
    axes.plot(tokens, [point.used_bytes / size for point in trace.points], color=_BLUE, linewidth=1.4, label="used")
    if trace.compactions:
        peaks = [report.bytes_peak / size for report in trace.compactions]
        axes.plot(trace.compacted_at, peaks, "v", color=_ORANGE, markersize=6, label="peak while compacting (R + T)")
    _cap_line(axes, trace.cap_bytes, size)
    if trace.full_bytes is not None:
        full = [trace.full_bytes(count) / size for count in tokens]
        axes.plot(tokens, full, color=_INK, linestyle=":", linewidth=1.4, label="full memory")
        highest = max(highest, min(int(_FULL * highest), trace.full_bytes(max(tokens))))
    axes.set_ylim(0, 1.12 * highest / size)
    axes.set_xlim(0, max(tokens) * 1.01)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel(f"KV memory ({unit})")
    _title(axes, trace, "KV memory under a hard cap")
    _legend(figure, axes)
    return figure


def error_figure(trace: Trace) -> Figure:
    """Plot output error and log-mass error on held-out reference queries, one point per compaction.

    :class:`~agentmem.reporting.report.LayerReport` explains the two errors; a point is the mean over layers.
    """
    figure, axes = _axes()
    series = (
        ("output error (relative L2)", _BLUE, "o", [report.output_error for report in trace.compactions]),
        ("log-mass error (mean absolute)", _GREEN, "s", [report.log_mass_error for report in trace.compactions]),
    )
    for label, colour, marker, values in series:
        found = [(number, value) for number, value in enumerate(values, start=1) if value is not None]
        if found:
            numbers, heights = zip(*found, strict=True)
            axes.plot(numbers, heights, marker=marker, color=colour, linewidth=1.4, markersize=5, label=label)
    known = [value for *_, values in series for value in values if value is not None and math.isfinite(value)]
    axes.set_ylim(0, 1.12 * max(known, default=0.0) or 1.0)  # room above the highest marker
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("compaction")
    axes.set_ylabel("error on held-out queries, mean over layers")
    _title(axes, trace, "What each compaction lost")
    _legend(figure, axes)
    return figure


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure, axes


def _cap_line(axes: Axes, cap_bytes: int | None, size: int) -> None:
    if cap_bytes is None:
        return
    axes.axhline(cap_bytes / size, color=_RED, linestyle="--", linewidth=1.4)
    axes.annotate(
        f"cap {format_bytes(cap_bytes)}",
        (1.0, cap_bytes / size),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        horizontalalignment="right",
        color=_RED,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
    )


def _title(axes: Axes, trace: Trace, text: str) -> None:
    count = len(trace.compactions)
    compactions = f"{count} compaction{'' if count == 1 else 's'}"
    policy = f"{trace.policy}, " if trace.policy else ""
    axes.set_title(f"{text}: {policy}{compactions}", loc="left", color=_INK)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # The legend lies below the axes, where it never covers data.
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
