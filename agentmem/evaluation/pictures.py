"""Draw the figures of evaluations: KL against compactions, KL against ratio, recall by depth, and recall against KL.

This module needs matplotlib, of which it uses only the object interface (no ``pyplot``). Of the other evaluation
modules, only those in ``ablation`` need matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from pydantic import FailFast, TypeAdapter, ValidationError

from agentmem.errors import SettingsRefused
from agentmem.evaluation.fidelity import FidelityRow
from agentmem.evaluation.recall import FULL, WINDOW
from agentmem.untrusted.files import read_plain
from agentmem.untrusted.json_text import json_value
from agentmem.untrusted.texts import faults

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from agentmem.evaluation.one_shot import OneShotRow
    from agentmem.evaluation.recall import RecallRow

_DPI = 150
_MAX_FIDELITY = 64 << 20
"""The most bytes that a file of fidelity rows may have."""
_INK, _GREY = "#333333", "#888888"
_MARKERS = "os^Dv<>Ph*"
_LEGEND_WIDTH = 110
"""The most characters in one line of a legend."""


def read_fidelity(path: Path) -> tuple[FidelityRow, ...]:
    """Read the rows that ``agentmem eval fidelity --json`` wrote.

    Raises:
        SettingsRefused: the file cannot be read, or does not hold such rows.

    """
    rows = None
    try:
        rows = json_value(read_plain(path, _MAX_FIDELITY), _MAX_FIDELITY, strict=False)
        return tuple(TypeAdapter(Annotated[list[FidelityRow], FailFast()]).validate_python(rows))
    except OSError as error:
        raise SettingsRefused(f"fidelity-json: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        said = faults(error, rows) if isinstance(error, ValidationError) else error
        raise SettingsRefused(
            f"fidelity-json: {path} holds no rows of `agentmem eval fidelity --json`: {said}"
        ) from None


def save(figures: Mapping[str, Figure], folder: Path) -> tuple[Path, ...]:
    """Write every figure as ``name.png`` into ``folder``, which is created if it does not exist; return the paths.

    Raises:
        SettingsRefused: the folder cannot be written.

    """
    paths = {folder / f"{name}.png": figure for name, figure in figures.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, figure in paths.items():
            figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise SettingsRefused(f"plot: cannot write into {folder}: {error.strerror or error}") from error
    return tuple(paths)


def drift_figure(rows: Sequence[FidelityRow]) -> Figure:
    """Plot mean KL against the number of compactions so far, with one line per policy; KL is averaged over passages."""
    figure, (axes,) = _axes(1)
    for index, (label, found) in enumerate(_by_label(rows).items()):
        counts = range(1, min(row.num_compactions for row in found) + 1)
        means = [sum(row.kl_by_compaction[count] for row in found) / len(found) for count in counts]
        axes.plot(counts, means, label=label, linewidth=1.4, markersize=4, marker=_marker(index))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("compactions so far")
    axes.set_ylabel("KL from full memory (nats)")
    axes.set_title("Drift: KL against the number of compactions", loc="left", color=_INK)
    _legend(figure, axes)
    return figure


def one_shot_figure(rows: Sequence[OneShotRow]) -> Figure:
    """Plot mean KL against the compaction ratio, with one line per policy; KL is averaged over passages."""
    figure, (axes,) = _axes(1)
    by_policy: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.ratio is not None:
            by_policy.setdefault(row.policy, {}).setdefault(row.ratio, []).append(row.kl_mean)
    for index, (policy, points) in enumerate(by_policy.items()):
        ratios = sorted(points)
        means = [sum(points[ratio]) / len(points[ratio]) for ratio in ratios]
        axes.plot(ratios, means, label=policy, linewidth=1.4, markersize=5, marker=_marker(index))
    nothing = [row.kl_mean for row in rows if row.ratio is None]
    if nothing:
        axes.axhline(sum(nothing) / len(nothing), color=_GREY, linestyle="--", linewidth=1.2, label="no context")
    axes.set_xscale("log")
    ticks = sorted({row.ratio for row in rows if row.ratio is not None})
    axes.set_xticks(ticks, [f"1/{ratio}" for ratio in ticks], minor=False)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("slots that one compaction leaves of the document")
    axes.set_ylabel("KL from full memory (nats)")
    axes.set_title("One compaction, then a continuation", loc="left", color=_INK)
    _legend(figure, axes)
    return figure


def recall_figure(rows: Sequence[RecallRow]) -> Figure:
    """Plot recall against the depth of facts, with one line per policy.

    One panel shows the share of exact answers, the other the mean log-probability of the right answers.
    """
    figure, panels = _axes(2)
    for index, row in enumerate(rows):
        end = row.policy in (FULL, WINDOW)
        style = {"linestyle": "--" if end else "-", "linewidth": 1.4, "markersize": 5, "marker": _marker(index)}
        depths = [float(depth) for depth in row.by_depth]
        scores = list(row.by_depth.values())
        label = row.policy if len({each.equal for each in rows}) == 1 else f"{row.policy}, equal {row.equal}"
        panels[0].plot(depths, [score.exact for score in scores], label=label, **style)  # type: ignore[arg-type]  # a mixed dict
        panels[1].plot(depths, [score.log_prob for score in scores], label=label, **style)  # type: ignore[arg-type]  # a mixed dict
    panels[0].set_ylim(-0.02, 1.02)
    for axes, text in zip(panels, ("share of exact answers", "log-probability of the answer (nats)"), strict=True):
        axes.set_xlabel("depth of the fact in the document")
        axes.set_ylabel(text)
    panels[0].set_title("Recall of planted facts", loc="left", color=_INK)
    _legend(figure, panels[0])
    return figure


def trade_figure(recalled: Sequence[RecallRow], fidelity: Sequence[FidelityRow]) -> Figure:
    """Plot the ``recovered`` score of recall against mean KL, with one point per policy that both evaluations measured.

    Raises:
        SettingsRefused: no policy with a ``recovered`` score is in both ``recalled`` and ``fidelity``.

    """
    recovered = {(row.equal, row.policy): row.recovered for row in recalled if row.recovered is not None}
    kl: dict[tuple[str, str], list[float]] = {}
    for row in fidelity:
        kl.setdefault((row.equal, row.policy), []).append(row.kl_mean)
    shared = [key for key in recovered if key in kl]
    if not shared:
        raise SettingsRefused(
            f"fidelity-json: its policies ({', '.join(sorted({name for _, name in kl})) or 'none'}) and those with a "
            f"measured recall ({', '.join(sorted({name for _, name in recovered})) or 'none'}) have none in common; "
            "run `agentmem eval fidelity --json` with the same --policies and the same kind of limit"
        )
    figure, (axes,) = _axes(1)
    points = {key: (sum(kl[key]) / len(kl[key]), recovered[key]) for key in shared}
    furthest = max(point[0] for point in points.values())
    for index, (key, point) in enumerate(points.items()):
        axes.plot(*point, marker=_marker(index), markersize=8, linestyle="none")
        label = key[1] if len({equal for equal, _ in shared}) == 1 else f"{key[1]}, equal {key[0]}"
        inward = point[0] > furthest / 2  # labels in the right half extend to the left
        axes.annotate(
            label,
            point,
            xytext=(-7, -14) if inward else (7, 5),  # on the right below the point, against overlaps
            textcoords="offset points",
            horizontalalignment="right" if inward else "left",
            color=_INK,
            fontsize=8,
        )
    axes.margins(0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel("KL from full memory (nats): lower is better")
    axes.set_ylabel("recovered recall (0 window, 1 full memory)")
    axes.set_title("What is kept of the near and of the far", loc="left", color=_INK)
    return figure


def _by_label(rows: Sequence[FidelityRow]) -> dict[str, list[FidelityRow]]:
    several = len({row.equal for row in rows}) > 1
    found: dict[str, list[FidelityRow]] = {}
    for row in rows:
        if row.num_compactions:
            found.setdefault(f"{row.policy}, equal {row.equal}" if several else row.policy, []).append(row)
    return found


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def _axes(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    found = [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    return figure, found


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = max(1, min(len(handles), _LEGEND_WIDTH // (6 + max(map(len, labels)))))
    # The legend lies below the axes, where it never covers data.
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
