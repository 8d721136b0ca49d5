"""Calibration: what the three methods measure, what they come to, and how a stopped one goes on."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem import plugins
from agentmem.calibration import Origin, Terms, calibrate, run
from agentmem.calibration.attention import rms_weights
from agentmem.calibration.fisher import window_curves
from agentmem.calibration.loss import head_curve
from agentmem.calibration.methods import Attention, Fisher, Loss
from agentmem.calibration.run import Team
from agentmem.calibration.shares import slot_gains, top_shares
from agentmem.calibration.windows import Window, cut
from agentmem.contracts import ModelIdentity
from agentmem.errors import AgentmemError, SettingsRefused
from agentmem.hf.capture import reading
from agentmem.hf.fingerprint import fingerprint
from agentmem.policies.budgets.head_table import read_table
from agentmem.policies.budgets.registry import by_name
from agentmem.testing import tiny_model

TERMS = Terms(context=48, ahead=16, keep_first=4, keep_recent=8, fractions=(0.1, 0.3, 0.6), samples=2)
ORIGIN = Origin("a text", "0" * 64, 0, 130, "agentmem calibrate --out table.json")


def ids(count: int, seed: int = 0) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(seed))


# ---- from scores and curves to shares


def test_scores_are_the_rms_of_local_weights() -> None:
    """The mean of squared softmax weights over all query vectors, in plain loops."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 3, 4, generator=generator), torch.randn(5, 4, generator=generator)
    expected = [0.0] * 5
    for query in queries.flatten(0, 1).tolist():
        masses = [math.exp(0.5 * sum(a * b for a, b in zip(query, key, strict=True))) for key in keys.tolist()]
        for slot, mass in enumerate(masses):
            expected[slot] += (mass / sum(masses)) ** 2 / 6

    assert rms_weights(queries, keys, 0.5).tolist() == pytest.approx([math.sqrt(each) for each in expected], rel=1e-5)


def test_top_shares_count_the_highest() -> None:
    """Slots among the highest of all, per equal share, averaged over the ratios; of equal ones the earlier head's."""
    worth = [torch.tensor([9.0, 8.0, 7.0, 1.0]), torch.tensor([6.0, 1.0, 1.0, 1.0])]

    assert top_shares(worth, [0.25]) == [2.0, 0.0]
    assert top_shares(worth, [0.5]) == [1.5, 0.5]
    assert top_shares(worth, [0.25, 0.5]) == [1.75, 0.25]


def test_gains_are_the_steps_of_a_convex_curve_below_the_measured_one() -> None:
    """They never rise, add up to the error at no slot, and where the curve is convex they are its own steps."""
    convex = slot_gains([0.1, 0.5], [1.0, 0.01], 20)
    bumpy = slot_gains([0.1, 0.5, 0.8], [1.0, 0.9, 0.1], 20)
    at_zero = 1.0 * (1.0 / 0.01) ** (0.1 / 0.4)

    assert len(convex) == len(bumpy) == 20
    assert bool((convex.diff() <= 1e-12).all())
    assert bool((bumpy.diff() <= 1e-12).all())
    assert float(convex.sum()) == pytest.approx(at_zero)
    assert float(convex[:2].sum()) == pytest.approx(at_zero - 1.0)
    assert float(convex[:10].sum()) == pytest.approx(at_zero - 0.01)


# ---- the methods


@pytest.fixture(scope="module")
def bench() -> Any:
    """One window of a random model with four layers and sharp attention."""
    model = tiny_model("llama", num_hidden_layers=4)
    terms = replace(TERMS, method="fisher", samples=64, context=64, ahead=32)
    with reading(model, [None] * 4) as reader:
        yield Window(reader, ids(96), terms)


def test_fisher_predicts_the_measured_loss(bench: Window) -> None:
    """Of every head at the larger budgets, within a factor of two; and it ranks heads as the measurement does."""
    compactor = plugins.policy("am-halving").compactor
    assert compactor is not None
    predicted = torch.tensor(window_curves(bench, range(4), compactor))
    measured = torch.tensor([head_curve(bench, layer, head, compactor) for layer in range(4) for head in range(2)])
    ratio = predicted[:, 1:] / measured[:, 1:]

    assert bool(((ratio > 0.5) & (ratio < 2)).all()), ratio
    assert float(torch.corrcoef(torch.stack([predicted[:, 0], measured[:, 0]]))[0, 1]) > 0.9


def test_attention_gives_slots_to_the_head_that_looks_widely() -> None:
    """A head whose attention is spread over all slots has lower weights than one that looks at few, and fewer slots."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_decoder().layers[0].self_attn.k_proj.weight[:16].mul_(0.0)  # KV head 0 sees all slots alike
    with reading(model, [None, None]) as reader:
        shares = Attention(reader, ids(48), TERMS, {0: 2, 1: 2}).measure("0")

    assert sum(shares) == pytest.approx(4)
    assert shares[0] < 0.1 < shares[1]


def test_windows_lie_one_after_the_other() -> None:
    """Attention needs the contexts alone; what fills no window is left out; none at all is refused."""
    text = torch.arange(150)

    assert [window.tolist()[0] for window in cut(text, TERMS)] == [0, 48, 96]
    assert [len(window) for window in cut(text, replace(TERMS, method="fisher"))] == [64, 64]
    with pytest.raises(SettingsRefused, match="40 tokens are fewer than one window of 48"):
        cut(text[:40], TERMS)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"method": "guess"}, "choose one of attention, fisher, loss"),
        ({"context": 12}, "give at least 13"),
        ({"samples": 0}, "samples: 0"),
        ({"ratios": (0.5, 0.25)}, "do not rise"),
        ({"fractions": (0.5, 1.0)}, "do not rise"),
    ],
)
def test_terms_that_cannot_work_are_refused(changes: dict[str, Any], fault: str) -> None:
    """Before any work."""
    with pytest.raises(SettingsRefused, match=fault):
        replace(TERMS, **changes)


def test_a_policy_without_a_compactor_cannot_be_measured(tmp_path: Path) -> None:
    """Its losses are none, nor can one be that lives on attention received before; scores need no policy."""
    model = tiny_model("llama")

    with pytest.raises(SettingsRefused, match="'heavy-hitters' keeps slots by the attention received"):
        made(model, tmp_path / "t.json", method="loss", policy="heavy-hitters")

    with pytest.raises(SettingsRefused, match="'full' never compacts, so 'fisher' has nothing to measure"):
        made(model, tmp_path / "t.json", method="fisher", policy="full")
    assert made(model, tmp_path / "t.json", policy="full")["method"] == "attention"


# ---- from beginning to end


def made(model: Any, out: Path, progress: Callable[[int, int], None] | None = None, **changes: Any) -> dict[str, Any]:
    """A table of two windows, or of as many as fit."""
    fresh = changes.pop("fresh", False)
    terms = replace(TERMS, **changes)
    told = progress or (lambda _done, _all: None)
    return calibrate(model, ids(130), terms, ORIGIN, name="tiny", out=out, fresh=fresh, progress=told)


def test_other_compactors_are_measured_by_name(tmp_path: Path) -> None:
    """One that fits nothing, and one with a score column; their losses are not those of Attention Matching."""
    model = tiny_model("llama")
    window, carried, plain = (
        made(model, tmp_path / "t.json", method="fisher", policy=policy)["curves"]["errors"]
        for policy in ("window", "am-halving[carry=0.5]", "am-halving")
    )

    assert window != plain == carried
    assert sum(curve[0] for layer in window for curve in layer) > sum(curve[0] for layer in plain for curve in layer)


@pytest.mark.parametrize("method", ["attention", "fisher", "loss"])
def test_a_table_is_made_read_and_dealt_by(tmp_path: Path, method: str) -> None:
    """The policies read what calibration writes: shares with a mean of 1, curves that never rise, the provenance."""
    model, out = tiny_model("llama"), tmp_path / "deep" / "table.json"
    table = made(model, out, method=method, fractions=(0.2, 0.5))
    found = read_table(out)
    identity = ModelIdentity("here", fingerprint(model), (2, 2))

    assert found.model == replace(identity, name="tiny")
    assert sum(map(sum, found.shares)) / 4 == pytest.approx(1, abs=1e-3)
    assert table["command"] == ORIGIN.command
    assert table["settings"]["context"] == 48
    assert json.loads(out.read_text(encoding="utf-8")) == table
    assert list(out.parent.iterdir()) == [out]
    for curve in itertools.chain(*found.errors):
        assert list(curve) == sorted(curve, reverse=True)
    for name in ["calibrated"] if method == "attention" else ["calibrated", "sensitivity"]:
        by_name(name, table=out).check(identity)
    assert bool(found.errors) == (method != "attention")


def test_only_layers_that_are_compacted_are_in_the_table(tmp_path: Path) -> None:
    """Sliding layers have no shares."""
    model = tiny_model(
        "gemma3_text", num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"]
    )

    assert made(model, tmp_path / "t.json")["model"]["kv_heads"] == [2, 2]


@pytest.mark.parametrize("method", ["fisher", "loss"])
def test_a_stopped_calibration_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Nothing is measured twice, the table is that of a calibration in one go, and the model is as it was."""
    model, changes = tiny_model("llama"), {"method": method, "fractions": (0.3,)}
    whole = made(model, tmp_path / "whole.json", **changes)

    def stop(done: int, _: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(model, tmp_path / "t.json", stop, **changes)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "t.json").exists()
    progress: list[tuple[int, int]] = []
    measured: list[str] = []
    work = {"fisher": Fisher, "loss": Loss}[method]
    measure = work.measure
    monkeypatch.setattr(work, "measure", lambda self, unit: measured.append(unit) or measure(self, unit))
    table = made(model, tmp_path / "t.json", lambda *now: progress.append(now), **changes)

    units = 2 if method == "fisher" else 8
    assert progress == [(done, units) for done in range(1, units + 1)]
    assert len(measured) == units - 1
    assert table["shares"] == whole["shares"]
    assert table["curves"] == whole["curves"]


def test_what_was_measured_under_other_terms_is_not_used(tmp_path: Path) -> None:
    """Another seed of the same method begins anew, and so does --fresh."""
    model = tiny_model("llama")

    def stopped_after_one(done: int, _: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    for changes in ({"seed": 1}, {"fresh": True}):
        with pytest.raises(KeyboardInterrupt):
            made(model, tmp_path / "t.json", stopped_after_one)
        progress: list[tuple[int, int]] = []
        made(model, tmp_path / "t.json", lambda *now: progress.append(now), **changes)  # noqa: B023  # called at once
        assert progress[0] == (0, 2)
        assert list(tmp_path.iterdir()) == [tmp_path / "t.json"]


def test_several_processes_share_the_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measures its own and all read what the others wrote: the table is that of one process."""
    model, changes = tiny_model("llama"), {"method": "loss", "fractions": (0.3,)}
    alone = made(model, tmp_path / "alone.json", **changes)
    measured: dict[int, list[str]] = {0: [], 1: []}

    def join(rank: int) -> None:
        def put(self: Any, unit: str, value: object) -> None:
            measured[rank].append(unit)
            original(self, unit, value)

        monkeypatch.setattr(run.Partial, "put", put)
        monkeypatch.setattr(Team, "joined", lambda: Team(rank, 2))

    original = run.Partial.put
    join(1)
    with pytest.raises(KeyError):  # in earnest it waits for the other
        made(model, tmp_path / "t.json", **changes)
    join(0)
    table = made(model, tmp_path / "t.json", **changes)

    assert len(measured[0]) == len(measured[1]) == 4
    assert not set(measured[0]) & set(measured[1])
    assert (table["shares"], table["curves"]) == (alone["shares"], alone["curves"])
    assert not list(tmp_path.glob("*.partial-*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """With the option that chooses another."""
    (tmp_path / "file").write_text("in the way", encoding="utf-8")

    with pytest.raises(AgentmemError, match=r"cannot write .*file.*--out"):
        made(tiny_model("llama"), tmp_path / "file" / "t.json")


def test_drawing_is_seeded_and_global_randomness_untouched(tmp_path: Path) -> None:
    """The same seed gives the same curves, another gives others; torch's own generator is where it was."""
    model, state = tiny_model("llama"), torch.get_rng_state()
    one, same, other = (
        made(model, tmp_path / f"{index}.json", method="fisher", seed=seed)["curves"]
        for index, seed in enumerate((0, 0, 1))
    )

    assert one == same
    assert one != other
    assert torch.equal(torch.get_rng_state(), state)
