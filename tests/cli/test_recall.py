"""``agentmem eval recall``: its rows, its tables, its pictures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentmem import evaluation
from agentmem.contracts import Policy
from agentmem.errors import MemoryCapExceeded
from support.shell import agentmem, refused, save_model

SCORE = {"facts", "exact", "log_prob", "log_prob_per_token", "recovered"}
KEYS = SCORE | {
    "policy", "equal", "documents", "by_depth", "by_format", "by_compactions", "num_compactions", "total_compactions",
    "capacity", "held", "bytes", "seconds", "compact_seconds", "model", "text", "text_sha256", "offset", "settings",
    "versions",
}  # fmt: skip
CHUNK = ("--keep-first", "4", "--keep-recent", "8", "--chunk", "256")
"""Questions of one token per byte are long."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model on disk."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text of short sentences."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"It was hour {hour} of the day." for hour in range(80)), encoding="utf-8")
    return str(path)


@pytest.fixture
def recall(folder: str, text: str, tmp_path: Path) -> list[str]:
    """Two documents of two facts each."""
    return [
        "eval", "recall", "--model", folder, "--text", text, "--tokens", "500", "--facts", "3", "--depths", "0.1,0.5",
        "--cache-dir", str(tmp_path / "kept"), *CHUNK,
    ]  # fmt: skip


def test_recall_reports_rows_with_stable_keys(recall: list[str]) -> None:
    """JSON has full memory, window and every policy for each kind of limit; groups are keyed by what they group."""
    limits = ("--slots", "300", "--cap", "1MiB")
    result = agentmem(*recall, *limits, "--policies", "window", "--json", "-")

    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(row["policy"], row["equal"]) for row in found] == [
        ("full", "slots"), ("window", "slots"), ("full", "bytes"), ("window", "bytes"),
    ]  # fmt: skip
    for row in found:
        assert row.keys() == KEYS
        assert (row["facts"], row["documents"]) == (4, 2)
        assert list(row["by_depth"]) == ["0.1", "0.5"]
        assert all(score.keys() == SCORE for score in row["by_depth"].values())
    assert set(found[0]["by_format"]) == {"codes", "names", "lists"}
    assert "equal slots, 300 slots, 4 facts in 2 documents" in result.stderr
    assert result.stderr.count("recovered (exact), by compactions since the fact") == 1  # 1 MiB holds a document


def test_recall_draws_and_resumes(recall: list[str], tmp_path: Path, folder: str, text: str) -> None:
    """Pictures of recall by depth and against KL; the second time the same numbers come back, seconds included."""
    fidelity = tmp_path / "fidelity.json"
    policies = ("--slots", "300", "--policies", "window,am-halving[steps=4]")
    measured = agentmem(
        "eval", "fidelity", "--model", folder, "--text", text, "--tokens", "500", *policies, *CHUNK,
        "--cache-dir", str(tmp_path / "kept"), "--json", str(fidelity),
    )  # fmt: skip
    assert measured.exit_code == 0, measured.output
    plot = ("--plot", str(tmp_path / "pictures"), "--fidelity-json", str(fidelity))

    first = agentmem(*recall, *policies, "--json", str(tmp_path / "1.json"), *plot)
    second = agentmem(*recall, *policies, "--json", str(tmp_path / "2.json"))

    assert first.exit_code == second.exit_code == 0, first.output
    assert "am-halving[steps=4]" in first.stdout
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    for name in ("recall", "kl-recall"):
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_recall_shows_what_is_whole_before_an_error(recall: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails while it is measured is an error; finished policies are printed and kept."""
    policies = ("--slots", "300", "--policies", "heavy-hitters,am-halving", "--probe", "repeat")
    result = agentmem(*recall, *policies)
    measure = evaluation.recall.measure

    def broken(model: Any, document: Any, policy: Policy, *arguments: Any, **options: Any) -> Any:
        if policy.name == "keydiff":
            raise MemoryCapExceeded("it is full")
        return measure(model, document, policy, *arguments, **options)

    monkeypatch.setattr(evaluation.recall, "measure", broken)
    failed = agentmem(*recall, "--slots", "300", "--policies", "heavy-hitters,keydiff", "--probe", "repeat")

    assert result.exit_code == 0, result.output
    assert failed.exit_code == 1
    assert "it is full" in failed.stderr
    assert "heavy-hitters" in failed.stdout
    assert "6 of 8 rows were measured; the same command goes on there" in failed.stderr


@pytest.mark.parametrize(
    ("limits", "part"),
    [
        (("--policies", "full", "--slots", "20"), "max_slots: 20 is below"),
        (("--policies", "window", "--cap", "8KiB"), "too small"),
        (("--policies", "window", "--slots", "300", "--cap", "8KiB"), "too small"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_recall_plans_every_policy_before_it_measures_one(
    recall: list[str], monkeypatch: pytest.MonkeyPatch, limits: tuple[str, ...], part: str
) -> None:
    """Window's limits too, which is always measured; nothing is said of rows, for there is nothing to go on from."""
    monkeypatch.setattr(evaluation.recall, "measure", pytest.fail)

    refused(agentmem(*recall, *limits), part)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--policies", "am-halving[stepps=1]"), "did you mean 'steps'"),
        (("--policies", ","), "names no policy"),
        (("--depths", "0.5,x"), "--depths: '0.5,x' is no list of numbers"),
        (("--depths", "0.5,0.2"), "must ascend"),
        (("--seed", "-9223372036854775809"), "seed: Input should be greater than or equal to -9223372036854775808"),
        (("--depths", "0.001"), "inside the prefix of 4"),
        (("--formats", "riddles"), "'codes', 'names' or 'lists'"),
        (("--tokens", "5000"), "a document takes 5000"),
        (("--offset", "2000"), "from character 2000"),
        (("--text", "nowhere.txt"), "cannot read nowhere.txt"),
        (("--json", "."), "--json: cannot write ."),
        (("--fidelity-json", "nowhere.json"), "it needs --plot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_recall_refuses_bad_input(recall: list[str], arguments: tuple[str, ...], part: str) -> None:
    """Exit code 1 and a line with the value and the remedy, before any work."""
    result = agentmem(*recall, *arguments)

    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert part in result.stderr


def test_a_file_that_is_no_fidelity_is_refused(recall: list[str], tmp_path: Path) -> None:
    """A missing file, one with other rows, and one without a policy in common."""
    plot = ("--slots", "300", "--policies", "window", "--plot", str(tmp_path / "pictures"), "--fidelity-json")
    other = tmp_path / "other.json"
    other.write_text('[{"policy": "p"}]', encoding="utf-8")
    empty = tmp_path / "empty.json"
    empty.write_text("[]", encoding="utf-8")

    assert "cannot read" in agentmem(*recall, *plot, str(tmp_path / "nowhere.json")).stderr
    assert "holds no rows of `agentmem eval fidelity --json`: 0.equal: Field required" in (
        agentmem(*recall, *plot, str(other)).stderr
    )
    assert "have none in common" in agentmem(*recall, *plot, str(empty)).stderr


def test_fidelity_rows_of_another_limit_are_refused_before_any_work(
    recall: list[str], tmp_path: Path, folder: str, text: str
) -> None:
    """Rows at other slots draw no picture with these, which is said before the model is loaded."""
    rows = tmp_path / "rows.json"
    measured = agentmem(
        "eval", "fidelity", "--model", folder, "--text", text, "--tokens", "500", "--slots", "200", *CHUNK,
        "--policies", "window", "--cache-dir", str(tmp_path / "kept"), "--json", str(rows),
    )  # fmt: skip
    assert measured.exit_code == 0, measured.output
    plot = ("--plot", str(tmp_path / "pictures"), "--fidelity-json", str(rows))
    result = agentmem(*recall, "--model", "nowhere", "--slots", "300", "--policies", "window", *plot)

    assert result.exit_code == 1
    assert "(window at 200 slots)" in result.stderr
    assert "have none in common" in result.stderr
