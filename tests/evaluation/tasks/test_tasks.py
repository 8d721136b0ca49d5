"""The tasks on inspect_ai: they run without data, read data with clear errors, and score what they should."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import inspect_ai
import pytest
from inspect_ai.model import get_model

from agentmem import models
from agentmem.errors import AgentmemError, SettingsRefused
from agentmem.evaluation.tasks import aime, maths, qa
from agentmem.evaluation.tasks.records import read_records
from agentmem.evaluation.tasks.run import TASKS, attempts, check
from agentmem.evaluation.terms import Terms
from support.shell import agentmem, refused, save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),  # inspect's own call
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),  # inspect leaves anyio's streams open
]
TERMS = Terms(slots=160, keep_first=4, keep_recent=8, chunk=256)
SMALL: dict[str, dict[str, Any]] = {
    "many_shot": {"words": 6, "block": 3, "rounds": 2},
    "instructions": {"characters": 400, "rules": 2},
    "needle": {"characters": 600, "documents": 1},
    "qa": {"questions": 4},
    "maths": {"problems": 2, "shots": 2, "max_tokens": 12},
    "aime": {"epochs": 2, "max_tokens": 20},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model on disk."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder: str) -> Any:
    """The model and its tokenizer."""
    return models.load(folder)


@pytest.fixture(autouse=True, scope="module")
def _collected() -> Iterator[None]:
    """What inspect left open is collected here, where its warnings are expected."""
    yield
    gc.collect()


def test_every_task_has_a_small_case_here() -> None:
    """A new task comes with one."""
    assert SMALL.keys() == TASKS.keys()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("terms", [None, TERMS], ids=["full", "capped"])
def test_a_task_runs_without_data(loaded: Any, name: str, terms: Terms | None, tmp_path: Path) -> None:
    """Every sample is answered and scored; compactions happen under the cap alone."""
    found = attempts(name, SMALL[name], loaded, terms, "am-halving", 0, tmp_path)

    assert found
    assert all(each.score in {0.0, 1.0} for each in found)
    assert all(each.tokens_generated >= 1 and each.bytes > 0 and each.seconds > 0 for each in found)
    assert len({(each.sample, each.epoch) for each in found}) == len(found)
    compactions = max(each.compactions for each in found)
    assert compactions == 0 if terms is None else compactions > 0


def test_the_entry_point_is_what_inspect_finds(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By names alone, as on inspect's command line, a sample has its costs as metadata; the model is loaded once."""
    loads, load = [], models.load
    monkeypatch.setattr(models, "load", lambda name, **given: loads.append(name) or load(name, **given))
    assert [point.value for point in entry_points(group="inspect_ai", name="agentmem")] == [
        "agentmem.evaluation.tasks.registry"
    ]
    (log,) = inspect_ai.eval(
        "agentmem/many_shot",
        model=f"agentmem/{folder}",
        model_args={"slots": 160, "policy": "window", "keep_first": 4, "keep_recent": 8, "chunk": 64},
        task_args=SMALL["many_shot"],
        log_dir=str(tmp_path),
        display="none",
    )

    assert log.status == "success", log.error
    assert loads == [folder]
    memory = log.samples[0].metadata["memory"]  # type: ignore[index]  # it ran
    assert {"compactions", "peak_bytes", "tokens_read", "tokens_generated", "seconds", "forced"} <= memory.keys()
    assert memory["policy"] == "window"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"slots": 160, "cap": "1MiB"}, "both given"),
        ({"slots": 160, "policy": "windo"}, "windo"),
        ({"colour": "red"}, "colour"),
        ({"cap": "many"}, "many"),
        ({"slots": 160, "dtype": "float99"}, "float99"),
    ],
)
def test_a_bad_model_argument_is_refused_before_loading(arguments: dict[str, Any], part: str) -> None:
    """Its name and value are in the message."""
    with pytest.raises(AgentmemError, match=part):
        get_model("agentmem/no-such-model", memoize=False, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("needel", {}, ("needel", "needle")),
        ("needle", {"documents": "four"}, ("documents", "four")),
        ("needle", {"colour": 1}, ("colour", "not permitted")),
        ("many_shot", {"words": 1.5}, ("words", "1.5")),
    ],
)
def test_bad_task_arguments_are_refused(name: str, arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    """Before anything is loaded, by name and value."""
    with pytest.raises(SettingsRefused) as refused:
        check(name, arguments)

    assert all(part in str(refused.value) for part in parts)


def test_an_ablation_runs_tasks(folder: str, tmp_path: Path) -> None:
    """Every sample is a unit of the row, full memory stands beside, seeds are the grid's, and logs stay readable."""
    config = tmp_path / "tasks.yaml"
    settings = {
        "models": folder, "policies": "window", "slots": 160, "keep_first": 4, "keep_recent": 8, "chunk": 256,
        "seeds": [0, 3], "instruments": {"tasks": {name: SMALL[name] for name in ("many_shot", "aime")}},
    }  # fmt: skip
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    result = agentmem("ablate", str(config), "--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "kept"))

    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in (tmp_path / "out" / "rows-0.jsonl").read_text("utf-8").splitlines()]
    assert [(row["cell"]["instrument"], row["cell"]["policy"], row["cell"]["seed"]) for row in found] == [
        (name, policy, seed) for name in ("many_shot", "aime") for seed in (0, 3) for policy in ("full", "window")
    ]
    assert [len(row["runs"]) for row in found] == [6] * 4 + [2 * 2] * 4
    assert [row["memories"] for row in found] == [1] * 4 + [4] * 4  # questions behind one context share a memory
    assert all((row["compactions"] > 0) == (row["cell"]["policy"] == "window") for row in found)
    assert found[0]["runs"][0]["sample"] != found[2]["runs"][0]["sample"]
    assert "tokens generated" in (tmp_path / "out" / "report.md").read_text("utf-8")
    assert len(list((tmp_path / "out" / "logs").glob("*.eval"))) == 8


@pytest.mark.parametrize(
    ("task", "part"),
    [("needel: {}", "tasks: needel: there is no task"), ("aime: {colour: 1}", "tasks: aime: colour: ")],
)
def test_an_ablation_refuses_bad_tasks(tmp_path: Path, task: str, part: str) -> None:
    """With file and line."""
    config = tmp_path / "tasks.yaml"
    config.write_text(f"policies: window\nslots: 160\ninstruments:\n  tasks:\n    {task}\n", encoding="utf-8")

    refused(agentmem("ablate", str(config)), "tasks.yaml:4: instruments.tasks: ".replace("tasks: ", ""), part)


# ---- data


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"problem": "1 + 1", "answer": 2}\n{"problem": "x"}\n', "data.jsonl:2: answer: Field required"),
        ('{"problem": "1 + 1", "answer": "two"}\n', "data.jsonl:1: answer: "),
        ("{]\n", "data.jsonl:1 is no JSON"),
        ("", "holds no record"),
        ('[{"problem": "", "answer": 2}]', r"data.jsonl\[0\]: problem: "),
        ("[1, ", "is no JSON"),
    ],
)
def test_a_bad_record_is_refused_with_its_place(tmp_path: Path, content: str, part: str) -> None:
    """File, line or entry, field and value are named."""
    path = tmp_path / "data.jsonl"
    path.write_text(content, encoding="utf-8")

    with pytest.raises(SettingsRefused, match=part):
        read_records(path, aime.Problem)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A missing file, and one that is no text."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, part in (("missing", "No such file"), ("binary", "not UTF-8")):
        with pytest.raises(SettingsRefused, match=part):
            read_records(tmp_path / name, aime.Problem)


def test_formats_of_the_field_are_read(tmp_path: Path) -> None:
    """GSM8K's and MATH's problems, QuALITY's questions; what a task does not need is passed over."""
    gsm, quality = tmp_path / "gsm.jsonl", tmp_path / "quality.json"
    gsm.write_text(
        json.dumps({"question": "How many?", "answer": "9 * 2 = <<9*2=18>>18\n#### 18"})
        + "\n"
        + json.dumps({"problem": "Half of $x$?", "solution": "It is $\\boxed{\\frac{x}{2}}$.", "level": 1}),
        encoding="utf-8",
    )
    entry = {"article": "A.", "question": "Q?", "options": ["no", "yes"], "gold_label": 2, "article_id": "0"}
    quality.write_text(json.dumps([entry]), encoding="utf-8")

    first, second = read_records(gsm, maths.Problem)
    assert (first.result, second.result) == ("18", "It is $\\boxed{\\frac{x}{2}}$.")
    (sample,) = qa.qa(data=str(quality)).dataset
    assert sample.target == "B"
    quality.write_text(json.dumps([entry | {"gold_label": 3}]), encoding="utf-8")
    with pytest.raises(SettingsRefused, match="beyond the 2 options"):
        read_records(quality, qa.Question)


# ---- scores


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So \\boxed{12}, no: \\boxed{ 204 }.", 204),
        ("thinking \\boxed{3} \nFinal Answer: 17. And 4", 17),
        ("Final Answer: \\boxed{1,024}", 1024),
        ("Final Answer: unknown", None),
        ("I think that it is 5", None),
    ],
)
def test_the_answer_of_a_problem(text: str, answer: int | None) -> None:
    """The last boxed integer, or the first one behind the forced words; a number in passing is none."""
    assert aime.answered(text) == answer


def test_the_forced_words_are_the_papers() -> None:
    """The sentence, the end of thinking, "Final Answer:" and 16 tokens, at the paper's temperature and nucleus."""
    made = aime.aime()
    forced = made.config.extra_body["forced"]  # type: ignore[index]  # it is set

    assert forced["text"].split("\n") == ["", "I need to respond with the answer.", "</think>", "", "Final Answer:"]
    assert (forced["tokens"], made.config.temperature, made.config.top_p) == (16, 0.6, 0.95)


def test_problems_that_are_made_are_right() -> None:
    """Their answers follow from their own words."""
    for seed in range(3):
        power, total = aime.made(seed)
        base, exponent = (int(part) for part in power.problem.split("$")[1].rstrip("}").split("^{"))
        _, low, high = (int(word.rstrip(".")) for word in total.problem.split() if word.rstrip(".").isdigit())

        assert pow(base, exponent, 1000) == power.answer
        assert sum(range(low + -low % 7, high + 1, 7)) == total.answer
