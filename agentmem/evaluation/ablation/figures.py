"""Draw the figures of an ablation as SVG texts that load nothing from elsewhere, such as fonts or styles.

Every policy has the same colour and marker in all figures. Only Matplotlib's object interface is used, not ``pyplot``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from agentmem.evaluation.ablation.scores import measure_of
from agentmem.evaluation.fidelity import Measurement, rows
from agentmem.evaluation.recall import FULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from agentmem.evaluation.ablation.lines import Line
    from agentmem.evaluation.ablation.rows import Row

# Okabe and Ito: colours that readers with any colour vision can distinguish; yellow is too pale on white and left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#7A4EA3")
_MARKERS = "osD^vP*X"
_INK, _GREY, _RED = "#222222", "#8a8a8a", "#b3261e"
_SIZE, _MIB = (5.4, 3.7), 2**20
_LEGEND_WIDTH = 62
"""The most characters in one line of a legend."""
_HEAT_MAPS = 4


@dataclass(frozen=True)
class Picture:
    """One figure as SVG, with its name and caption."""

    name: str
    svg: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Palette:
    """The assignment of a colour and a marker to every policy, by the policy's place in ``policies``."""

    policies: tuple[str, ...]

    def style(self, policy: str) -> dict[str, str]:
        """Return the policy's colour and marker as keyword arguments of a plot."""
        if policy == FULL:
            return {"color": _GREY, "marker": "h"}
        place = self.policies.index(policy)
        return {"color": _COLOURS[place % len(_COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Palette:
        """Make a palette for the policies of ``rows`` (results of cells), in the order of their first appearance."""
        return cls(tuple(dict.fromkeys(row.cell.policy for row in rows if row.cell.policy != FULL)))


def pictures(rows: Sequence[Row], lines: Sequence[Line]) -> tuple[Picture, ...]:
    """Draw all figures for which ``rows`` (results of cells) and ``lines`` (lines of the tables) have data."""
    palette = Palette.of(rows)
    found = [_pareto(name, lines, palette) for name in dict.fromkeys(line.instrument for line in lines)]
    tightest = _tightest(rows)
    if tightest:
        found += [_drift(tightest, palette), _saw_tooth(tightest, palette), _heat_map(tightest)]
    found.append(_costs(lines, palette))
    return tuple(each for each in found if each is not None)


# ---- figures


def _pareto(instrument: str, lines: Sequence[Line], palette: Palette) -> Picture | None:
    measure = measure_of(instrument)
    measured = [line for line in lines if line.instrument == instrument and line.score and line.limit is not None]
    if not measured:
        return None
    figure, axes = _figure()
    for policy in dict.fromkeys(line.policy for line in measured):
        own = sorted((line for line in measured if line.policy == policy), key=lambda line: line.peak_bytes)
        for place, group in enumerate(_by_setting(own)):
            _points(axes, group, label=policy if place == 0 else None, style=palette.style(policy))
    full = [line.score.mean for line in lines if line.instrument == instrument and line.limit is None and line.score]
    if full:
        axes.axhline(mean(full), color=_GREY, linestyle="--", linewidth=1, label="full memory")
    if measure.lower_is_better and min(line.score.mean for line in measured if line.score) > 0:
        axes.set_yscale("log")
    axes.margins(x=0.08)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_xlabel("peak of the KV memory, R + T (MiB)")
    axes.set_ylabel(f"{measure.name} ({measure.unit})")
    _legend(figure, axes)
    direction = "lower" if measure.lower_is_better else "higher"
    caption = f"Bytes against {measure.name} ({instrument}). To the left is smaller, {direction} is better; bars are "
    return Picture(f"pareto-{instrument}", _svg(figure), f"{caption}bootstrap intervals.")


def _by_setting(lines: Sequence[Line]) -> list[list[Line]]:
    groups: dict[object, list[Line]] = {}
    for line in lines:
        kept = (line.keep_first, line.keep_recent, line.target, line.slot_dtype)
        groups.setdefault((line.model, line.equal, *kept), []).append(line)
    return list(groups.values())


def _points(axes: Axes, lines: Sequence[Line], *, label: str | None, style: dict[str, str]) -> None:
    scores = [line.score for line in lines if line.score]
    heights = [score.mean for score in scores]
    low = [score.mean - (score.mean if score.low is None else score.low) for score in scores]
    high = [(score.mean if score.high is None else score.high) - score.mean for score in scores]
    axes.errorbar(
        [line.peak_bytes / _MIB for line in lines],
        heights,
        yerr=[[max(0.0, value) for value in low], [max(0.0, value) for value in high]],
        label=label,
        linewidth=1.3,
        markersize=5.5,
        capsize=2.5,
        elinewidth=0.9,
        **style,  # type: ignore[arg-type]  # a mixed dict
    )


def _tightest(found: Sequence[Row]) -> list[Row]:
    """Choose the setting that the fidelity figures show, and return its rows, one for each policy.

    Rows have the same setting if they differ only in policy. Rows without compactions are left out. The setting with
    the most rows is chosen; among settings with equally many rows, the one that has the row with the most compactions.
    """
    groups: dict[object, list[Row]] = {}
    for row in found:
        cell = row.cell
        if cell.instrument == "fidelity" and row.compactions:
            kept = (cell.keep_first, cell.keep_recent, cell.target, cell.slot_dtype)
            key = (cell.model, cell.text, cell.seed, cell.limit, *kept)
            groups.setdefault(key, []).append(row)
    return max(groups.values(), key=lambda group: (len(group), max(row.compactions for row in group)), default=[])


def _run(row: Row) -> Measurement:
    """Return the measurement of a table row whose instrument is ``fidelity``; such a row has exactly one."""
    (run,) = (run for run in row.runs if isinstance(run, Measurement))
    return run


def _where(group: Sequence[Row]) -> str:
    cell = group[0].cell
    return f"{cell.source}, {cell.limit}, seed {cell.seed}"


def _drift(group: Sequence[Row], palette: Palette) -> Picture:
    figure, axes = _figure()
    for row, line in zip(group, rows([_run(row) for row in group]), strict=True):
        counts = range(1, len(line.kl_by_compaction))
        axes.plot(
            counts,
            line.kl_by_compaction[1:],
            label=row.cell.policy,
            linewidth=1.3,
            markersize=5,
            **palette.style(row.cell.policy),  # type: ignore[arg-type]  # a mixed dict
        )
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("compactions so far")
    axes.set_ylabel("KL from full memory (nats)")
    _legend(figure, axes)
    return Picture("drift", _svg(figure), f"Error against the number of compactions ({_where(group)}).")


def _saw_tooth(group: Sequence[Row], palette: Palette) -> Picture:
    figure, axes = _figure()
    for row in group:
        style, run = palette.style(row.cell.policy), _run(row)
        tokens, used = _tooth(run)
        axes.plot(tokens, used, color=style["color"], linewidth=1.3, label=row.cell.policy)
        peaks = [(each.tokens, each.peak / _MIB) for each in run.compacted]
        axes.plot(*zip(*peaks, strict=True), linestyle="none", markersize=4, **style)  # type: ignore[arg-type]  # a mixed dict
    cap = group[0].cell.cap_bytes
    if cap is not None:
        axes.axhline(cap / _MIB, color=_RED, linestyle="--", linewidth=1.2, label="cap")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("KV memory (MiB)")
    _legend(figure, axes)
    caption = "Bytes of the slots that are held; markers are the peaks of compactions, workspace included "
    return Picture("saw-tooth", _svg(figure), f"{caption}({_where(group)}).")


def _tooth(run: Measurement) -> tuple[list[int], list[float]]:
    """Return the points of a line that shows used MiB by tokens read, with a vertical drop at each compaction."""
    tokens, used = [0], [0.0]
    falls = {each.tokens for each in run.compacted}
    for moment in run.moments:
        if tokens[-1] in falls and moment.used / _MIB < used[-1]:
            tokens.append(tokens[-1])
            used.append(moment.used / _MIB)
        tokens.append(moment.tokens)
        used.append(moment.used / _MIB)
    return tokens, used


def _costs(lines: Sequence[Line], palette: Palette) -> Picture | None:
    policies = [name for name in palette.policies if any(line.policy == name and line.compactions for line in lines)]
    if not policies:
        return None
    figure = Figure(figsize=(_SIZE[0], 1.1 + 0.36 * len(policies)), layout="constrained")
    FigureCanvasSVG(figure)
    own = {name: [line for line in lines if line.policy == name and line.compactions] for name in policies}
    panels = (
        ("seconds per compaction", [mean(line.seconds_each for line in own[name]) for name in policies]),
        ("share of all time", [mean(line.share for line in own[name]) for name in policies]),
    )
    for place, (title, values) in enumerate(panels):
        axes = figure.add_subplot(1, 2, place + 1)
        _plain(axes, "x")
        colours = [palette.style(name)["color"] for name in policies]
        axes.barh(range(len(policies)), values, color=colours, height=0.62)
        axes.set_yticks(range(len(policies)), policies if place == 0 else [""] * len(policies))
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.22 * max(values) or 1)
        for row, value in enumerate(values):
            axes.annotate(f" {value:.2f}" if place == 0 else f" {value:.0%}", (value, row), va="center", fontsize=8)
        axes.set_xlabel(title)
        if place:
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    caption = "What compactions cost: seconds of one, and their share of all time; means over all settings measured."
    return Picture("costs", _svg(figure), caption)


def _heat_map(group: Sequence[Row]) -> Picture | None:
    """Draw the slots of each layer and KV head, for each policy whose budgets differ between heads.

    The result is ``None`` if there is no such policy. At most four policies are drawn.
    """
    unequal = [row for row in group if len({slots for layer in _run(row).heads for slots in layer}) > 1]
    shown = unequal[:_HEAT_MAPS]
    if not shown:
        return None
    most = max(slots for row in shown for layer in _run(row).heads for slots in layer)
    figure = Figure(figsize=(1.6 * _SIZE[0], 1.0 + 1.25 * len(shown)), layout="constrained")
    FigureCanvasSVG(figure)
    panels = []
    for place, row in enumerate(shown):
        axes = figure.add_subplot(len(shown), 1, place + 1)
        heads = _run(row).heads
        width = max(map(len, heads))
        grid = [[layer[head] if head < len(layer) else float("nan") for layer in heads] for head in range(width)]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest")
        axes.set_title(row.cell.policy, loc="left", fontsize=10, color=_INK)
        axes.set_ylabel("KV head")
        axes.set_yticks(range(width))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panels.append(axes)
    panels[-1].set_xlabel("compacted layer")
    figure.colorbar(image, ax=panels, label="slots after the last compaction", pad=0.01)
    left_out = f"; {len(unequal) - len(shown)} more are not shown" if len(unequal) > len(shown) else ""
    caption = f"Slots that each head keeps, where a policy has unequal budgets ({_where(group)}{left_out})."
    return Picture("heads", _svg(figure), caption, wide=True)


# ---- style


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    _plain(axes, "y")
    return figure, axes


def _plain(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e2e2e2", linewidth=0.7)  # type: ignore[arg-type]  # "x" or "y"
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = max(1, min(len(handles), _LEGEND_WIDTH // (6 + max(map(len, labels)))))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _svg(figure: Figure) -> str:
    """Return the figure as one ``<svg>`` element that can be put into an HTML page.

    The XML prolog, metadata and namespaces are removed, because they contain web addresses.
    """
    target = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(target, format="svg", metadata=nothing, transparent=True)
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*(<metadata>.*?</metadata>|<!--.*?-->)", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    # Without width and height the page sets the size; the view box keeps the proportions.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
