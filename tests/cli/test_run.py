"""The command line: what it does, and what it prints where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from agentmem import models
from agentmem.cli.console import OUT
from agentmem.cli.display import Display
from agentmem.cli.printable import printable
from agentmem.cli.run.generation import Generated, _Stream
from agentmem.reporting.trace import read_trace
from agentmem.testing import tiny_model
from support.shell import CAP, CAP_BYTES, SMALL, agentmem, refused, save_model, save_tokenizer

RUN_KEYS = {"cap_bytes", "peak_bytes", "num_compactions", "num_new_tokens", "text", "seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model on disk."""
    return save_model(tmp_path_factory.mktemp("model"))


def test_run_streams_text_and_shows_a_table(folder: str) -> None:
    """The text and the table go to stdout; stderr is silent when it is no terminal."""
    result = agentmem(
        "run", "--model", folder, *CAP, *SMALL, "--max-new-tokens", "80", "--prompt", "hello", "--ignore-eos"
    )

    assert result.exit_code == 0, result.output
    assert "128.0 KiB (131,072 bytes)" in result.stdout
    assert "80 generated (length)" in result.stdout
    assert result.stderr == ""


def test_run_keeps_the_cap_and_reports_it(folder: str, tmp_path: Path) -> None:
    """JSON, trace and pictures are written; the peak stays under the cap over many compactions."""
    paths = {name: tmp_path / "out" / name for name in ("report.json", "run.jsonl", "pictures")}
    result = agentmem(
        "run", "--model", folder, *CAP, *SMALL, "--max-new-tokens", "300", "--prompt", "hello", "--ignore-eos",
        "--json", str(paths["report.json"]), "--trace", str(paths["run.jsonl"]), "--plot", str(paths["pictures"]),
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    report = json.loads(paths["report.json"].read_text(encoding="utf-8"))
    assert report.keys() >= RUN_KEYS
    assert report["num_compactions"] >= 2
    assert report["peak_bytes"] <= report["cap_bytes"] == CAP_BYTES
    assert (report["num_new_tokens"], report["finish"], report["error"]) == (300, "length", None)
    assert printable(report["text"]) in result.stdout
    trace = read_trace(paths["run.jsonl"])
    assert len(trace.compactions) == report["num_compactions"]
    assert trace.points[-1].tokens_seen == report["num_prompt_tokens"] + 299
    assert [Path(path).name for path in report["pictures"]] == ["bytes.png", "errors.png"]
    assert all(Path(path).exists() and path in result.stdout for path in report["pictures"])


def test_json_on_stdout_is_alone_there(folder: str) -> None:
    """With ``--json -`` stdout is one JSON document; the table goes to stderr, the text into the JSON."""
    result = agentmem("run", "--model", folder, *CAP, *SMALL, "--max-new-tokens", "20", "--prompt", "hi", "--json", "-")

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout).keys() >= RUN_KEYS
    assert "peak, workspace included" in result.stderr


def test_below_the_cap_the_text_is_that_of_full_memory(folder: str) -> None:
    """A cap that is never reached changes nothing, sampling with a seed included."""
    result = agentmem(
        "run", "--model", folder, "--cap", "4MiB", *SMALL, "--max-new-tokens", "60", "--prompt", "hello",
        "--ignore-eos",
        "--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--compare-full", "--json", "-",
    )  # fmt: skip

    report = json.loads(result.stdout)
    assert report["num_compactions"] == 0
    assert report["full"]["text"] == report["text"]
    assert report["full"]["common_prefix_tokens"] == report["full"]["num_new_tokens"] == 60
    tokens = report["num_prompt_tokens"] + 59
    assert report["full"]["bytes"] == tokens * 2 * 2 * 2 * 16 * 4
    assert "full memory" in result.stderr


def test_above_the_cap_full_memory_is_larger(folder: str) -> None:
    """The comparison says how much smaller the capped peak is, and where the texts part."""
    result = agentmem(
        "run", "--model", folder, *CAP, *SMALL, "--max-new-tokens", "300", "--prompt", "hello", "--ignore-eos",
        "--compare-full", "--json", "-",
    )  # fmt: skip

    report = json.loads(result.stdout)
    assert report["full"]["peak_ratio"] == report["peak_bytes"] / report["full"]["bytes"]
    assert report["full"]["common_prefix_tokens"] >= report["capacity"] - report["num_prompt_tokens"]


@pytest.mark.parametrize(("arguments", "tokens"), [((), len("User: hello\nAnswer:")), (("--raw",), len("hello"))])
def test_the_chat_template_is_used_unless_raw(folder: str, arguments: tuple[str, ...], tokens: int) -> None:
    """``--raw`` gives the model the prompt as it is; without it the prompt is the user's turn."""
    result = agentmem(
        "run", "--model", folder, *CAP, *SMALL, "--max-new-tokens", "2", "--prompt", "hello", *arguments, "--json", "-"
    )

    assert json.loads(result.stdout)["num_prompt_tokens"] == tokens


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [(("--prompt", "-"), "hello"), (("-",), "hello"), (("--prompt-file", "-"), "hello"), ((), "hello")],
)
def test_the_prompt_may_come_from_stdin(folder: str, arguments: tuple[str, ...], stdin: str) -> None:
    """A dash in any place, or a pipe without any option."""
    result = agentmem(
        "run", *arguments, "--model", folder, *CAP, *SMALL, "--max-new-tokens", "2", "--raw", "--json", "-", stdin=stdin
    )

    assert json.loads(result.stdout)["num_prompt_tokens"] == 5


def test_the_prompt_may_come_from_a_file(folder: str, tmp_path: Path) -> None:
    """A UTF-8 file; a byte-order mark is no part of the text."""
    (tmp_path / "prompt.txt").write_text("\ufeffhéllo", encoding="utf-8")
    result = agentmem(
        "run", "--model", folder, *CAP, *SMALL, "--max-new-tokens", "2", "--raw", "--json", "-",
        "--prompt-file", str(tmp_path / "prompt.txt"),
    )  # fmt: skip

    assert json.loads(result.stdout)["num_prompt_tokens"] == 6


def test_a_prompt_longer_than_the_cap_is_read(folder: str) -> None:
    """Four times what the memory holds goes through it without a byte over the cap."""
    result = agentmem(
        "run",
        "--model",
        folder,
        *CAP,
        *SMALL,
        "--max-new-tokens",
        "5",
        "--prompt",
        "abcdefgh" * 100,
        "--json",
        "-",
        "--raw",
    )

    report = json.loads(result.stdout)
    assert report["num_prompt_tokens"] == 800 > 4 * report["capacity"]
    assert report["peak_bytes"] <= report["cap_bytes"]


def test_rebase_goes_on_past_the_model_s_positions(tmp_path: Path) -> None:
    """``run --rebase`` moves slots and writes on; ``plan --rebase`` plans no more slots than there are positions."""
    save_tokenizer(tmp_path)
    tiny_model("llama", vocab_size=257, eos_token_id=0, bos_token_id=0, max_position_embeddings=128).save_pretrained(
        tmp_path
    )
    small = ("--model", str(tmp_path), *SMALL, "--policy", "window")
    run = (
        "run",
        *small,
        "--cap",
        "1MiB",
        "--prompt",
        "hello",
        "--max-new-tokens",
        "200",
        "--ignore-eos",
        "--json",
        "-",
    )
    rebased, plain = agentmem(*run, "--rebase"), agentmem(*run)
    plans = [
        json.loads(agentmem("plan", *small, "--cap", "1MiB", *option, "--json").stdout)["capacity"]
        for option in (("--rebase",), ())
    ]

    assert rebased.exit_code == 0, rebased.output
    report = json.loads(rebased.stdout)
    assert report["num_prompt_tokens"] + report["num_new_tokens"] > 200
    assert len(report["rebases"]) >= 1
    assert json.loads(plain.stdout)["rebases"] == []
    assert plans[0] <= 128 < plans[1]


def test_logs_go_to_stderr_when_asked_for(folder: str) -> None:
    """``-v`` adds a line per compaction on stderr and nothing to stdout."""
    common = ("run", "--model", folder, *CAP, *SMALL, "--max-new-tokens", "300", "--prompt", "hello", "--ignore-eos")
    quiet, loud = agentmem(*common, "--json", "-"), agentmem("-v", *common, "--json", "-")

    assert "compaction_finished" not in quiet.stderr
    assert loud.stderr.count("compaction_finished") == json.loads(loud.stdout)["num_compactions"]


# ---- streaming


class Recorder:
    """A display that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def token(self) -> None:
        """Tokens are not of interest here."""

    def text(self, piece: str) -> None:
        """Keep a piece."""
        self.pieces.append(piece)


def test_streamed_pieces_make_the_whole_text(folder: str) -> None:
    """Token by token, no piece ends inside a character, and together they are the text decoded at once."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer("Grüße, 世界! 🐝 done")["input_ids"]
    recorder, generated = Recorder(), Generated()
    stream = _Stream(tokenizer, generated, recorder)  # type: ignore[arg-type]
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()

    assert "".join(recorder.pieces) == generated.text == "Grüße, 世界! 🐝 done"
    assert not any("\ufffd" in piece for piece in recorder.pieces)
    assert generated.ids == ids


def test_the_status_line_has_tokens_speed_bytes_and_compactions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person reads while waiting."""

    class Usage:
        tokens_seen, total_slots, resident_bytes, used_bytes, peak_bytes = 300, 9, 2**20, 12 * 2**20, 2**20

    display = Display(streaming=False, cap_bytes=24 * 2**20, max_new_tokens=600)
    display.event(Usage())  # type: ignore[arg-type]
    reading = display._status()
    display.token()
    line = display._status()

    assert reading == "reading: 300 tokens"
    assert line.startswith("1/600 tokens · ")
    assert "12.0 MiB of 24.0 MiB" in line
    assert line.count("━") == line.count("╌") == 4
    assert len(line) <= 80
    assert line.endswith("0 compactions")


# ---- the other commands


def test_plan_shows_where_the_bytes_go(folder: str) -> None:
    """R, T and A for people; the same numbers as JSON; nothing over the cap."""
    people = agentmem("plan", "--model", folder, *CAP, *SMALL)
    machine = json.loads(agentmem("plan", "--model", folder, *CAP, *SMALL, "--json").stdout)

    assert people.exit_code == 0
    assert f"{machine['capacity']} slots per KV head" in people.stdout
    for part in ("R: slots", "T: fit", "R + T", "A (outside the cap)", f"{machine['resident_bytes']:,}"):
        assert part in people.stdout
    assert machine["resident_bytes"] + machine["workspace_bytes"] <= machine["cap_bytes"] == CAP_BYTES


def test_plan_shows_other_policies_and_slots_beside(folder: str) -> None:
    """The policy that was asked for is among them, with the plan's own numbers; fewer bits hold more."""
    options = ("--model", folder, "--cap", "1MiB", *SMALL, "--policy", "snapkv", "--slot-dtype", "int8")
    people = agentmem("plan", *options)
    machine = json.loads(agentmem("plan", *options, "--json").stdout)

    found = machine["beside"]
    assert found["snapkv"]["int8"] == {key: machine[key] for key in ("capacity", "workspace_bytes")}
    for name, each in found.items():
        assert name in people.stdout
        assert list(each) == ["auto", "int8", "k8v4", "int4"]
    slots = [each["capacity"] for each in found["window"].values()]
    assert slots == sorted(set(slots))
    assert found["am-calibrated"]["auto"] is None  # its table is another model's
    assert "–" in people.stdout


def test_plan_says_whether_a_run_fits(folder: str) -> None:
    """And the cap that would hold it, which does: with it, one token more is compacted for."""
    options = ("--model", folder, *SMALL, "--policy", "window", "--json")
    long = json.loads(agentmem("plan", *options, "--cap", "1MiB", "--tokens", "100000").stdout)
    assert long["whole_run_bytes"] > long["cap_bytes"]
    again = json.loads(agentmem("plan", *options, "--cap", str(long["whole_run_bytes"])).stdout)
    assert again["capacity"] == 100000

    people = agentmem("plan", *options[:-1], "--cap", "1MiB", "--tokens", "100000").stdout
    assert "A run of 100,000 tokens does not fit" in people
    assert "A run of 20 tokens fits" in agentmem("plan", *options[:-1], "--cap", "1MiB", "--tokens", "20").stdout


def test_plan_counts_rows_and_the_number_format(folder: str) -> None:
    """Two rows share the cap, and numbers of half the bytes make room for more slots."""

    def capacity(*arguments: str) -> int:
        shown = agentmem("plan", "--model", folder, "--cap", "1MiB", *SMALL, *arguments, "--json")
        return int(json.loads(shown.stdout)["capacity"])

    assert capacity("--rows", "2") < capacity() < capacity("--dtype", "bfloat16")


def test_a_probe_is_a_mixture_in_one_option(folder: str) -> None:
    """``plan`` shares the reference tokens as it says, ``run`` compacts with it and names its sources."""
    options = ("--probe", "replay+spread:0.5+live*2", "--probe-tokens", "20")
    shown = agentmem("plan", "--model", folder, *CAP, *SMALL, *options, "--json")
    ran = agentmem(
        "run", "--model", folder, *CAP, *SMALL, *options, "--prompt", "x" * 400, "--max-new-tokens", "8",
        "--ignore-eos", "--json", "-",
    )  # fmt: skip

    plan, report = json.loads(shown.stdout), json.loads(ran.stdout)
    assert (plan["probe_tokens"], plan["stored"]) == (12, [8])
    assert report["num_compactions"] >= 1
    assert {each["queries"] for each in report["compactions"]} == {"replay+spread+live"}


def test_plan_refuses_a_cap_that_is_too_small(folder: str) -> None:
    """With what would be enough."""
    refused(agentmem("plan", "--model", folder, "--cap", "2KiB", *SMALL), "too small", "need")


def test_policies_lists_what_is_installed() -> None:
    """For people and as JSON."""
    people = agentmem("policies")
    machine = json.loads(agentmem("policies", "--json").stdout)

    assert people.exit_code == 0
    assert {"am-halving", "window", "heavy-hitters", "full"} <= {row["name"] for row in machine}
    for row in machine:
        assert row["name"] in people.stdout
        assert row["summary"] in people.stdout


def test_version_and_help() -> None:
    """Both are exit code 0; without a command the help is shown."""
    assert agentmem("--version").stdout.startswith("agentmem 0.")
    assert agentmem("run", "--help").exit_code == 0
    for option in ("--cap", "--ignore-eos", "--compare-full", "--probe-tokens", "source[:share][*weight]"):
        assert option in " ".join(agentmem("run", "--help").stdout.replace("│", " ").split())


def test_model_path_prints_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``fetch`` finds what is there without a network and names its licence; ``path`` prints only the folder."""
    home = models.default_folder(tmp_path)
    home.mkdir(parents=True)
    (home / "LICENSE").write_text("\n  Apache License\nVersion 2.0\n", encoding="utf-8")
    for module in (models, models.loading):
        monkeypatch.setattr(module, "is_fetched", lambda *_: True)

    fetched, path = agentmem("model", "fetch", home=tmp_path), agentmem("model", "path", home=tmp_path)

    assert fetched.stdout == path.stdout == f"{home}\n"
    assert "Apache License" in fetched.stderr


def test_the_shared_consoles_follow_the_stream(capsys: pytest.CaptureFixture[str]) -> None:
    """The console writes to whatever stdout is now, not to what it was at import."""
    OUT.print("here")

    assert capsys.readouterr().out == "here\n"
