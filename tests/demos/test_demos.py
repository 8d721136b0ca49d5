"""Every demo, at its smallest size: the facts that it prints."""

from __future__ import annotations

import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentmem import models
from agentmem.testing import check_policy
from support import forked
from support.shell import save_model
from support.waiting import LIMIT

pytestmark = pytest.mark.usefixtures("one_thread")

DEMOS = Path(__file__).parents[2] / "demos"
MAX_LINES = 99
Demo = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model on disk, for what takes many tokens."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Demo:
    """Run a demo by its number in this process, as its command line would; what it, and its children, printed."""
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)

    def run(number: str, *arguments: str) -> str:
        (path,) = DEMOS.glob(f"{number}_*.py")
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
        return capfd.readouterr().out

    return run


@pytest.fixture
def _loaded(monkeypatch: pytest.MonkeyPatch, default_model: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """The default model without loading it again."""

    def load(name: str | None = None, **_: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        assert name is None
        return default_model

    monkeypatch.setattr(models, "load", load)


@pytest.mark.parametrize("path", sorted(DEMOS.glob("0*.py")), ids=lambda path: path.name)
def test_a_demo_is_short_and_says_how_it_is_run(path: Path) -> None:
    """Fewer than 100 lines, its own command in its docstring, and words on what to look at."""
    text = path.read_text(encoding="utf-8")
    said = text.partition('"""')[2].partition('"""')[0]

    assert len(text.splitlines()) <= MAX_LINES
    assert f"python demos/{path.name}" in said
    assert "Look at" in said


@pytest.mark.parametrize("number", ["01", "02", "03", "04"])
def test_a_cap_that_is_too_small_is_a_message(demo: Demo, folder: str, number: str) -> None:
    """A refusal ends a demo with its words and no traceback."""
    with pytest.raises(SystemExit, match=r"^agentmem: .*a cap of .+ is too small: .+; raise cap to .+iB, or lower"):
        demo(number, "--model", folder, "--cap", "20KiB")


@pytest.mark.parametrize(
    ("number", "arguments", "said"),
    [
        ("01", ("--tokens", "0"), "--tokens: '0' is too few; give at least 1"),
        ("02", ("--problems", "-1"), "--problems: '-1' is no whole number from 0 on"),
        ("02", ("--compactions", "-1"), "--compactions: '-1' is no whole number from 0 on"),
        ("02", ("--file", "/nope"), "--file: cannot read /nope: No such file"),
        ("02", ("--file", __file__), "--file: test_demos.py:1: not JSON"),
        ("03", ("--file", "/nope"), "--file: cannot read /nope: No such file"),
        ("03", ("--repairs", "many"), "--repairs: 'many' is no whole number"),
        ("04", ("--agents", "0"), "--agents: '0' is too few"),
        ("05", ("--tokens", "-3"), "--tokens: '-3' is no whole number"),
    ],
)
def test_options_that_cannot_work_are_wrong_usage(
    demo: Demo, capfd: pytest.CaptureFixture[str], number: str, arguments: tuple[str, ...], said: str
) -> None:
    """Before anything is loaded, with the option, its value and what is wrong."""
    with pytest.raises(SystemExit, match=r"^2$"):
        demo(number, *arguments)
    assert f"error: argument {said}" in capfd.readouterr().err


def test_06_looks_its_policies_up_before_the_check(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not installed is refused at once, not after minutes."""
    monkeypatch.setattr("agentmem.testing.check_policy", pytest.fail)

    with pytest.raises(SystemExit, match=r"^agentmem: policy 'nope' is unknown"):
        demo("06", "--policy", "window", "--policy", "nope")


def test_what_a_demo_prints_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """What a model or its code wrote, and what a refusal quotes, is shown with its control characters visible."""
    script = tmp_path / "evil.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(DEMOS)!r})\n"
        "from agentmem.errors import AgentmemError\n"
        "from support.refusals import run\n"
        "def main():\n"
        "    print('\\x1b]0;taken\\x07', flush=True)\n"
        "    raise AgentmemError('no \\x9b2J')\n"
        "run(main)\n"
    )
    done = forked.run([sys.executable, str(script)])

    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (
        *(1, "\N{SYMBOL FOR ESCAPE}]0;taken\N{SYMBOL FOR BELL}\n"),
        "agentmem: no \N{REPLACEMENT CHARACTER}2J\n",
    )


@pytest.mark.parametrize("path", sorted(DEMOS.glob("0*.py")), ids=lambda path: path.name)
def test_a_demo_runs_through_the_filter(path: Path) -> None:
    """Each demo is run by ``run``, which has what it prints made visible."""
    assert path.read_text(encoding="utf-8").endswith('if __name__ == "__main__":\n    run(main)\n')


@pytest.mark.usefixtures("_loaded")
def test_01_generates_text(demo: Demo) -> None:
    """The reply, and a peak below the cap."""
    said = demo("01", "--tokens", "4")

    assert "0 compaction(s)" in said
    assert float(re.search(r"peak ([\d.]+) MiB of a cap of 20\.0 MiB", said)[1]) <= 20  # type: ignore[index]


def test_01_generates_past_the_cap(demo: Demo, folder: str) -> None:
    """More tokens than slots, and still a peak below the cap."""
    said = demo("01", "--model", folder, "--cap", "900KiB", "--tokens", "800")

    assert re.search(r"^[2-9] compaction\(s\), each down to \d+ slots per head$", said, re.MULTILINE)
    assert float(re.search(r"peak ([\d.]+) KiB of a cap of 900\.0 KiB", said)[1]) <= 900  # type: ignore[index]


# ---- 02


@pytest.mark.usefixtures("_loaded")
def test_02_forces_an_answer_when_the_memory_is_full_for_the_last_time(demo: Demo) -> None:
    """One compaction, then the paper's words and an answer."""
    said = demo("02", "--problems", "1", "--cap", "6MiB", "--compactions", "1")

    assert "1 compaction(s), forced to answer" in said
    assert "I need to respond with the answer. Final Answer:" in said
    assert re.search(r"answer .+, (right|wrong: it is 20)$", said, re.MULTILINE)
    assert re.search(r"^[01] of 1 right, at most 1 compaction\(s\) each", said, re.MULTILINE)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_02_never_compacts_more_often_than_it_may(demo: Demo, folder: str, most: int) -> None:
    """The physical cap and N compactions bound the thinking, the forced answer included."""
    small = ("--model", folder, "--problems", "1", "--cap", "800KiB", "--policy", "window")
    said = demo("02", *small, "--compactions", str(most))
    thought = [tuple(map(int, found)) for found in re.findall(r"thought (\d+) tokens in (\d+) slots, (\d+) comp", said)]

    assert len(thought) == said.count("forced to answer") == 1
    assert all(compactions == most for _, _, compactions in thought)
    assert all(0 < tokens < slots * (1 + most / 2) for tokens, slots, _ in thought)


def test_02_reads_problems_from_a_file(demo: Demo, folder: str, tmp_path: Path) -> None:
    """JSON lines; as many as were asked for; a reply that ends by its length is made to answer as well."""
    (tmp_path / "p.jsonl").write_text('{"problem": "What is 6 times 7?", "answer": 42}\n' * 3, encoding="utf-8")
    said = demo("02", "--model", folder, "--file", str(tmp_path / "p.jsonl"), "--problems", "2", "--tokens", "5")

    assert said.count("What is 6 times 7?") == 2
    assert said.count("thought 5 tokens") == said.count("forced to answer") == 2


# ---- 03


@pytest.mark.usefixtures("_loaded")
def test_03_tests_repairs_and_compacts_what_the_tests_said(demo: Demo) -> None:
    """One attempt that loops is stopped, its output is read and compacted, and there is another attempt."""
    said = demo("03", "--tasks", "1", "--repairs", "1", "--tokens", "40", "--seconds", "1", "--inject", "loop")

    assert re.search(r"attempt 1: timeout after \d+\.\d s \(\[stopped: still running after 1 s\]\)", said)
    assert re.search(r"output of \d+ tokens read and compacted \d+ time\(s\)", said)
    assert re.search(r"attempt 2: \w+", said)
    assert re.search(r"^[01] of 1 tasks passed; \d+ tokens in \d+ slots", said, re.MULTILINE)


def test_03_goes_on_after_evil_code(demo: Demo, folder: str) -> None:
    """Code that takes 10 GB, writes outside or opens a socket is stopped; every task gets its second attempt."""
    evil = ("memory", "write", "socket")
    small = ("--model", folder, "--cap", "1MiB", "--tokens", "20", "--seconds", str(LIMIT), "--tasks", "1")
    said = demo("03", *small, "--inject", *evil)

    assert re.findall(r"attempt 1: (\w+)", said) == ["memory", "refused", "refused"]
    assert len(re.findall(r"attempt 2: \w+", said)) == len(evil)
    assert all(int(count) >= 1 for count in re.findall(r"compacted (\d+) time", said))
    peak, cap = re.search(r"peak ([\d.]+) KiB of (\d)MiB$", said, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert float(peak) <= 1024 * int(cap)


# ---- 04


def test_07_serve_goes_on_from_an_item_after_a_restart(demo: Demo, folder: str) -> None:
    """The real clients against two servers in turn: the second takes the first one's conversation out of its item."""
    said = demo("07", "--model", folder, "--cap", "12MiB", "--times", "1", "--tokens", "100")
    rows = re.findall(r"^(turn \d+|compact|after it|[A-Z][a-z]+) +(\d+) +(\d+) +\d", said, re.MULTILINE)
    names = [name for name, _, _ in rows]
    turns = [name for name in names if name.startswith("turn")]

    assert said.count("serving at http://127.0.0.1:") == 2
    assert re.search(r'^called weather\(\{"city": "(Paris|Rome)"\}\), then said ', said, re.MULTILINE)
    assert names == ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gia", "Hugo", *turns, "compact", "after it"]
    tokens, read = [int(row[1]) for row in rows], [int(row[2]) for row in rows]
    assert all(new < whole for new, whole in zip(read[9:], tokens[9:], strict=True))
    assert f"{tokens[-2]} of " in said
    assert "tokens came out of the item\nagent: " in said
    peak, share = map(int, re.findall(r"^peak (\d+) of (\d+) bytes, a share of the cap$", said, re.MULTILINE)[0])
    assert 0 < peak <= share


@pytest.mark.usefixtures("_loaded")
def test_04_many_agents_share_one_cap(demo: Demo) -> None:
    """Four agents where one has room at a time: some wait, some go to disk, and the charge stays below the cap."""
    small = ("--agents", "4", "--cap", "14MiB", "--share", "0.6", "--tokens", "4", "--policy", "window")
    said = demo("04", *small)
    rows = re.findall(r"s   ([Aid](?: [Aid])*) +([\d.]+) MiB", said)

    assert all(states.count("A") <= 1 and float(charged) <= 14.0 for states, charged in rows)
    assert re.search(r"cap_bytes=14680064 charged_bytes=\d+ .*active=0 idle=\d on_disk=[1-3] waiting=0", said)
    assert len(re.findall(r"^agent-\d \(\w+\): ", said, re.MULTILINE)) == 4
    peak = re.search(r"^\d of 4 remember; most that was charged: ([\d.]+) MiB of 14\.0 MiB$", said, re.MULTILINE)
    assert peak is not None
    assert 0 < float(peak[1]) <= 14.0


# ---- 05


def test_05_goes_on_after_a_kill_with_a_compacted_memory(demo: Demo, folder: str) -> None:
    """The child was killed in its second save; the first is whole, was compacted, and goes on with the same tokens."""
    said = demo("05", "--model", folder, "--cap", "500KiB", "--tokens", "120")

    killed = -int(signal.SIGKILL) if sys.platform != "win32" else 1
    assert f"child: killed (exit code {killed}); left by its second save: state-" in said
    assert re.search(r"resumed: 1 turn\(s\), \d+ tokens, [1-9] compaction\(s\)", said)
    assert "\n120 of the next 120 tokens are those of a session that was never killed" in said


# ---- 06


@pytest.mark.usefixtures("_loaded")
def test_06_checks_a_policy(demo: Demo) -> None:
    """All invariants hold, and a session replies with it."""
    said = demo("06", "--tokens", "2", "--policy", "window")

    assert re.search(r"policy 'neighbours': 1\d\d checks, 0 broken", said)
    assert re.search(r"^neighbours +0 +- +-   \.\.\.'", said, re.MULTILINE)


def test_06_uses_a_policy_and_compares_it(demo: Demo, folder: str) -> None:
    """Sessions compact with it and with the others; errors stand where there is a probe."""
    said = demo(
        "06", "--model", folder, "--cap", "600KiB", "--tokens", "700", "--policy", "window", "--policy", "merge"
    )
    found = dict(re.findall(r"^([\w-]+) +([1-9]\d*) +(?:0\.\d+|-) +", said, re.MULTILINE))

    assert found.keys() == {"neighbours", "window", "merge"}
    assert re.search(r"^neighbours +\d+ +\d\.\d{3} +\d\.\d{3}   \.\.\.", said, re.MULTILINE)
    assert re.search(r"^window +\d+ +- +-   \.\.\.", said, re.MULTILINE)


def test_06_the_policy_is_small_and_its_laws_can_break() -> None:
    """Fewer than 60 lines from its class to its composition; with less workspace promised, the check says so."""
    (path,) = DEMOS.glob("06_*.py")
    policy = path.read_text(encoding="utf-8").partition("# ---- the policy")[2].partition("# ---- what it")[0]
    made = runpy.run_path(str(path))["neighbours"]()
    type(made.compactor).workspace = lambda *_: 64

    assert len(policy.strip().splitlines()) < 60
    assert any("workspace" in result.invariant for result in check_policy(made).broken)
