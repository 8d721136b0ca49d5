"""``agentmem eval fidelity``: its rows, its table, and how it goes on after it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.shell import CAP_BYTES, SMALL, agentmem, save_model

ROW_KEYS = {
    "policy", "equal", "offset", "kl_mean", "kl_p95", "top1", "delta_nll", "num_compactions", "held", "bytes",
    "seconds", "compact_seconds", "positions", "capacity", "kl_by_compaction", "drift", "kl_by_tokens", "model", "text",
    "text_sha256", "settings", "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model on disk."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fidelity(folder: str, tmp_path: Path) -> list[str]:
    """A small comparison whose results are kept in this test's own folder."""
    text = tmp_path / "text.txt"
    text.write_text("The bees went out at noon and came home at four. " * 20, encoding="utf-8")
    return [
        "eval", "fidelity", "--model", folder, "--text", str(text), "--tokens", "200", *SMALL,
        "--cache-dir", str(tmp_path / "kept"),
    ]  # fmt: skip


def test_fidelity_reports_rows_with_stable_keys(fidelity: list[str]) -> None:
    """JSON on stdout holds one row per policy and run; the table goes to stderr with both columns."""
    result = agentmem(*fidelity, "--slots", "64", "--cap", "128KiB", "--policies", "window,am-halving", "--json", "-")

    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(row["policy"], row["equal"]) for row in found] == [
        ("window", "slots"), ("am-halving", "slots"), ("window", "bytes"), ("am-halving", "bytes"),
    ]  # fmt: skip
    assert all(row.keys() == ROW_KEYS for row in found)
    assert all(row["bytes"] <= CAP_BYTES for row in found if row["equal"] == "bytes")
    assert all(row["held"] == 64 for row in found if row["equal"] == "slots")
    assert "KL at equal bytes" in result.stderr


def test_fidelity_prints_a_table_and_resumes(fidelity: list[str], tmp_path: Path) -> None:
    """Without --json the table is on stdout; the second time the same numbers come back, seconds included."""
    first = agentmem(*fidelity, "--slots", "64", "--policies", "window", "--json", str(tmp_path / "1.json"))
    second = agentmem(*fidelity, "--slots", "64", "--policies", "window", "--json", str(tmp_path / "2.json"))
    fresh = agentmem(*fidelity, "--slots", "64", "--policies", "window", "--json", str(tmp_path / "3.json"), "--fresh")

    assert first.exit_code == second.exit_code == fresh.exit_code == 0
    assert "equal slots, 64 slots, 136 positions past the cap" in first.stdout
    one, two, three = (json.loads((tmp_path / f"{n}.json").read_text(encoding="utf-8")) for n in (1, 2, 3))
    assert one == two
    assert one[0]["kl_mean"] == three[0]["kl_mean"]
    assert one[0]["seconds"] != three[0]["seconds"]


def test_the_help_shows_how_options_are_written() -> None:
    """Brackets are not taken for markup."""
    shown = agentmem("eval", "fidelity", "--help").stdout

    assert "am-halving[steps=4]" in shown


def test_fidelity_takes_several_passages(fidelity: list[str]) -> None:
    """Every row has its offset, a table stands for each passage, and the last has medians."""
    result = agentmem(*fidelity, "--slots", "64", "--offset", "0,30,10", "--policies", "window", "--json", "-")
    alone = agentmem(*fidelity, "--slots", "64", "--offset", "10", "--policies", "window", "--json", "-")

    assert result.exit_code == alone.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["offset"] for row in found] == [0, 30, 10]
    assert found[2:] == json.loads(alone.stdout)
    assert "positions past the cap, from character 30" in result.stderr
    values = sorted(row["kl_mean"] for row in found)
    assert values[0] < values[1] < values[2]
    assert f"{values[1]:.4f}" in result.stderr.partition("medians over the passages")[2]
    assert "medians" not in alone.stderr


def test_fidelity_takes_several_models_texts_and_limits(fidelity: list[str], folder: str, tmp_path: Path) -> None:
    """Every combination is a row that says what it was made of, and each limit has a table."""
    other = tmp_path / "other.txt"
    other.write_text("The tower clock struck four, and then it struck five. " * 20, encoding="utf-8")
    twin = save_model(tmp_path / "twin")
    more = ("--model", twin, "--text", str(other), "--slots", "64,80", "--cap", "128KiB,160KiB", "--policies", "window")
    result = agentmem(*fidelity, *more, "--plot", str(tmp_path / "p"), "--json", str(tmp_path / "r.json"))

    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert len(found) == len({json.dumps([row["model"], row["text_sha256"], row["settings"]]) for row in found}) == 16
    assert {row["model"] for row in found} == {folder, twin}
    assert {row["text"] for row in found} == {"text.txt", "other.txt"}
    assert {row["settings"]["slots"] or row["settings"]["cap_bytes"] for row in found} == {64, 80, 131072, 163840}
    assert {*found[0]["versions"]} == {"agentmem", "torch", "transformers"}
    assert "equal bytes, 160.0 KiB" in result.stdout
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"drift.png", "kl-tokens.png", "kl-cap.png"}


def test_logits_are_announced_bounded_and_deleted(fidelity: list[str], tmp_path: Path) -> None:
    """Their bytes and place are told before the work, a limit drops the oldest, and a command deletes all of them."""
    kept = tmp_path / "kept"
    command = (*fidelity, "--slots", "64", "--policies", "window")
    first = agentmem(*command, "--cache-limit", "300KiB")
    assert first.exit_code == 0, first.output
    assert f"in {kept}, which keeps at most 300.0 KiB" in " ".join(first.stderr.split())
    (old,) = kept.glob("*/*.f32")
    assert agentmem(*command, "--offset", "9", "--cache-limit", "300KiB").exit_code == 0
    (new,) = kept.glob("*/*.f32")
    assert new != old
    assert agentmem(*command, "--offset", "20", "--cache-limit", "1KiB").exit_code == 1
    cleaned = agentmem("eval", "clean", "--cache-dir", str(kept))
    assert "200.8 KiB" in cleaned.stdout
    assert not list(kept.glob("*/*.f32"))
    assert agentmem(*command).exit_code == 0
    assert not list(kept.glob("*/*.f32"))  # the finished row needs none


def test_fidelity_reports_drift(fidelity: list[str], tmp_path: Path) -> None:
    """From sixteen compactions on there is a table of groups of eight, and a picture with --plot."""
    arguments = ("--tokens", "800", "--slots", "64", "--policies", "window,am-halving[steps=4]")
    result = agentmem(*fidelity, *arguments, "--plot", str(tmp_path / "pictures"), "--json", str(tmp_path / "r.json"))

    assert result.exit_code == 0, result.output
    drift = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))[1]["drift"]
    assert [(group["first"], group["last"]) for group in drift] == [(1, 8), (9, 16), (17, 23)]
    assert "1–8" in result.stdout
    assert all(f"{group['kl_mean']:.4f}" in result.stdout for group in drift)
    assert "am-halving[steps=4]" in result.stdout
    assert (tmp_path / "pictures" / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_fidelity_keeps_what_was_measured_before_an_error(fidelity: list[str]) -> None:
    """A policy that cannot serve the terms is an error; the rows before it are printed and kept."""
    result = agentmem(*fidelity, "--cap", "128KiB", "--policies", "window,full,am-halving", "--json", "-")

    assert result.exit_code == 1
    assert [row["policy"] for row in json.loads(result.stdout)] == ["window"]
    assert "never compacts" in result.stderr
    assert "1 of 3 rows" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--policies", "windw"), ("did you mean 'window'",)),
        (("--policies", ","), ("names no policy",)),
        (("--tokens", "5000"), ("5001 are needed",)),
        (("--offset", "900"), ("from character 900",)),
        (("--offset", "0,900"), ("from character 900",)),
        (("--offset", "0,many"), ("--offset: '0,many' is no list of numbers",)),
        (("--offset", "0,0"), ("must name different numbers",)),
        (("--policies", "window[a"), ("cannot be read",)),
        (("--text", "nowhere.txt"), ("cannot read nowhere.txt",)),
        (("--slots", "9"), ("max_slots: 9",)),
        (("--seed", "99999999999999999999"), ("seed: ", "less than or equal to 18446744073709551615", "got 999")),
        (("--cap", "8KiB"), ("too small",)),
        (("--policies", "window,am-halving", "--slots", "128", "--cap", "8KiB"), ("too small",)),
        (("--json", "."), ("--json: cannot write .",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_fidelity_refuses_bad_input(fidelity: list[str], arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """Exit code 1 and a line with the value and the remedy."""
    result = agentmem(*fidelity, *arguments)

    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "rows were measured" not in result.stderr
    for part in parts:
        assert part in result.stderr
