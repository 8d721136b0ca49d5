"""What a runtime and its sessions are made with: refused at once, by its name, and nothing is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny_chat
from agentmem.errors import SettingsRefused
from agentmem.sessions import Runtime


@pytest.mark.parametrize(("given", "message"), [
    ({"polcy": "window"}, "^polcy: no such setting; did you mean 'policy'"),
    ({"keep_recnt": 4}, "did you mean 'keep_recent'"),
    ({"policy": "windw"}, "did you mean 'window'"),
    ({"policy": "window[size=3]"}, "no option 'size'"),
    ({"keep_recent": -1}, "keep_recent"),
    ({"share": 2.0}, "share: 2.0"),
    ({"soft": 0.9}, "soft"),
    ({"wait": "x"}, "^wait='x': give a number of seconds, 0 at least"),
    ({"wait": -1}, "^wait=-1"),
    ({"wait": float("nan")}, "^wait=nan"),
    ({"max_waiting": "x"}, "^max_waiting='x': give a whole number, 0 at least"),
    ({"max_waiting": True}, "^max_waiting=True"),
    ({"pressure": "trim"}, "pressure: .'trim'. unknown; stages are trim, compact, disk"),
], ids=lambda given: next(iter(given)) if isinstance(given, dict) else "")  # fmt: skip
def test_a_runtime_refuses_what_cannot_work(given: dict[str, Any], message: str) -> None:
    """Before there is one, not when its first session is made."""
    with pytest.raises(SettingsRefused, match=message):
        Runtime(tiny_chat.model(), tiny_chat.tokenizer(), cap="64MiB", **given)


@pytest.mark.parametrize("name", [3, "", ["a"]])
def test_a_name_that_is_none_is_refused(name: Any, tmp_path: Path) -> None:
    """By whoever gives one; the sessions that there are can be saved."""
    with tiny_chat.runtime(3) as made:
        session = tiny_chat.filled(made, 20)
        session.save(tmp_path)
        for call in (
            lambda: made.session(name=name),
            lambda: session.fork(name),
            lambda: made.load(tmp_path, name=name),
        ):
            with pytest.raises(SettingsRefused, match=r"^name=.*: give a text of one character at least"):
                call()
        assert made.sessions == [session]
        session.fork("other").save(tmp_path)
