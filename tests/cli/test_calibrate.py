"""``agentmem calibrate``: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

import pytest

from agentmem import models
from agentmem.hf.fingerprint import fingerprint
from agentmem.policies.budgets.head_table import read_table
from support.shell import agentmem, refused, save_model

SMALL = ("--context", "48", "--ahead", "16", "--keep-first", "4", "--keep-recent", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model on disk."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A page to read."""
    path = tmp_path / "bees.txt"
    path.write_text("The bees went out at noon and came home at four. " * 20, encoding="utf-8")
    return path


@pytest.mark.parametrize("method", ["attention", "fisher"])
def test_a_table_is_written_and_shown(folder: str, text: Path, tmp_path: Path, method: str) -> None:
    """Its largest and smallest shares go to stdout with the table's place; stderr is silent when it is no terminal."""
    out = tmp_path / "table.json"
    options = ["--model", folder, "--text", str(text), "--tokens", "130", "--offset", "3", *SMALL]
    result = agentmem("calibrate", *options, "--method", method, "--samples", "2", "--out", str(out))

    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert f"table: {out}" in result.stdout
    assert "equal shares" in result.stdout
    table, found = read_table(out), json.loads(out.read_text(encoding="utf-8"))
    assert table.method == method
    assert table.model.fingerprint == fingerprint(models.load(folder)[0])
    assert f"{table.head_ceiling:.2f}" in result.stdout
    assert found["text"] == {
        "name": "bees.txt", "sha256": hashlib.sha256(text.read_bytes()).hexdigest(), "offset": 3, "tokens": 130,
    }  # fmt: skip


def test_the_table_has_the_command_that_makes_it(
    folder: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs from the defaults is in it, and no folder but the model's: run beside the text it does the same."""
    out = tmp_path / "table.json"
    options = ["--model", folder, "--text", str(text), "--tokens", "130", *SMALL, "--seed", "3"]
    agentmem("calibrate", *options, "--method", "attention", "--out", str(out))
    words = shlex.split(json.loads(out.read_text(encoding="utf-8"))["command"])
    first = out.read_bytes()
    monkeypatch.chdir(tmp_path)
    result = agentmem(*words[1:])

    assert words[:2] == ["agentmem", "calibrate"]
    assert str(tmp_path) not in " ".join(words).replace(folder, "")
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--tokens", "100000"], "--tokens 100000; lower it"),
        (["--tokens", "20"], "fewer than one window of 640"),
        (["--context", "50"], "leave no segment"),
        (["--seed", "99999999999999999999"], "seed: 99999999999999999999 is beyond"),
        ([*SMALL, "--policy", "wndow"], "policy 'wndow' is unknown"),
        (["--out", "{text}/t.json"], "cannot write"),
    ],
)
def test_refusals_are_one_line(folder: str, text: Path, tmp_path: Path, options: list[str], fault: str) -> None:
    """A text that is too short, terms that cannot work, a place that cannot be written: exit code 1 and the remedy."""
    given = [option.format(text=text) for option in options]
    result = agentmem("calibrate", "--model", folder, "--text", str(text), "--out", str(tmp_path / "t.json"), *given)

    refused(result, fault)
