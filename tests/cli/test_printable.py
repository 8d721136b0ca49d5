"""Text that would steer a terminal, and bytes that are no text: shown or refused, never passed on."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest
from rich.console import Console

from agentmem.cli import console, display, logs
from agentmem.cli.display import Display
from agentmem.errors import AgentmemError
from support import forked

EVIL = "\x1b]0;taken\x07\x9b2J\u202ea\tb\nc\r\ud83d\x7f"
SAFE = "␛]0;taken␇\ufffd2J\ufffda\tb\nc␍\ufffd␡"


@pytest.mark.parametrize("terminal", [True, False])
def test_streamed_text_is_shown_and_not_obeyed(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> None:
    """Piece by piece, each character alone, so a sequence in two pieces does not pass either."""
    out = io.StringIO()
    monkeypatch.setattr(display, "OUT", Console(file=out, highlight=False, soft_wrap=True, force_terminal=terminal))
    with Display(streaming=True, cap_bytes=None, max_new_tokens=9) as shown:
        for character in EVIL:
            shown.text(character)

    assert out.getvalue() == SAFE + "\n"


def test_errors_notes_and_tables_are_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may quote what a model wrote."""
    out = io.StringIO()
    monkeypatch.setattr(console, "ERR", Console(file=out, highlight=False))
    console.refuse(AgentmemError(EVIL))
    console.note(EVIL)
    console.show(console.table(None, ("a",), [("\x1b[2J",)], left=(0,)), on=Console(file=out, width=40))

    assert not set(out.getvalue()) & set("\x1b\x07\x9b\r\x7f\u202e")
    assert "␛]0;taken␇" in out.getvalue()


def test_logs_are_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their messages, their values and the errors that they show."""
    out = io.StringIO()
    monkeypatch.setattr(logs, "ERR", Console(file=out, highlight=False))
    logger = logging.getLogger("agentmem")
    before = logger.handlers, logger.level, logger.propagate
    try:
        monkeypatch.setattr(logs, "_quiet_transformers", lambda _: None)
        logs.configure(0)
        try:
            raise ValueError("\x1b]0;taken\x07")  # noqa: TRY301  # the error is the point
        except ValueError:
            logger.warning("wrote %s", EVIL, extra={"text": "\x1b[2J"}, exc_info=True)
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])

    assert not set(out.getvalue()) & set("\x1b\x07\x9b\r\x7f\u202e")
    assert "␛]0;taken␇" in out.getvalue()


def test_json_keeps_the_text_in_escapes(tmp_path: Path) -> None:
    """The value is exact, and no control character stands in the file."""
    console.write_json({"text": EVIL}, str(tmp_path / "x.json"), "--json")
    written = (tmp_path / "x.json").read_text(encoding="utf-8")

    assert json.loads(written) == {"text": EVIL}
    assert not set(written) & set("\x1b\x07\x9b\r\x7f\u202e")


@pytest.mark.parametrize("arguments", [("run", "--prompt", b"caf\xe9"), ("chat", "--system", b"\xff"), (b"r\xe9",)])
def test_an_argument_that_is_not_utf_8_is_wrong_usage(arguments: tuple[str | bytes, ...]) -> None:
    """Wherever it stands: exit code 2 and one message, no traceback."""
    code = "import sys; from agentmem.cli import main; sys.exit(main())"
    done = forked.run([sys.executable, "-c", code, *arguments])

    assert done.returncode == 2
    assert b"is not UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_titles_and_heads_of_tables_are_printable(*, terminal: bool) -> None:
    """A title may be a policy's name as a user wrote it, and a head may be a name in a file."""
    out = io.StringIO()
    on = Console(file=out, highlight=False, width=90, force_terminal=terminal, no_color=True)
    console.show(console.table("t \x1b]0;x\x07", ("c\x9b2J", "[b]"), [("a", "b")], left=(0,)), on=on)

    assert "]0;x\N{SYMBOL FOR BELL}" in out.getvalue()
    assert "c\N{REPLACEMENT CHARACTER}2J" in out.getvalue()
    assert "[b]" in out.getvalue()
    assert not {"\x07", "\x9b"} & set(out.getvalue())
