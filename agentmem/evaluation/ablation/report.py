"""Make the report of an ablation: one self-contained HTML file with tables, figures, settings and provenance."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import TYPE_CHECKING

import jinja2

from agentmem.evaluation.ablation.figures import Picture, pictures
from agentmem.evaluation.ablation.scores import measure_of
from agentmem.evaluation.ablation.tables import interval, refusals, tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.evaluation.ablation.config import Ablation
    from agentmem.evaluation.ablation.lines import Line
    from agentmem.evaluation.ablation.rows import Row

_FACTS = ("agentmem", "commit", "torch", "transformers", "python", "device", "dtype", "threads", "model_sha256")


def as_html(ablation: Ablation, rows: Sequence[Row], lines: Sequence[Line], *, source: str, command: str) -> str:
    """Return the report of an ablation as HTML.

    ``rows`` are the results of cells, and ``lines`` the lines of the tables. ``source`` is the YAML text of the
    configuration, and ``command`` is the shell command that repeats the run; both are shown in the report.
    """
    template = resources.files("agentmem.evaluation.ablation").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        title=ablation.title,
        findings=_findings(ablation, lines),
        tables=tables(ablation, lines),
        pictures=[(picture, _inline(picture)) for picture in pictures(rows, lines)],
        refusals=refusals(lines),
        measured=sum(not row.refused for row in rows),
        cells=len(rows),
        confidence=f"{ablation.confidence:.0%}",
        resamples=f"{ablation.resamples:,}",
        baseline=ablation.compared_with,
        source=source,
        command=command,
        facts=_facts(rows),
    )


def _inline(picture: Picture) -> str:
    """Return a figure's SVG with unique element ids, because Matplotlib uses the same ids in all figures.

    The SVG may be inserted without escaping, because Matplotlib draws all texts as paths.
    """
    mark = hashlib.sha256(picture.name.encode()).hexdigest()[:6]
    named = picture.svg.replace('id="', f'id="{mark}-')
    return named.replace("url(#", f"url(#{mark}-").replace('="#', f'="#{mark}-')


def _findings(ablation: Ablation, lines: Sequence[Line]) -> list[str]:
    """Return one sentence per instrument, model and kind of limit.

    The sentence names the best policy at the smallest limit. An instrument is a kind of measurement: fidelity, recall
    or a task. The kind of limit is slots or bytes.
    """
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        if line.score and line.limit is not None:
            groups.setdefault((line.instrument, line.model, line.equal), []).append(line)
    return [_finding(ablation, group) for group in groups.values()]


def _finding(ablation: Ablation, group: Sequence[Line]) -> str:
    measure = measure_of(group[0].instrument)
    sign = 1 if measure.lower_is_better else -1
    tightest = min(line.limit_value for line in group)
    scores = [(sign * line.score.mean, line) for line in group if line.score and line.limit_value == tightest]
    best = min(scores, key=lambda pair: pair[0])[1]
    text = f"{best.instrument}, {best.limit}: {best.policy} has the best {measure.name}"
    if best.score is not None:
        text += f", {interval(best.score, measure.digits)} {measure.unit}"
    if best.difference is not None:
        remark = "" if best.difference.excludes_zero else ", which includes zero"
        text += f"; to {ablation.compared_with} {interval(best.difference, measure.digits, sign='+')}{remark}"
    return f"{text}."


def _facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the provenance of the results as pairs (name, values); several values of one name are joined by commas."""
    facts = [(name.replace("_", " "), sorted({str(getattr(row.provenance, name)) for row in rows})) for name in _FACTS]
    texts = sorted({f"{row.cell.source} {row.provenance.text_sha256}" for row in rows})
    return [(name, ", ".join(values)) for name, values in [*facts, ("texts sha256", texts)]]
