"""The fidelity instrument: exact against plain loops, silent on an untouched memory, resumable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.errors import AgentmemError, UnknownPolicy
from agentmem.evaluation import Measurement, Source, Terms, fidelity, rows, stream
from agentmem.evaluation.fidelity import medians
from agentmem.evaluation.full_logits import full_logits, model_digest, passage_key
from agentmem.evaluation.metrics import Divergence
from agentmem.testing import tiny_model
from support import tiny

TOKENS = 240
SLOTS = 64
TERMS = Terms(slots=SLOTS, keep_first=4, keep_recent=8, chunk=48)
POLICIES = ("window", "heavy-hitters", "am-halving")


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny random model."""
    return tiny_model("llama")


@pytest.fixture
def ids() -> torch.Tensor:
    """A passage of random tokens, one more than are streamed."""
    return torch.randint(2, 128, (TOKENS + 1,), generator=torch.Generator().manual_seed(1))


def loop(full: torch.Tensor, capped: torch.Tensor, target: int) -> tuple[float, float, float]:
    """KL(full ‖ capped), and the target's negative log-likelihood: how much more than the full one's, and itself."""

    def log_probabilities(logits: torch.Tensor) -> list[float]:
        values = [float(value) for value in logits]
        total = math.fsum(math.exp(value - max(values)) for value in values)
        return [value - max(values) - math.log(total) for value in values]

    p, q = log_probabilities(full), log_probabilities(capped)
    kl = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    return kl, p[target] - q[target], -q[target]


def test_the_metrics_match_plain_loops() -> None:
    """KL, ΔNLL and agreement equal float64 loops to 1e-12, over the edges of the blocks."""
    generator = torch.Generator().manual_seed(0)
    full, capped = (4 * torch.randn(130, 50, generator=generator) for _ in range(2))
    targets = torch.randint(50, (130,), generator=generator)
    found = Divergence()

    found.add(full[:100], capped[:100], targets[:100], 0)
    found.add(full[100:], capped[100:], targets[100:], 3)

    expected = [loop(full[at], capped[at], int(targets[at])) for at in range(130)]
    assert found.kl == pytest.approx([kl for kl, _, _ in expected], abs=1e-12)
    assert found.delta_nll == pytest.approx([delta for _, delta, _ in expected], abs=1e-12)
    assert found.nll == pytest.approx([loop(capped[at], capped[at], int(targets[at]))[2] for at in range(130)])
    assert found.agrees == [bool(full[at].argmax() == capped[at].argmax()) for at in range(130)]
    assert found.compactions == [0] * 100 + [3] * 30


def test_tiny_differences_are_not_lost() -> None:
    """A change of 1e-4 in one logit gives its KL (about 1e-12) to three digits, where float32 would give noise."""
    full = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0)).double()
    capped = full.clone()
    capped[0, 7] += 1e-4
    found = Divergence()

    found.add(full, capped, torch.tensor([0]), 0)

    p = float(full.softmax(dim=-1)[0, 7])
    assert found.kl[0] == pytest.approx(0.5 * p * (1 - p) * 1e-8, rel=1e-3)


def test_a_logit_that_is_not_finite_is_an_error_with_its_position() -> None:
    """NaN is never averaged: the message names the first bad position of the whole stream."""
    good, bad = torch.zeros(5, 8), torch.zeros(5, 8)
    bad[2, 3] = float("nan")
    found = Divergence()
    found.add(good, good, torch.zeros(5, dtype=torch.int64), 0)

    with pytest.raises(AgentmemError, match="position 7 "):
        found.add(good, bad, torch.zeros(5, dtype=torch.int64), 0)


def test_an_untouched_memory_has_no_divergence(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """Capped memory that never compacts: KL below 1e-9 at every position, every top-1 the same, all counted."""
    (found,) = stream(model, ids, ["full"], Terms(cap_bytes=2**24, chunk=48), cache_dir=tmp_path)
    (row,) = rows([found])

    assert max(map(abs, found.kl)) < 1e-9
    assert (row.top1, row.num_compactions, row.positions) == (1.0, 0, TOKENS)
    assert abs(row.delta_nll) < 1e-6
    assert row.kl_by_compaction == (row.kl_mean,)


def test_the_full_logits_are_one_forward_of_the_model(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """What is kept on disk is what the model says to the whole passage at once."""
    with torch.no_grad():
        expected = model(input_ids=ids[:-1].unsqueeze(0)).logits[0]

    found = full_logits(model, ids, tmp_path)
    again = full_logits(model, ids, tmp_path, progress=lambda _: pytest.fail("computed twice"))

    later = full_logits(model, ids, tmp_path, first=200)

    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(found, again)
    assert later.shape == (TOKENS - 200, 128)
    assert torch.allclose(later, expected[200:], atol=1e-4)


def test_equal_slots_means_equal(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """At 64 slots every policy holds 64, compacts first at token 64, equally often, and is judged from there."""
    measured = list(stream(model, ids, POLICIES, TERMS, cache_dir=tmp_path))

    for each in measured:
        assert (each.capacity, each.held, each.equal) == (SLOTS, SLOTS, "slots")
        assert each.compactions[:SLOTS] == (0,) * SLOTS
        assert each.compactions[SLOTS] == 1
        assert max(map(abs, each.kl[:SLOTS])) < 1e-9
        assert each.compactions == measured[0].compactions
    for row in rows(measured, Source(offset=7)):
        assert 0 < row.compact_seconds < row.seconds
        assert row.seconds_each == row.compact_seconds / row.num_compactions
        assert (row.offset, row.drift) == (7, ())
        assert row.positions == TOKENS - SLOTS
        assert row.kl_mean > 1e-3
        assert len(row.kl_by_compaction) == row.num_compactions + 1


def test_slots_that_a_policy_keeps_free_count(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """Self-study keeps 40 of 64 + 40 slots free to write in: it compacts at token 64, and nothing is read before."""
    terms = TERMS.model_copy(update={"slots": SLOTS + 40, "target": SLOTS // 2, "probe": "self-study"})
    (found,) = stream(
        model, ids, ["am-halving"], terms.model_copy(update={"probe_tokens": 8}), cache_dir=tmp_path,
        tokenizer=tiny.tokenizer,
    )  # fmt: skip

    assert (found.capacity, found.held) == (SLOTS, SLOTS)
    assert found.compactions[SLOTS - 1 : SLOTS + 1] == (0, 1)


def test_equal_bytes_stay_under_the_cap(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """At equal bytes no policy goes over, and a policy without a workspace gets at least as many slots."""
    terms = TERMS.model_copy(update={"slots": None, "cap_bytes": 150_000, "chunk": 16})
    window, matching = stream(model, ids, ["window", "am-halving"], terms, cache_dir=tmp_path)

    assert max(window.bytes, matching.bytes) <= 150_000
    assert window.capacity >= matching.capacity
    first, second = rows([window, matching])
    assert first.positions == second.positions == TOKENS - min(window.capacity, matching.capacity)


def test_a_finished_row_is_found_again(
    model: Any, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time nothing runs, and every number is identical."""
    before = rows(list(stream(model, ids, POLICIES, TERMS, cache_dir=tmp_path)))
    monkeypatch.setattr(fidelity, "measure", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(fidelity, "full_logits", lambda *_, **__: pytest.fail("computed again"))

    assert rows(list(stream(model, ids, POLICIES, TERMS, cache_dir=tmp_path))) == before


def test_a_stopped_comparison_goes_on(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """Stopped inside the second policy, the first is kept and only the others are measured."""

    def stop(name: str, _: int) -> None:
        if name == "heavy-hitters":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(stream(model, ids, POLICIES, TERMS, cache_dir=tmp_path, progress=stop))
    told: list[str] = []
    found = list(stream(model, ids, POLICIES, TERMS, cache_dir=tmp_path, progress=lambda name, _: told.append(name)))

    assert [each.policy for each in found] == list(POLICIES)
    assert set(told) == {"heavy-hitters", "am-halving"}


def test_logits_that_were_stopped_half_way_are_not_taken_for_whole(
    model: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    """A kill while the full logits are written leaves no file of their name."""

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        full_logits(model, ids, tmp_path, progress=stop)

    assert not (tmp_path / "full-logits.f32").exists()
    assert full_logits(model, ids, tmp_path).shape == (TOKENS, 128)


@pytest.mark.parametrize("change", [{"keep_recent": 9}, {"slots": 60}, {"chunk": 47}, {"seed": 1}, {"target": 0.6}])
def test_other_terms_are_measured_anew(
    model: Any, ids: torch.Tensor, tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row is taken for one with other settings."""
    list(stream(model, ids, ["window"], TERMS, cache_dir=tmp_path))
    told: list[str] = []

    other = TERMS.model_copy(update=change)
    list(stream(model, ids, ["window"], other, cache_dir=tmp_path, progress=lambda name, _: told.append(name)))

    assert set(told) == {"window"}


def test_fresh_measures_again(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """``fresh`` ignores what is kept, logits included, and finds the same."""
    (before,) = stream(model, ids, ["window"], TERMS, cache_dir=tmp_path)
    told: list[str] = []
    (after,) = stream(
        model, ids, ["window"], TERMS, cache_dir=tmp_path, fresh=True, progress=lambda name, _: told.append(name)
    )

    assert set(told) == {"full memory", "window"}
    assert after.kl == before.kl


def test_the_probe_is_the_same_for_all_that_probe(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """``probe`` and ``probe_tokens`` reach policies that ask for queries and no others."""
    few = TERMS.model_copy(update={"probe_tokens": 16})
    live = TERMS.model_copy(update={"probe": "live"})
    results = {
        key: list(stream(model, ids, ["window", "am-halving"], terms, cache_dir=tmp_path))
        for key, terms in (("own", TERMS), ("few", few), ("live", live))
    }

    assert len({each[0].kl for each in results.values()}) == 1
    assert len({each[1].kl for each in results.values()}) == 3


def test_a_spec_is_its_own_row(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """A policy with options is labelled by its spec and never taken for the plain one."""
    spec = "am-halving[steps=5,score=max]"
    plain, other = stream(model, ids, ["am-halving", spec], TERMS, cache_dir=tmp_path)

    assert [row.policy for row in rows([plain, other])] == ["am-halving", spec]
    assert plain.kl != other.kl


def test_other_weights_and_other_passages_have_other_keys(model: Any, ids: torch.Tensor) -> None:
    """The key of a passage follows the weights, the numbers' format and the tokens."""
    other = tiny_model("llama", seed=1)
    half = tiny_model("llama", dtype=torch.bfloat16)
    keys = {passage_key(model, ids), passage_key(model, ids[:-1]), passage_key(other, ids), passage_key(half, ids)}

    assert len(keys) == 4
    assert model_digest(model) == model_digest(tiny_model("llama"))


def measurement(policy: str, capacity: int, kl: list[float]) -> Measurement:
    """A hand-made run: from its capacity on there is one compaction."""
    counts = tuple(int(at >= capacity) for at in range(len(kl)))
    return Measurement(
        policy=policy,
        equal="bytes",
        capacity=capacity,
        held=capacity,
        bytes=1,
        seconds=1.0,
        compact_seconds=0.25,
        kl=tuple(kl),
        delta_nll=tuple(2 * value for value in kl),
        agrees=tuple(value < 0.5 for value in kl),
        compactions=counts,
    )


def test_all_rows_are_judged_on_the_same_positions() -> None:
    """A policy that fits more slots is not robbed of the positions at which it still lost nothing."""
    small = measurement("small", 2, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    large = measurement("large", 4, [0.0, 0.0, 0.0, 0.0, 1.0, 1.0])

    first, second = rows([small, large])

    assert (first.kl_mean, second.kl_mean) == (1.0, 0.5)
    assert (first.top1, second.top1) == (0.0, 0.5)
    assert (second.delta_nll, second.kl_p95, second.positions) == (1.0, 1.0, 4)
    assert second.kl_by_compaction == (0.0, 1.0)


def drifting(policy: str, kl: list[float]) -> Measurement:
    """A hand-made run with one more compaction at every second position; ``kl`` has one value per compaction."""
    counts = tuple(count for count in range(len(kl)) for _ in range(2))
    each = tuple(value for value in kl for _ in range(2))
    made = measurement(policy, 2, list(each))
    return made.model_copy(update={"compactions": counts, "equal": "slots"})


def test_drift_is_the_mean_of_eight_compactions_each() -> None:
    """19 compactions: 1 to 8, 9 to 16 and the last three; what came before the first is in none."""
    (row,) = rows([drifting("p", [100.0, *range(1, 20)])])

    assert [(each.first, each.last, each.kl_mean, each.positions) for each in row.drift] == [
        (1, 8, 4.5, 16), (9, 16, 12.5, 16), (17, 19, 18.0, 6),
    ]  # fmt: skip
    assert rows([drifting("p", [0.0] * 16)])[0].drift == ()


def test_medians_are_over_passages() -> None:
    """One line per policy and kind of limit, in order; three passages give the middle one, drift group by group."""
    windows = [[*rows([drifting("p", [0.0] + [scale] * 17), measurement("q", 1, [scale] * 4)])] for scale in (1, 5, 2)]
    found = medians([row for window in windows for row in window])

    assert [(each.policy, each.equal, each.windows) for each in found] == [("p", "slots", 3), ("q", "bytes", 3)]
    assert [each.kl_mean for each in found] == [2.0, 2.0]
    assert [(each.first, each.last, each.kl_mean) for each in found[0].drift] == [
        (1, 8, 2.0), (9, 16, 2.0), (17, 17, 2.0),
    ]  # fmt: skip
    assert found[1].seconds_each == 0.25


def test_an_unknown_policy_is_refused_before_any_work(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """Nothing is computed for the known ones first."""
    with pytest.raises(UnknownPolicy, match="did you mean 'window'"):
        list(stream(model, ids, ["am-halving", "windw"], TERMS, cache_dir=tmp_path))

    assert list(tmp_path.iterdir()) == []
