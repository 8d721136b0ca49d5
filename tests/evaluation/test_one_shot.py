"""One compaction of a document, then its continuation: against plain loops, its baselines, and how it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import agentmem
from agentmem.errors import MemoryCapExceeded, SettingsRefused
from agentmem.evaluation import OneShotRow, Shot, Source, Terms, one_shot
from agentmem.evaluation.one_shot import medians, stream
from agentmem.testing import tiny_model
from support import tiny
from support.shell import agentmem as run
from support.shell import save_model

DOCUMENT, CONTINUATION = 200, 24
TERMS = Terms(keep_first=2, keep_recent=3, chunk=64)
SHOT = Shot(continuation=CONTINUATION, ratios=(5, 20))


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny random model."""
    return tiny_model("llama")


@pytest.fixture
def ids() -> torch.Tensor:
    """Document, continuation, and one token to be predicted."""
    return torch.randint(2, 128, (DOCUMENT + CONTINUATION + 1,), generator=torch.Generator().manual_seed(1))


def kl(full: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL over positions, in plain loops."""
    total = 0.0
    for expected, line in zip(full.double().tolist(), found.double().tolist(), strict=True):
        p_norm, q_norm = (math.log(math.fsum(map(math.exp, values))) for values in (expected, line))
        total += math.fsum(
            math.exp(p - p_norm) * (p - p_norm - q + q_norm) for p, q in zip(expected, line, strict=True)
        )
    return total / len(full)


def stock(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the continuation's tokens, with ``ids`` before and among them and nothing else."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids[:-1][None], use_cache=False).logits[0, -CONTINUATION:]
    return logits


def test_rows_match_what_is_read_by_hand(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """No context, truncation and a policy: the KL of stock logits, and of a memory that is compacted by hand."""
    found = {(row.policy, row.ratio): row for row in stream(model, ids, ["window"], TERMS, SHOT, cache_dir=tmp_path)}
    full = stock(model, ids)

    assert list(found) == [
        ("no-context", None), ("truncation", 5), ("window", 5), ("truncation", 20), ("window", 20),
    ]  # fmt: skip
    assert found["no-context", None].kl_mean == pytest.approx(kl(full, stock(model, ids[DOCUMENT:])), rel=1e-3)
    truncated = stock(model, ids[DOCUMENT - 10 :])
    assert found["truncation", 20].kl_mean == pytest.approx(kl(full, truncated), rel=1e-3)
    settings: dict[str, Any] = {"keep_first": 2, "keep_recent": 3, "target": 10, "mode": "manual", "min_reclaim": 4}
    with agentmem.capped(model, cap="1GiB", policy="window", max_slots=DOCUMENT, **settings) as memory, torch.no_grad():
        model(input_ids=ids[None, :DOCUMENT], past_key_values=memory)
        memory.compact()
        capped = model(input_ids=ids[None, DOCUMENT:-1], past_key_values=memory).logits[0]
    assert found["window", 20].kl_mean == pytest.approx(kl(full, capped), rel=1e-3)


def test_a_row_says_what_was_kept(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """Slots are the document's tokens over the ratio, exactly so many are held, and nothing is compacted again."""
    rows = list(stream(model, ids, ["am-halving", "window"], TERMS, SHOT, cache_dir=tmp_path, source=Source(offset=7)))

    for row in rows:
        assert (row.document, row.positions, row.offset) == (DOCUMENT, CONTINUATION, 7)
        assert row.slots == (0 if row.ratio is None else DOCUMENT // row.ratio)
        if row.policy in ("am-halving", "window"):
            assert row.held == row.slots
            assert 0 < row.compact_seconds < row.seconds
    full_nll = {round(row.nll - row.delta_nll, 6) for row in rows}
    assert len(full_nll) == 1


def test_a_continuation_longer_than_what_was_freed_fits(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """Half of a document of 125 tokens frees 63 slots; a continuation of 99 is read without another compaction."""
    shot = Shot(continuation=99, ratios=(2,))

    row = list(stream(model, ids, ["window"], TERMS, shot, cache_dir=tmp_path))[-1]

    assert (row.document, row.slots, row.positions) == (125, 62, 99)


def test_slots_that_a_policy_keeps_free_are_added(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """Self-study writes into slots of its own: the document still fits whole, and as many are held afterwards."""
    terms = TERMS.model_copy(update={"probe": "self-study", "probe_tokens": 40})
    tokenizer: Any = tiny.tokenizer

    rows = list(stream(model, ids, ["am-halving"], terms, SHOT, cache_dir=tmp_path, tokenizer=tokenizer))

    assert [(row.document, row.slots, row.held) for row in rows if row.policy == "am-halving"] == [
        (DOCUMENT, 40, 40), (DOCUMENT, 10, 10),
    ]  # fmt: skip


def test_a_policy_that_never_compacts_is_refused(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """``full`` leaves no room for the continuation; rows before it are kept."""
    streamed = stream(model, ids, ["full"], TERMS, SHOT, cache_dir=tmp_path)

    with pytest.raises(MemoryCapExceeded, match="never compacts"):
        list(streamed)
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_finished_rows_are_found_again(
    model: Any, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside the third row, the first two are kept; whole, nothing is measured a second time."""

    def stop(name: str, _: int) -> None:
        if name == "window, 1/5":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(stream(model, ids, ["window"], TERMS, SHOT, cache_dir=tmp_path, progress=stop))
    told: list[str] = []
    whole = list(
        stream(model, ids, ["window"], TERMS, SHOT, cache_dir=tmp_path, progress=lambda name, _: told.append(name))
    )
    assert set(told) == {"window, 1/5", "truncation, 1/20", "window, 1/20"}
    monkeypatch.setattr(one_shot, "_measure", lambda *_: pytest.fail("measured again"))

    assert list(stream(model, ids, ["window"], TERMS, SHOT, cache_dir=tmp_path)) == whole


@pytest.mark.parametrize(
    ("terms", "shot", "message"),
    [
        (TERMS, Shot(continuation=224), "continuation: 224 of 224 tokens leaves no document"),
        (TERMS, Shot(continuation=24, ratios=(5, 40)), "1/40 of a document of 200 tokens is 5 slots, but .* need 6"),
    ],
)
def test_what_leaves_nothing_is_refused(
    model: Any, ids: torch.Tensor, tmp_path: Path, terms: Terms, shot: Shot, message: str
) -> None:
    """Before any work: a continuation that is all, a ratio that leaves less than prefix, recent and one slot."""
    with pytest.raises(SettingsRefused, match=message):
        next(stream(model, ids, ["window"], terms, shot, cache_dir=tmp_path))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ratios", [(), (1, 10), (10, 10)])
def test_ratios_that_cannot_work_are_refused(ratios: tuple[int, ...]) -> None:
    """None, one that compacts nothing, one twice."""
    with pytest.raises(SettingsRefused, match="must be different and at least 2"):
        Shot.of(ratios=ratios)


def test_medians_are_over_documents() -> None:
    """One line per ratio and policy, in order."""
    facts: dict[str, Any] = {
        "policy": "p", "offset": 0, "document": 10, "slots": 2, "positions": 4, "kl_p95": 1.0, "top1": 1.0, "nll": 1.0,
        "delta_nll": 0.0, "held": 2, "bytes": 1, "seconds": 1.0, "compact_seconds": 0.5,
    }  # fmt: skip
    rows = [OneShotRow(ratio=ratio, kl_mean=value, **facts) for value in (1.0, 9.0, 2.0) for ratio in (5, 20)]

    assert [(each.ratio, each.windows, each.kl_mean) for each in medians(rows)] == [(5, 3, 2.0), (20, 3, 2.0)]


# ---- the command

KEYS = {
    "policy", "ratio", "offset", "document", "slots", "positions", "kl_mean", "kl_p95", "top1", "nll", "delta_nll",
    "held", "bytes", "seconds", "compact_seconds", "model", "text", "text_sha256", "settings", "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model on disk."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(folder: str, tmp_path: Path) -> list[str]:
    """A small comparison over two documents."""
    text = tmp_path / "text.txt"
    text.write_text("The bees went out at noon and came home at four. " * 20, encoding="utf-8")
    return [
        "eval", "fidelity", "--one-shot", "--model", folder, "--text", str(text), "--tokens", "220", "--ratios", "5,10",
        "--continuation", "20", "--policies", "window,am-halving[steps=4]", "--cache-dir", str(tmp_path / "kept"),
    ]  # fmt: skip


def test_the_command_reports_rows_with_stable_keys(command: list[str], tmp_path: Path) -> None:
    """JSON has one row per document, ratio and policy; the table has medians; the picture is drawn."""
    result = run(*command, "--offset", "0,49", "--json", "-", "--plot", str(tmp_path / "pictures"))

    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert all(row.keys() == KEYS for row in rows)
    assert [(row["offset"], row["policy"], row["ratio"]) for row in rows[:4]] == [
        (0, "no-context", None), (0, "truncation", 5), (0, "window", 5), (0, "am-halving[steps=4]", 5),
    ]  # fmt: skip
    assert len(rows) == 2 * 7
    assert "one compaction of 200 tokens, 20 positions behind it, medians over 2 passages" in result.stderr
    assert "am-halving[steps=4]" in result.stderr
    assert (tmp_path / "pictures" / "one-shot.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_keeps_what_was_measured_before_an_error(command: list[str]) -> None:
    """A policy that never compacts ends the comparison; the rows before it are printed."""
    result = run(*command, "--policies", "window,full")

    assert result.exit_code == 1
    assert "window" in result.stdout
    assert "3 of 7 rows were measured" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--slots", "64"), "--slots: has no meaning with --one-shot"),
        (("--cap", "1MiB", "--target", "0.5"), "--cap, --target: has no meaning with --one-shot"),
        (("--ratios", "10,ten"), "--ratios: '10,ten' is no list of numbers"),
        (("--ratios", "50"), "1/50 of a document of 200 tokens is 4 slots, but keep_first=4 + keep_recent=8 + 1"),
        (("--continuation", "220"), "leaves no document"),
        (("--offset", "900"), "from character 900"),
    ],
)
def test_the_command_refuses_bad_input(command: list[str], arguments: tuple[str, ...], part: str) -> None:
    """Exit code 1 and a line with the value and the remedy."""
    result = run(*command, *arguments)

    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert part in result.stderr


def test_options_of_one_shot_are_refused_without_it(command: list[str]) -> None:
    """Otherwise they would be ignored."""
    result = run(*[each for each in command if each != "--one-shot"])

    assert result.exit_code == 1
    assert "--ratios, --continuation: has no meaning without --one-shot" in result.stderr
