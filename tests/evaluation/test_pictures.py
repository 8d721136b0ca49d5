"""Pictures of evaluations: what they draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from agentmem.errors import SettingsRefused
from agentmem.evaluation import FidelityRow, OneShotRow, RecallRow, Terms, pictures
from agentmem.evaluation.recall import Score


def fidelity(policy: str, by_compaction: tuple[float, ...], **changes: Any) -> FidelityRow:
    """A row with that KL after each compaction."""
    facts: dict[str, Any] = {
        "equal": "slots", "offset": 0, "kl_mean": 0.25, "kl_p95": 1.0, "top1": 1.0, "delta_nll": 0.0, "held": 1,
        "num_compactions": len(by_compaction) - 1, "bytes": 1, "seconds": 1.0, "compact_seconds": 0.5, "positions": 9,
        "capacity": 5, "drift": (),
    }  # fmt: skip
    return FidelityRow(policy=policy, kl_by_compaction=by_compaction, **(facts | changes))


def recalled(policy: str, recovered: float | None, **changes: Any) -> RecallRow:
    """A row with two depths."""
    score = Score(facts=2, exact=0.5, log_prob=-3.0, log_prob_per_token=-1.0, recovered=recovered)
    other = score.model_copy(update={"exact": 1.0, "log_prob": -1.0})
    facts: dict[str, Any] = {
        "equal": "slots", "documents": 1, "by_depth": {"0.1": score, "0.7": other}, "by_format": {}, "held": 1,
        "by_compactions": {}, "num_compactions": 1, "total_compactions": 1, "capacity": 5, "bytes": 1, "seconds": 1.0,
        "compact_seconds": 0.5,
    }  # fmt: skip
    return RecallRow(policy=policy, **dict(score), **(facts | changes))


def lines(figure: Figure, panel: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    """What is drawn, by label."""
    drawn = {}
    for line in figure.axes[panel].get_lines():
        x, y = line.get_xdata(), line.get_ydata()
        drawn[str(line.get_label())] = ([float(value) for value in x], [float(value) for value in y])
    return drawn


def test_drift_is_drawn_from_the_first_compaction_on() -> None:
    """Means over passages, as far as all passages and policies go; a policy that never compacted has no line."""
    rows = [
        fidelity("p", (0.0, 1.0, 2.0, 9.0)), fidelity("p", (0.0, 3.0, 4.0), offset=5), fidelity("full", (0.0,)),
        fidelity("q", (0.0, 1.0, 1.0, 1.0)),
    ]  # fmt: skip

    assert lines(pictures.drift_figure(rows)) == {"p": ([1, 2], [2.0, 3.0]), "q": ([1, 2], [1.0, 1.0])}


def test_limits_and_models_are_told_apart() -> None:
    """Every model and limit has a panel of its own, so that a line beside another is of the same."""
    of = [{"settings": Terms(slots=64)}, {"settings": Terms(cap_bytes=2**20)}, {"model": "/a/b", "settings": Terms()}]
    figure = pictures.drift_figure([fidelity("p", (0.0, 1.0), **each) for each in of])

    assert [axes.get_title() for axes in figure.axes] == [", 64 slots", ", 1.0 MiB", "b, 0 B"]
    assert [list(lines(figure, panel)) for panel in range(3)] == [["p"]] * 3


def test_kl_is_drawn_against_tokens_and_against_the_cap() -> None:
    """Blocks of 64 tokens; one point per cap, sorted; nothing is drawn against one cap alone."""
    rows = [
        fidelity("p", (0.0, 1.0), kl_mean=mean, kl_by_tokens=(0.0, mean), settings=Terms(cap_bytes=mib << 20))
        for mean, mib in ((1.0, 16), (3.0, 8))
    ]
    found = pictures.fidelity_figures(rows)

    assert set(found) == {"drift", "kl-tokens", "kl-cap"}
    assert lines(found["kl-cap"]) == {"p": ([8, 16], [3.0, 1.0])}
    assert lines(found["kl-tokens"], 1) == {"p": ([64, 128], [0.0, 3.0])}
    assert set(pictures.fidelity_figures(rows[:1])) == {"drift", "kl-tokens"}


def test_labels_are_short() -> None:
    """Of a path its file, and forty characters at most."""
    assert pictures.short("am-halving[budgets=calibrated[table=/home/me/tables/t.json]]") == (
        "am-halving[budgets=calib…[table=t.json]]"
    )
    assert pictures.short("am-recall[table=/home/me/t.json]") == "am-recall[table=t.json]"
    assert len(pictures.short("x" * 99)) == 40


def test_one_shot_is_drawn_against_the_ratio() -> None:
    """The mean over documents at each ratio; no context is a level line."""
    facts: dict[str, Any] = {
        "offset": 0, "document": 10, "slots": 2, "positions": 4, "kl_p95": 1.0, "top1": 1.0, "nll": 1.0, "held": 2,
        "delta_nll": 0.0, "bytes": 1, "seconds": 1.0, "compact_seconds": 0.5,
    }  # fmt: skip
    values = [("p", 20, 1.0), ("p", 10, 0.5), ("p", 20, 3.0), ("no-context", None, 5.0)]
    rows = [OneShotRow(policy=policy, ratio=ratio, kl_mean=kl, **facts) for policy, ratio, kl in values]

    drawn = lines(pictures.one_shot_figure(rows))

    assert drawn["p"] == ([10, 20], [0.5, 2.0])
    assert drawn["no context"][1] == [5.0, 5.0]


def test_recall_is_drawn_by_depth() -> None:
    """Exact answers beside log-probabilities, a line per policy."""
    figure = pictures.recall_figure([recalled("full", 1.0), recalled("p", 0.5)])

    assert lines(figure)["p"] == ([0.1, 0.7], [0.5, 1.0])
    assert lines(figure, 1)["p"] == ([0.1, 0.7], [-3.0, -1.0])


def test_recall_is_drawn_against_kl() -> None:
    """One labelled point per policy in both, KL the mean over passages; one without a ratio is left out."""
    rows = [
        fidelity("p", (0.0, 1.0), kl_mean=0.2), fidelity("p", (0.0, 1.0), kl_mean=0.4, offset=3),
        fidelity("q", (0.0, 1.0)), fidelity("r", (0.0, 1.0)),
    ]  # fmt: skip

    figure = pictures.trade_figure([recalled("p", 0.5), recalled("q", None), recalled("s", 0.1)], rows)

    assert list(lines(figure).values()) == [([pytest.approx(0.3)], [0.5])]
    assert [text.get_text() for text in figure.axes[0].texts] == ["p"]


def test_nothing_in_common_is_refused() -> None:
    """The message has the policies of both; another kind of limit is another policy."""
    with pytest.raises(SettingsRefused, match=r"limits \(p at 64 slots\) and .* recall \(p at 1.0 MiB\) have none"):
        pictures.trade_figure(
            [recalled("p", 0.5, settings=Terms(cap_bytes=2**20))],
            [fidelity("p", (0.0, 1.0), settings=Terms(slots=64))],
        )


def test_rows_are_read_back(tmp_path: Path) -> None:
    """What was written as JSON comes back as the same rows."""
    rows = (fidelity("p", (0.0, 1.0)), fidelity("q", (0.0,)))
    path = tmp_path / "rows.json"
    path.write_text("[" + ",".join(row.model_dump_json() for row in rows) + "]", encoding="utf-8")

    assert pictures.read_fidelity(path) == rows


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("", encoding="utf-8")

    with pytest.raises(SettingsRefused, match="plot: cannot write into"):
        pictures.save({"drift": pictures.drift_figure([])}, tmp_path / "file")
