"""``agentmem chat``: turns, commands, refusals and Ctrl-C, with scripted input."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import Result

from agentmem.cli.chat.conversation import Conversation
from agentmem.cli.display import Display
from agentmem.engine import Engine
from agentmem.reporting.report import CompactionReport
from agentmem.sessions.snapshots.files import read_manifest
from agentmem.testing import tiny_model
from support.shell import agentmem, refused, save_model, save_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CAP = 800 * 1024
OPTIONS = ("--cap", "800KiB", "--keep-recent", "16", "--max-new-tokens", "24")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model on disk."""
    return save_model(tmp_path_factory.mktemp("model"))


def chat(folder: str, *lines: str, options: tuple[str, ...] = ()) -> Result:
    """A conversation whose input is a pipe; nothing that it does may end in a traceback."""
    result = agentmem("chat", "--model", folder, *OPTIONS, *options, stdin="".join(f"{line}\n" for line in lines))
    assert "Traceback" not in result.output
    return result


def bars(result: Result) -> list[str]:
    """The memory bars, one after each turn."""
    return [line for line in result.stderr.splitlines() if "of 800.0 KiB" in line]


def stats(result: Result) -> list[dict[str, str]]:
    """What every /stats said of the session."""
    tables = result.stdout.split("session  ")[1:]
    return [
        dict(re.findall(r"^(\w+) +(\S+)(?: \(.*\))? *$", text.partition("runtime  ")[0], re.MULTILINE))
        for text in tables
    ]


# ---- turns


def test_a_line_is_a_turn(folder: str) -> None:
    """Replies go to stdout and nothing else does; each turn ends with the memory's bar on stderr; exit code 0."""
    result = chat(folder, "hello", "", "   ", "hello again")

    assert result.exit_code == 0
    assert len(result.stdout.strip()) > 10
    assert len(bars(result)) == 2
    assert re.search(
        r"^[━╌]{3,20} [\d.]+ KiB of 800\.0 KiB · \d+/\d+ slots · 0 compactions · .*24 tokens$", bars(result)[0]
    )
    assert "cut by --max-new-tokens" in result.stderr
    assert "/help lists the commands" in result.stderr


def test_the_conversation_goes_on_past_the_cap(folder: str) -> None:
    """Many turns compact the memory, its peak stays below the cap, and the system prompt stays pinned."""
    lines = [f"turn {number}: tell me more, please, and more" for number in range(12)]
    result = chat(folder, *lines, "/stats", options=("--system", "Be terse."))
    (found,) = stats(result)

    assert result.exit_code == 0
    assert int(found["tokens"]) > int(found["capacity"])
    assert int(found["compactions"]) >= 2
    assert int(found["peak_bytes"]) <= int(found["lease_bytes"]) == CAP
    assert int(found["pinned_tokens"]) == len("User: Be terse.\n")
    assert f"{found['compactions']} compactions" in bars(result)[-1]


def test_the_line_about_the_memory_fits_80_columns(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After many compactions, with its speed or stopped, and bytes stand beside what they are for people."""
    made: list[Conversation] = []
    begin = Conversation.__init__
    monkeypatch.setattr(Conversation, "__init__", lambda self, *more: (begin(self, *more), made.append(self))[0])
    result = chat(folder, *(f"turn {number}: tell me more, please, and more" for number in range(4)), "/stats")

    assert result.exit_code == 0
    assert all(len(line) <= 80 for line in bars(result))
    assert re.search(r"^lease_bytes +819200 \(800\.0 KiB\)", result.stdout, re.MULTILINE)
    stats = {"capacity": 12345, "room": 0, "compactions": 123, "lease_bytes": 1023 << 20}
    usage = SimpleNamespace(usage=lambda: SimpleNamespace(used_bytes=1022 << 20))
    made[0].session = SimpleNamespace(stats=SimpleNamespace(**stats), memory=usage)  # type: ignore[assignment]  # what it reads
    for ending in ((), ("100.5 tokens/s", "512 tokens"), ("512 tokens", "stopped")):
        assert len(made[0].bar(*ending)) <= 80


def test_sampling_has_a_seed(folder: str) -> None:
    """The same seed gives the same replies, another gives others; both differ from the greedy ones."""
    sampled = ("--temperature", "0.9", "--top-p", "0.95", "--seed")
    replies = [
        chat(folder, "hello", "more", options=options).stdout
        for options in ((*sampled, "3"), (*sampled, "3"), (*sampled, "4"), ())
    ]

    assert replies[0] == replies[1]
    assert len(set(replies)) == 3


def test_rebase_goes_on_past_the_model_s_positions(tmp_path: Path) -> None:
    """With --rebase a model of few positions talks on, though the cap alone has room for more slots than positions."""
    save_tokenizer(tmp_path)
    tiny_model("llama", vocab_size=257, eos_token_id=0, bos_token_id=0, max_position_embeddings=288).save_pretrained(
        tmp_path
    )
    lines = [f"turn {number}: tell me more" for number in range(12)]
    result = chat(str(tmp_path), *lines, "/stats", options=("--policy", "window", "--rebase"))
    (found,) = stats(result)

    assert result.exit_code == 0, result.output
    assert int(found["tokens"]) > 288
    assert int(found["rebases"]) >= 1
    assert int(found["capacity"]) <= 288


def test_a_request_may_be_left_unpinned(folder: str, tmp_path: Path) -> None:
    """With --no-pin-request, which a saved conversation keeps."""
    for options, wanted in (((), True), (("--no-pin-request",), False)):
        saved = tmp_path / str(wanted)
        result = chat(folder, "hello", f"/save {saved}", options=options)
        assert result.exit_code == 0, result.output
        made = read_manifest(saved).settings["settings"]
        assert isinstance(made, dict)
        assert made["pin_request"] is wanted


def test_a_message_may_begin_with_a_slash(folder: str) -> None:
    """Written with two slashes, of which one is said."""
    result = chat(folder, "//etc", "/stats")

    assert result.exit_code == 0
    assert int(stats(result)[0]["tokens"]) == len("User: /etc\nAnswer:") + 24


def test_quit_ends_before_the_rest_of_the_input(folder: str) -> None:
    """What follows /quit is not read; the end of the input without it is the same."""
    assert len(bars(chat(folder, "hello", "/quit", "more"))) == 1
    assert chat(folder).exit_code == 0
    assert chat(folder).stdout == ""


# ---- commands


def test_help_lists_every_command(folder: str) -> None:
    """With its usage."""
    result = chat(folder, "/help")

    for usage in ("/compact [FOCUS]", "/stats", "/save PATH", "/load PATH", "/fork [NAME]", "/switch [NAME]", "/quit"):
        assert usage in result.stdout


def test_compact_now_and_with_a_focus(folder: str) -> None:
    """It says how many slots are left; a memory with nothing to reclaim says that."""
    result = chat(folder, "/compact", "hello " * 30, "/compact", "once more " * 20, "/compact the colour", "/stats")
    told = re.findall(r"compacted (\d+) slots per head to (\d+) in [\d.]+ s", result.stderr)

    assert result.exit_code == 0
    assert "there is nothing to reclaim yet" in result.stderr
    assert len(told) == 2
    assert all(int(after) < int(before) for before, after in told)
    assert int(stats(result)[0]["compactions"]) >= 2


def test_save_and_load_go_on_as_if_nothing_had_happened(folder: str, tmp_path: Path) -> None:
    """The loaded session replies as the saved one does, in this conversation and in another process's."""
    saved = str(tmp_path / "saved")
    long = "a long beginning, so that there is something to compact " * 8
    first = chat(folder, long, f"/save {saved}", "and then?", f"/load {saved}", "and then?", "/stats", "/switch")
    second = chat(folder, "and then?", "/stats", options=("--load", saved))
    replies = first.stdout.split("session  ")[0].rstrip().encode()

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "now in 'saved', loaded from" in first.stderr
    assert stats(first)[0]["name"] == "saved"
    assert re.search(r"\* +saved +idle", first.stdout)
    assert re.search(r"^ +main +on disk", first.stdout, re.MULTILINE)
    assert stats(first)[0]["tokens"] == stats(second)[0]["tokens"]
    reply = second.stdout.split("session  ")[0].rstrip().encode()
    assert len(reply) > 10
    assert replies.count(reply) == 2


def test_a_fork_and_its_origin_part(folder: str) -> None:
    """Both have the same past; what is said in one is not in the other."""
    result = chat(
        folder, "hello", "/stats", "/fork branch", "something long that only the branch is told", "/stats",
        "/switch main", "/stats", "/switch branch", "/fork", "/fork", "/switch",
    )  # fmt: skip
    before, branch, main = stats(result)

    assert result.exit_code == 0
    assert "now in 'branch', with the same past; /switch main goes back" in result.stderr
    assert (before["tokens"], before["name"]) == (main["tokens"], main["name"])
    assert int(branch["tokens"]) > int(main["tokens"])
    assert {"branch-fork", "branch-fork-fork"} <= set(result.stdout.split())


def test_any_blank_ends_a_command_s_name(folder: str) -> None:
    """A tab too, or several blanks."""
    result = chat(folder, "/fork\tbranch", "/switch \t main")

    assert result.exit_code == 0, result.output
    assert "now in 'branch'" in result.stderr
    assert "now in 'main'" in result.stderr


def test_the_command_that_goes_on_from_a_save_can_be_pasted(folder: str, tmp_path: Path) -> None:
    """A path with a blank in it is quoted for the shell, and written as it is behind /load."""
    saved = str(tmp_path / "snap one")
    result = chat(folder, f"/save {saved}", f"/load {saved}")

    assert result.exit_code == 0, result.output
    assert f"/load {saved}, or `agentmem chat --load '{saved}'`, goes on" in result.stderr


def test_forks_share_the_cap_in_turns(folder: str) -> None:
    """Each branch may use the whole cap: the others are on disk meanwhile, and come back as they were."""
    result = chat(folder, "hello", "/fork b", "one", "/switch main", "two", "/switch b", "three", "/stats")

    assert result.exit_code == 0
    assert len(bars(result)) == 4
    assert int(stats(result)[0]["charged_bytes"]) <= CAP
    assert re.search(r"main +on disk", result.stdout)


# ---- refusals


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("/sav x", ("/sav is no command", "did you mean '/save'?", "//sav")),
        ("/nonsense", ("/nonsense is no command; /help",)),
        ("/save", ("/save needs PATH; write /save PATH",)),
        ("/load", ("/load needs PATH",)),
        ("/quit now", ("/quit takes nothing", "'now'")),
        ("/stats all", ("/stats takes nothing",)),
        ("/load no-such-folder", ("no-such-folder", "no manifest.json")),
        ("/save /proc/nowhere/x", ("/proc/nowhere",)),
        ("/switch man", ("no session 'man'", "did you mean 'main'?", "there are main")),
        ("/fork main", ("there is a session 'main' already",)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_refused_line_is_told_and_the_conversation_goes_on(folder: str, line: str, parts: tuple[str, ...]) -> None:
    """One line on stderr; the next turn is as it would have been; the exit code of a script says that it was so."""
    if "/proc" in line and sys.platform != "linux":
        pytest.skip("a folder that nobody can make")
    result, plain = chat(folder, line, "hello"), chat(folder, "hello")

    assert result.exit_code == 1
    (told,) = [text for text in result.stderr.splitlines() if text.startswith("agentmem: ")]
    for part in parts:
        assert part in told
    assert result.stdout == plain.stdout


def test_a_focus_needs_a_probe(folder: str) -> None:
    """A policy without one says so, and still compacts without a focus."""
    result = chat(folder, "hello " * 150, "/compact colour", "/compact", options=("--policy", "window"))

    assert "agentmem: focus: policy 'window' runs no probe" in result.stderr
    assert "compacted" in result.stderr


def test_a_policy_that_never_compacts_ends_the_turn_at_the_cap(folder: str) -> None:
    """The turn is refused; the conversation can still be saved and left."""
    result = chat(folder, "hello " * 200, "/stats", options=("--policy", "full"))

    assert result.exit_code == 1
    assert "agentmem: " in result.stderr
    assert int(stats(result)[0]["peak_bytes"]) <= CAP


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--policy", "am-halvin"), ("'am-halvin' is unknown", "did you mean 'am-halving'")),
        (("--cap", "8KiB"), ("too small", "need")),
        (("--cap", "lots"), ("'lots'",)),
        (("--keep-recent", "100000"), ("too small", "recent 100000")),
        (("--load", "no-such-folder"), ("no-such-folder",)),
        (("--system", "x" * 5000), ("pin",)),
    ],
    ids=lambda value: " ".join(value)[:24].strip() if isinstance(value, tuple) else None,
)
def test_what_cannot_begin_is_refused(folder: str, options: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """Exit code 1 and a line with the value and the remedy, before any turn."""
    result = chat(folder, "hello", options=options)
    lines = [line for line in result.stderr.splitlines() if line.startswith("agentmem: ")]

    assert (result.exit_code, result.stdout, len(lines)) == (1, "", 1)
    for part in parts:
        assert part in lines[0]


def test_wrong_usage_is_exit_code_2(folder: str) -> None:
    """Options that exclude each other or are out of range."""
    for options in (("--load", "x", "--system", "y"), ("--temperature", "-1"), ("--max-new-tokens", "0")):
        result = chat(folder, options=options)
        assert result.exit_code == 2
        assert "Usage" in result.stderr


def test_a_model_that_cannot_chat_is_refused(tmp_path: Path) -> None:
    """Its tokenizer has no chat template."""
    tiny_model("llama", vocab_size=257, eos_token_id=0, bos_token_id=0).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()

    refused(chat(str(tmp_path), "hello"), "no chat template", "--model", "agentmem run --raw")


def test_input_that_is_no_text_is_refused(folder: str) -> None:
    """Bytes that are not UTF-8; what came before them was said."""
    result = agentmem("chat", "--model", folder, *OPTIONS, stdin=b"ab\xff\xfe\n")

    assert result.exit_code == 1
    assert "agentmem: chat: the input is not UTF-8" in result.stderr
    assert "Traceback" not in result.output


# ---- Ctrl-C


def interrupt(monkeypatch: pytest.MonkeyPatch, method: str, times: int, wanted: Any = lambda display, *_: True) -> None:
    """Send SIGINT so often, once, when ``wanted`` holds after that method of the display was called."""
    original, done = getattr(Display, method), list[bool]()

    def called(self: Display, *arguments: Any) -> None:
        original(self, *arguments)
        if not done and wanted(self, *arguments):
            done.append(True)
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Display, method, called)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_the_reply_and_not_the_conversation(
    folder: str, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Once after the token that runs, twice at once; what was written stays, and the next turn is a whole one."""
    interrupt(monkeypatch, "token", times, lambda display: display.tokens == 5)
    before = signal.getsignal(signal.SIGINT)
    result = chat(folder, "hello", "/stats", "go on", "/stats")
    cut, whole = stats(result)

    assert result.exit_code == 0
    assert bars(result)[0].endswith("stopped")
    assert int(cut["tokens"]) == len("User: hello\nAnswer:") + 5
    assert (cut["state"], cut["charged_bytes"]) == ("idle", cut["lease_bytes"])
    assert "24 tokens" in bars(result)[1]
    assert int(whole["tokens"]) >= int(cut["tokens"]) + len("User: go on\nAnswer:") + 24
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_a_message_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is an empty reply then, as roles must alternate; the next turn reads the rest and replies."""
    folder = save_model(tmp_path)
    template = tmp_path / "chat_template.jinja"
    strict = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    template.write_text(template.read_text(encoding="utf-8").replace("%}User", f"%}}{strict}User"), encoding="utf-8")
    interrupt(monkeypatch, "event", 1, lambda _, event: isinstance(event, CompactionReport))
    result = chat(folder, "hello " * 100, "go on", "/stats")
    (found,) = stats(result)

    assert result.exit_code == 0
    assert bars(result)[0].endswith("stopped")
    assert "24 tokens" in bars(result)[1]
    assert int(found["tokens"]) >= 600 + 24
    assert int(found["pending"]) <= 1


def test_ctrl_c_during_a_compaction(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes effect at the next layer; the memory is valid and is compacted by the next attempt."""
    run, done = Engine.run, list[bool]()

    def interrupted(self: Engine, compaction: Any) -> CompactionReport:
        if not done:
            done.append(True)
            signal.raise_signal(signal.SIGINT)
        return run(self, compaction)

    monkeypatch.setattr(Engine, "run", interrupted)
    result = chat(folder, "hello " * 25, "/compact", "/compact", "go on")

    assert result.exit_code == 0
    assert "\nstopped\n" in result.stderr
    assert re.search(r"^compacted \d+ slots per head to \d+ in", result.stderr, re.MULTILINE)
    assert "24 tokens" in bars(result)[-1]
