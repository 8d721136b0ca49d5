"""The fidelity instrument: exact against plain loops, silent on an untouched memory, resumable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.errors import AgentmemError, SettingsRefused, UnknownPolicy
from agentmem.evaluation import Measurement, Terms, default_text, fidelity, passage, read_text, rows, stream
from agentmem.evaluation.full_logits import fingerprint, full_logits, passage_key
from agentmem.evaluation.metrics import Divergence
from agentmem.testing import tiny_model

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


def loop(full: torch.Tensor, capped: torch.Tensor, target: int) -> tuple[float, float]:
    """KL(full ‖ capped) and the difference of the target's negative log-likelihood, by hand."""

    def log_probabilities(logits: torch.Tensor) -> list[float]:
        values = [float(value) for value in logits]
        total = math.fsum(math.exp(value - max(values)) for value in values)
        return [value - max(values) - math.log(total) for value in values]

    p, q = log_probabilities(full), log_probabilities(capped)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)), p[target] - q[target]


def test_the_metrics_match_plain_loops() -> None:
    """KL, ΔNLL and agreement equal float64 loops to 1e-12, over the edges of the blocks."""
    generator = torch.Generator().manual_seed(0)
    full, capped = (4 * torch.randn(130, 50, generator=generator) for _ in range(2))
    targets = torch.randint(50, (130,), generator=generator)
    found = Divergence()

    found.add(full[:100], capped[:100], targets[:100], 0)
    found.add(full[100:], capped[100:], targets[100:], 3)

    expected = [loop(full[at], capped[at], int(targets[at])) for at in range(130)]
    assert found.kl == pytest.approx([kl for kl, _ in expected], abs=1e-12)
    assert found.delta_nll == pytest.approx([delta for _, delta in expected], abs=1e-12)
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

    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(found, again)


def test_equal_slots_means_equal(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """At 64 slots every policy holds 64, compacts first at token 64, equally often, and is judged from there."""
    measured = list(stream(model, ids, POLICIES, TERMS, cache_dir=tmp_path))

    for each in measured:
        assert (each.capacity, each.held, each.equal) == (SLOTS, SLOTS, "slots")
        assert each.compactions[:SLOTS] == (0,) * SLOTS
        assert each.compactions[SLOTS] == 1
        assert max(map(abs, each.kl[:SLOTS])) < 1e-9
        assert each.compactions == measured[0].compactions
    for row in rows(measured):
        assert row.positions == TOKENS - SLOTS
        assert row.kl_mean > 1e-3
        assert len(row.kl_by_compaction) == row.num_compactions + 1


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


def test_other_weights_and_other_passages_have_other_keys(model: Any, ids: torch.Tensor) -> None:
    """The key of a passage follows the weights, the numbers' format and the tokens."""
    other = tiny_model("llama", seed=1)
    half = tiny_model("llama", dtype=torch.bfloat16)
    keys = {passage_key(model, ids), passage_key(model, ids[:-1]), passage_key(other, ids), passage_key(half, ids)}

    assert len(keys) == 4
    assert fingerprint(model) == fingerprint(tiny_model("llama"))


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


def test_an_unknown_policy_is_refused_before_any_work(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """Nothing is computed for the known ones first."""
    with pytest.raises(UnknownPolicy, match="did you mean 'window'"):
        list(stream(model, ids, ["am-halving", "windw"], TERMS, cache_dir=tmp_path))

    assert list(tmp_path.iterdir()) == []


class Characters:
    """A tokenizer: one token per character."""

    def __call__(self, text: str, **_: object) -> dict[str, torch.Tensor]:
        """Code points."""
        return {"input_ids": torch.tensor([[ord(character) for character in text]])}


def test_a_passage_begins_at_the_offset() -> None:
    """Offset counts characters; one token more than asked for is returned, to be predicted."""
    found = passage(Characters(), "abcdefgh", offset=2, tokens=3)  # type: ignore[arg-type]

    assert "".join(map(chr, found.tolist())) == "cdef"


@pytest.mark.parametrize(("offset", "tokens"), [(0, 8), (6, 2), (100, 1), (0, 0), (-1, 2)])
def test_a_text_that_is_too_short_is_refused(offset: int, tokens: int) -> None:
    """The message has both numbers."""
    with pytest.raises(SettingsRefused, match=str(tokens)):
        passage(Characters(), "abcdefgh", offset=offset, tokens=tokens)  # type: ignore[arg-type]


def test_the_shipped_text_is_there() -> None:
    """A few pages of plain prose, enough for the default number of tokens."""
    text = default_text()

    assert 20_000 < len(text) < 26_000
    assert text.isascii()


def test_bad_texts_are_refused(tmp_path: Path) -> None:
    """A missing file and one that is not UTF-8 are refused by name."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")

    with pytest.raises(SettingsRefused, match=r"nowhere\.txt"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(SettingsRefused, match="0xe9 at 3"):
        read_text(tmp_path / "latin.txt")
