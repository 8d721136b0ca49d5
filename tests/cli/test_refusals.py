"""Bad input and Ctrl-C on the command line: what to do and what was done so far, an exit code, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from agentmem.cli.display import Display
from agentmem.cli.run.prompt import read_prompt
from agentmem.errors import SettingsRefused
from agentmem.reporting.trace import read_trace
from agentmem.testing import tiny_model
from support import forked
from support.shell import CAP, SMALL, agentmem, refused, save_model, save_tokenizer
from support.waiting import LIMIT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model on disk."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--cap", "8KiB", "--prompt", "x"), ("a cap of 8.0 KiB (8192 bytes) is too small", "need", "raise cap")),
        (("--cap", "lots", "--prompt", "x"), ("'lots'", "'24MiB'")),
        (("--cap", "-5", "--prompt", "x"), ("-5",)),
        (("--policy", "am-halvin", "--prompt", "x"), ("'am-halvin' is unknown", "did you mean 'am-halving'")),
        (("--policy", "window", "--probe", "replay", "--prompt", "x"), ("'window' has no option 'probe'",)),
        (("--probe", "echo", "--prompt", "x"), ("'am-halving': probe: 'echo' is unknown; choose from replay",)),
        (("--probe", "replay+", "--prompt", "x"), ("probe: cannot read ''", "replay:3+spread")),
        (("--probe", "replay:0", "--prompt", "x"), ("the share of 'replay' is 0.0",)),
        (("--probe", "focus", "--prompt", "x"), ("'focus' needs a text",)),
        (("--target", "1.5", "--prompt", "x"), ("target: 1.5",)),
        (
            ("--seed", "99999999999999999999", "--prompt", "x"),
            ("seed: ", "equal to 18446744073709551615", "got 999"),
        ),
        (("--prompt", "  \n"), ("--prompt is empty",)),
        (("--prompt-file", "nowhere.txt"), ("cannot read nowhere.txt",)),
        (("--prompt", "x", "--device", "abacus"), ("device: 'abacus' cannot be used here", "give cpu")),
        (("--prompt", "x", "--json", "."), ("--json: cannot write .",)),
        (("--prompt", "x", "--trace", "."), ("trace: cannot write .",)),
    ],
    ids=lambda value: " ".join(value)[:40].strip() if isinstance(value, tuple) else None,
)
def test_bad_input_is_refused(folder: str, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """Exit code 1 and a line with the value and the remedy."""
    refused(agentmem("run", "--model", folder, *SMALL, *arguments), *parts)


def test_pictures_that_cannot_be_kept_are_refused_before_the_work(folder: str, tmp_path: Path) -> None:
    """Not after it: nothing is generated, and no report is left."""
    blocked = tmp_path / "file"
    blocked.touch()
    paths = ("--plot", str(blocked), "--json", str(tmp_path / "r.json"))

    refused(agentmem("run", "--model", folder, *CAP, *SMALL, *paths, "--prompt", "x"), "--plot: cannot write into")
    assert not (tmp_path / "r.json").exists()


def test_pictures_that_fail_after_the_work_lose_nothing_else(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full by then: the report and the table are there, and the exit code is 1."""

    def full(*_: object) -> None:
        raise SettingsRefused("plot: cannot write into it: No space left on device")

    monkeypatch.setattr("agentmem.cli.run.command.draw", full)
    paths = ("--plot", str(tmp_path), "--json", str(tmp_path / "r.json"), "--max-new-tokens", "5")
    result = agentmem("run", "--model", folder, *CAP, *SMALL, *paths, "--prompt", "x")

    assert result.exit_code == 1
    assert "No space left" in result.stderr
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["pictures"] == []
    assert "peak, workspace included" in result.stdout


def test_bad_prompts_are_refused(folder: str, tmp_path: Path) -> None:
    """Bytes that are not UTF-8, from stdin or a file, and empty stdin."""
    (tmp_path / "prompt.txt").write_bytes(b"ab\xff\xfe")

    refused(agentmem("run", "--model", folder, "-", stdin=b"ab\xff\xfe"), "stdin is not UTF-8", "0xff at 2")
    refused(agentmem("run", "--model", folder, "--prompt-file", str(tmp_path / "prompt.txt")), "is not UTF-8")
    refused(agentmem("run", "--model", folder, stdin=""), "stdin is empty")


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    """A folder that is not there, one without a model, and a default model that was not fetched."""
    refused(agentmem("run", "--prompt", "x", "--model", str(tmp_path / "none")), "does not exist")
    refused(agentmem("run", "--prompt", "x", "--model", str(tmp_path)), "cannot be loaded")
    refused(agentmem("run", "--prompt", "x"), "agentmem model fetch")
    refused(agentmem("model", "path"), "agentmem model fetch")
    refused(agentmem("plan", "--model", str(tmp_path / "none")), "does not exist")


def test_a_policy_that_never_compacts_ends_at_the_cap_with_its_report(folder: str, tmp_path: Path) -> None:
    """``full`` is refused in mid-run: exit code 1, but text, report and trace of what was done are there."""
    result = agentmem(
        "run", "--model", folder, *CAP, *SMALL, "--policy", "full", "--max-new-tokens", "400", "--prompt", "hello",
        "--ignore-eos", "--json", str(tmp_path / "r.json"), "--trace", str(tmp_path / "t.jsonl"),
    )  # fmt: skip

    assert result.exit_code == 1
    assert "never compacts" in result.stderr
    assert "Traceback" not in result.stderr
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert report["finish"] == "failed"
    assert "never compacts" in report["error"]
    assert report["num_new_tokens"] > 50
    assert read_trace(tmp_path / "t.jsonl").points


def test_nan_logits_are_an_error_that_names_the_step(tmp_path: Path) -> None:
    """A model that overflows is not decoded on."""
    model = tiny_model("llama", vocab_size=257, eos_token_id=0, bos_token_id=0)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    save_tokenizer(tmp_path / "broken")

    result = agentmem("run", "--model", str(tmp_path / "broken"), *CAP, *SMALL, "--prompt", "x", "--json", "-")

    assert result.exit_code == 1
    assert "step 1: the model's logits are NaN" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--no-such-option"),
        ("run", "--max-new-tokens", "0", "--prompt", "x"),
        ("run", "--prompt", "x", "--prompt-file", "y"),
        ("run", "surprise"),
        ("no-such-command",),
        ("eval", "fidelity", "--tokens", "many"),
        ("plan", "--rows", "0"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    """Usage errors are told apart from refused input."""
    result = agentmem(*arguments)

    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [("run", "--prompt", "x"), ("chat",)], ids=" ".join)
@pytest.mark.parametrize("temperature", ["1e-45", "1e-38"])
def test_too_small_a_temperature_is_wrong_usage(folder: str, command: tuple[str, ...], temperature: str) -> None:
    """Wrong usage, with the value, the limit and what is meant instead; the least that is taken samples."""
    given = (*command, "--model", folder, "--cap", "4MiB", "--max-new-tokens", "3", "--temperature")
    result, least = agentmem(*given, temperature, stdin="hello\n"), agentmem(*given, "1e-30", stdin="hello\n")

    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("│", " ").split())
    assert f"{float(temperature)} is too small to divide logits by; give at least 1e-30, or 0" in said
    assert least.exit_code == 0, least.output


def test_no_prompt_on_a_terminal_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left waiting in front of a silent terminal."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))

    with pytest.raises(typer.BadParameter, match="--prompt TEXT"):
        read_prompt(None, None, None)


# ---- Ctrl-C


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_with_the_report_so_far(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Once ends after the running token, twice at once: exit code 130, everything written, SIGINT given back."""
    count = Display.token

    def interrupted(self: Display) -> None:
        count(self)
        if self.tokens == 200:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Display, "token", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = agentmem(
        "run", "--model", folder, *CAP, *SMALL, "--max-new-tokens", "5000", "--prompt", "hello", "--ignore-eos",
        "--json", str(tmp_path / "r.json"), "--trace", str(tmp_path / "t.jsonl"), "--plot", str(tmp_path),
    )  # fmt: skip

    assert result.exit_code == 130, result.output
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert report["finish"] == "interrupted"
    assert report["num_new_tokens"] in (200, 201)
    assert report["num_compactions"] >= 1
    assert read_trace(tmp_path / "t.jsonl").compactions
    assert (tmp_path / "bytes.png").exists()
    assert "generated (interrupted)" in result.stdout
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT to send to one process")
def test_ctrl_c_from_outside_ends_a_real_process(folder: str, tmp_path: Path) -> None:
    """SIGINT to the installed command while it generates: exit code 130, the report on disk, no traceback."""
    command = [sys.executable, "-c", "import sys; from agentmem.cli import main; sys.exit(main())"]
    arguments = [
        "run",
        "--model",
        folder,
        *CAP,
        *SMALL,
        "--max-new-tokens",
        "100000",
        "--prompt",
        "hello",
        "--ignore-eos",
    ]
    process = forked.Popen(
        [*command, *arguments, "--json", str(tmp_path / "r.json")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(50)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT)

    assert process.returncode == 130
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["finish"] == "interrupted"
    assert b"Traceback" not in errors


def test_the_installed_command_returns_its_exit_codes(tmp_path: Path) -> None:
    """A refusal through the real entry point: exit code 1, one line, no traceback."""
    command = [sys.executable, "-c", "import sys; from agentmem.cli import main; sys.exit(main())"]
    arguments = ["run", "--prompt", "x", "--model", str(tmp_path / "none")]
    ended = forked.run([*command, *arguments], text=True, stdin=subprocess.DEVNULL)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("agentmem: model folder")


def test_every_command_that_loads_a_model_takes_a_device() -> None:
    """``plan`` reads a config only; ``check`` makes tiny models."""
    from typer.main import get_command

    from agentmem.cli.app import app

    def leaves(command: Any, name: str) -> Iterator[tuple[str, set[str]]]:
        command = command.loaded() if hasattr(command, "loaded") else command
        if not hasattr(command, "commands"):
            yield name, {option for each in command.params for option in each.opts}
        for inner, each in getattr(command, "commands", {}).items():
            yield from leaves(each, f"{name} {inner}".strip())

    found = dict(leaves(get_command(app), ""))

    having = {name for name, options in found.items() if "--device" in options}
    assert having == {name for name, options in found.items() if "--dtype" in options} - {"plan"}
    assert {"run", "chat", "serve", "calibrate", "eval fidelity", "eval recall"} <= having
