"""Draw the figures of evaluations: KL against compactions, KL against ratio, recall by depth, and recall against KL.

This module needs matplotlib, of which it uses only the object interface (no ``pyplot``). Of the other evaluation
modules, only those in ``ablation`` need matplotlib.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from pydantic import FailFast, TypeAdapter, ValidationError

from agentmem.errors import SettingsRefused
from agentmem.evaluation.fidelity import BLOCK, FidelityRow
from agentmem.evaluation.recall import FULL, WINDOW
from agentmem.untrusted.files import read_plain
from agentmem.untrusted.json_text import json_value
from agentmem.untrusted.texts import faults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from matplotlib.axes import Axes

    from agentmem.evaluation.one_shot import OneShotRow
    from agentmem.evaluation.recall import RecallRow

    Points = Callable[[Sequence[FidelityRow], Sequence[FidelityRow]], tuple[Sequence[float], Sequence[float]]]
    """Returns abscissas and ordinates of a line, from all rows of its panel and from its own rows."""

_DPI = 150
_MAX_FIDELITY = 64 << 20
"""The most bytes that a file of fidelity rows may have."""
_MIB = 2**20
_LABEL = 40
"""The most characters of a label."""
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


def require_shared(fidelity: Sequence[FidelityRow], measured: Iterable[tuple[str, str]]) -> None:
    """Check that fidelity rows have a policy under the same limit as a measurement of recall.

    ``measured`` has pairs of a limit (as in :attr:`Terms.limit`) and the name of a policy.

    Raises:
        SettingsRefused: the two have no such pair in common.

    """
    theirs, ours = (
        {f"{name} at {limit}" for limit, name in pairs}
        for pairs in (((row.limit, row.policy) for row in fidelity), measured)
    )
    if not theirs & ours:
        raise SettingsRefused(
            f"fidelity-json: its policies and limits ({', '.join(sorted(theirs)) or 'none'}) and those of recall "
            f"({', '.join(sorted(ours)) or 'none'}) have none in common; run `agentmem eval fidelity --json` with the "
            "same --policies and the same --slots or --cap"
        )


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


def fidelity_figures(rows: Sequence[FidelityRow]) -> dict[str, Figure]:
    """Return all figures for which the rows have data, by name: drift, KL against tokens, KL against the cap."""
    found = {"kl-tokens": tokens_figure(rows)} if any(row.kl_by_tokens for row in rows) else {}
    if any(row.num_compactions for row in rows):
        found["drift"] = drift_figure(rows)
    if any(len({row.limit for row in group}) > 1 for group in _groups(rows, limit=False).values()):
        found["kl-cap"] = cap_figure(rows)
    return found


def drift_figure(rows: Sequence[FidelityRow]) -> Figure:
    """Plot mean KL against the number of compactions so far; KL is averaged over passages.

    Each model and limit has a panel of its own, with one line per policy. The lines of a panel end at the number of
    compactions that every policy reached on every passage, so that each point compares the same.
    """
    groups = _groups([row for row in rows if row.num_compactions])

    def points(group: Sequence[FidelityRow], found: Sequence[FidelityRow]) -> tuple[list[int], list[float]]:
        counts = list(range(1, min(row.num_compactions for row in group) + 1))
        return counts, [sum(row.kl_by_compaction[count] for row in found) / len(found) for count in counts]

    figure = _panels(groups, points, "Drift: KL against the number of compactions", "compactions so far")
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def tokens_figure(rows: Sequence[FidelityRow]) -> Figure:
    """Plot mean KL against the tokens read so far, averaged over passages, with a panel for each model and limit."""

    def points(group: Sequence[FidelityRow], found: Sequence[FidelityRow]) -> tuple[list[int], list[float]]:
        blocks = list(range(min(len(row.kl_by_tokens) for row in group)))
        means = [sum(row.kl_by_tokens[block] for row in found) / len(found) for block in blocks]
        return [(block + 1) * BLOCK for block in blocks], means

    return _panels(_groups(rows), points, "KL against tokens", f"tokens read (means of {BLOCK})")


def cap_figure(rows: Sequence[FidelityRow]) -> Figure:
    """Plot mean KL against the limit, averaged over passages, with a panel for each model and kind of limit."""
    groups = _groups(rows, limit=False)

    def points(_group: Sequence[FidelityRow], found: Sequence[FidelityRow]) -> tuple[list[float], list[float]]:
        by_limit: dict[float, list[float]] = {}
        for row in found:
            limit = row.settings.slots or (row.settings.cap_bytes or 0) / _MIB
            by_limit.setdefault(limit, []).append(row.kl_mean)
        limits = sorted(by_limit)
        return limits, [sum(by_limit[limit]) / len(by_limit[limit]) for limit in limits]

    return _panels(groups, points, "KL against the limit", "slots per head, or cap in MiB")


def _groups(rows: Sequence[FidelityRow], *, limit: bool = True) -> dict[str, list[FidelityRow]]:
    """Group rows that may be compared, under short titles: one model, and one limit or (``limit=False``) one kind."""
    several = len({row.model for row in rows}) > 1
    found: dict[str, list[FidelityRow]] = {}
    for row in rows:
        title = row.limit if limit else f"equal {row.equal}"
        found.setdefault(f"{short(row.model)}, {title}" if several else title, []).append(row)
    return found


def _panels(groups: Mapping[str, Sequence[FidelityRow]], points: Points, title: str, abscissa: str) -> Figure:
    """Draw a panel for each group, with one line per policy; ``points`` gives a line's points."""
    figure, panels = _axes(max(1, len(groups)))
    policies = list(dict.fromkeys(row.policy for group in groups.values() for row in group))
    for axes, (name, group) in zip(panels, groups.items(), strict=False):
        for index, policy in enumerate(policies):
            found = [row for row in group if row.policy == policy]
            if found:
                style = {"linewidth": 1.4, "markersize": 4, "marker": _marker(index), "color": f"C{index % 10}"}
                axes.plot(*points(group, found), label=short(policy), **style)  # type: ignore[arg-type]  # a mixed dict
        axes.set_ylim(bottom=0)
        axes.set_xlabel(abscissa)
        axes.set_title(name, fontsize=9, color=_INK)
    panels[0].set_ylabel("KL from full memory (nats)")
    figure.suptitle(title, x=0.01, horizontalalignment="left", color=_INK)
    _legend(figure, *panels)
    return figure


def short(name: str) -> str:
    """Return a name or spec as a legend shows it: paths as file names, and no more than 40 characters."""
    bare = re.sub(r"[^\[\]=,;]*/([^\[\]=,;/]+)", r"\1", name)
    return bare if len(bare) <= _LABEL else f"{bare[: _LABEL - 16]}…{bare[-15:]}"


def one_shot_figure(rows: Sequence[OneShotRow]) -> Figure:
    """Plot mean KL against the compaction ratio, with one line per model and policy; KL is averaged over passages."""
    figure, (axes,) = _axes(1)
    several = len({row.model for row in rows}) > 1
    by_policy: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.ratio is not None:
            name = short(f"{row.policy}, {row.model}" if several else row.policy)
            by_policy.setdefault(name, {}).setdefault(row.ratio, []).append(row.kl_mean)
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
        label = short(row.policy) if len({each.limit for each in rows}) == 1 else f"{short(row.policy)}, {row.limit}"
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
    recovered = {(row.limit, row.policy): row.recovered for row in recalled if row.recovered is not None}
    kl: dict[tuple[str, str], list[float]] = {}
    for row in fidelity:
        kl.setdefault((row.limit, row.policy), []).append(row.kl_mean)
    shared = [key for key in recovered if key in kl]
    require_shared(fidelity, recovered)
    figure, (axes,) = _axes(1)
    points = {key: (sum(kl[key]) / len(kl[key]), recovered[key]) for key in shared}
    furthest = max(point[0] for point in points.values())
    for index, (key, point) in enumerate(points.items()):
        axes.plot(*point, marker=_marker(index), markersize=8, linestyle="none")
        label = short(key[1]) if len({limit for limit, _ in shared}) == 1 else f"{short(key[1])}, {key[0]}"
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


def _legend(figure: Figure, *panels: Axes) -> None:
    """Draw one legend with every label of the panels once."""
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels]
    by_label = {label: handle for pair in pairs for handle, label in pair}
    if not by_label:
        return
    labels, handles = list(by_label), list(by_label.values())
    columns = max(1, min(len(handles), _LEGEND_WIDTH // (6 + max(map(len, labels)))))
    # The legend lies below the axes, where it never covers data.
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
