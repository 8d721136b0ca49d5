"""What is untrusted is refused in few words and at little cost, whatever it holds and however much of it there is."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from agentmem import plugins
from agentmem.errors import AgentmemError, SettingsRefused, SnapshotRefused
from agentmem.evaluation.pictures import read_fidelity
from agentmem.policies.budgets.head_table import read_table
from agentmem.reporting.trace import read_trace
from agentmem.sessions.chat.dialogue import Message
from agentmem.sessions.settings import SessionSettings
from agentmem.sessions.snapshots.recipe import Made, check_settings
from agentmem.sessions.snapshots.session_state import Saved
from agentmem.sessions.snapshots.snapshot import _sequence_of
from agentmem.settings import Settings, parse_bytes
from agentmem.untrusted.files import read_plain
from agentmem.untrusted.json_text import MAX_KEYS, json_value, parsed
from agentmem.untrusted.texts import MAX_MESSAGE, bounded, faults, shown
from support.waiting import LIMIT

MANY = 300_000
WORDS = ["x"] * MANY
LONG = "y" * 1_000_000
KEYS = {f"key-{number}": 1 for number in range(MAX_KEYS)}
MADE = {"name": "n", "policy": {"name": "window", "parts": "0"}, "extra_policies": [], "template": "", "settings": {}}

HOSTILE: dict[str, Callable[[], object]] = {
    "a row's scales": lambda: _sequence_of({"row": {"scales": WORDS}}),
    "a row's lengths": lambda: _sequence_of({"row": {"layers": [{"lengths": WORDS, "biased": 1}] * 3}}),
    "a row's reports": lambda: _sequence_of({"row": {"compaction_reports": [{"layers": WORDS}] * 3}}),
    "a row's fields": lambda: _sequence_of({"row": KEYS}),
    "no row": lambda: _sequence_of({"row": LONG}),
    "a session's ids": lambda: Saved.of({"session": {"pending": WORDS, "entries": WORDS}}),
    "a session's messages": lambda: Saved.of({"session": {"dialogue": {"messages": WORDS}, "sampling": LONG}}),
    "a session's fields": lambda: Saved.of({"session": KEYS}),
    "how a session was made": lambda: Made.of(MADE | {"name": WORDS, "policy": LONG, "extra_policies": WORDS}, "here"),
    "a policy's name": lambda: Made.of(MADE | {"policy": {"name": LONG, "parts": LONG}}, "here"),
    "a session's settings": lambda: Made.of(MADE | {"settings": KEYS}, "here"),
    "a name of a setting": lambda: check_settings({LONG: 1}),
    "names of settings": lambda: check_settings(KEYS),
    "pinned names": lambda: SessionSettings.of(pin_names=[1] * MANY),
    "pinned roles": lambda: SessionSettings.of(pin_roles=WORDS),
    "a pattern": lambda: SessionSettings.of(pin_pattern="(a" * MANY),
    "a deep pattern": lambda: SessionSettings.of(pin_pattern="(" * 2000),
    "a policy's pattern": lambda: plugins.policy("am-recall", pattern=LONG),
    "a share": lambda: check_settings({"share": "9" * 5000}),
    "a large number of bytes": lambda: parse_bytes("9" * 400),
    "no number of bytes": lambda: parse_bytes(LONG),
    "a large setting": lambda: Settings.of(cap=1, seed=10**5000),
    "a long setting": lambda: Settings.of(cap=1, mode=LONG),
    "a message's role": lambda: Message.of(role=LONG, content=""),
    "a message's fields": lambda: Message.of(role="user", **KEYS),
    "a message's calls": lambda: Message.of(role="assistant", tool_calls=WORDS),
    "a call's arguments": lambda: Message.of(role="assistant", tool_calls=[_call("[" * MANY)]),
    "messages": lambda: Message.each(LONG),
    "a message": lambda: Message.each(WORDS),
}


def _call(arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_hostile_is_refused_in_few_words(kind: str) -> None:
    """Each refusal is an error of ours (or a ValueError that becomes one), short, at once, and without a huge copy."""
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(ValueError, match=r"\S") as refused:
            HOSTILE[kind]()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) <= MAX_MESSAGE
    assert time.thread_time() - began < LIMIT
    assert peak < 64 << 20


HEAD = b'{"version":1,"method":"","shares":[],"model":{"name":"m","fingerprint":"","kv_heads":'
DEEP, NUMBERS = b"[" * MANY, b"[" + b"1," * MANY + b"1]"
FILES: dict[str, tuple[Callable[[Path], object], list[bytes]]] = {
    "trace": (
        read_trace,
        [b"%b\n\n" % line for line in (DEEP, b"5", b'["kind"]', b'{"kind":"compaction","t":0,"layers":%b}' % NUMBERS)],
    ),
    "fidelity": (read_fidelity, [DEEP, NUMBERS, json.dumps(KEYS).encode(), b"\xff", b'[{"a":1}]']),
    "table": (read_table, [DEEP, b'{"version":"%b"}' % (b"1" * MANY), HEAD + NUMBERS + b"}}", HEAD + b"[1e999]}}"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_others_are_refused_in_few_words(kind: str, tmp_path: Path) -> None:
    """What is deep, long, of the wrong kind or no plain file is refused by name, and never by a traceback."""
    read, texts = FILES[kind]
    for number, text in enumerate(texts):
        path = tmp_path / str(number)
        path.write_bytes(text)
        with pytest.raises((SettingsRefused, ValueError), match=kind) as refused:
            read(path)
        assert len(str(refused.value)) <= MAX_MESSAGE
    with pytest.raises((SettingsRefused, ValueError), match="no plain file"):
        read(Path("/dev/zero"))


def test_a_message_is_bounded_whatever_it_quotes() -> None:
    """Every error of ours keeps its beginning and its end, where the remedy stands."""
    text = str(SnapshotRefused("the value " + LONG + "; load another snapshot"))

    assert len(text) == MAX_MESSAGE
    assert text.startswith("the value yyy")
    assert text.endswith("yyy; load another snapshot")
    assert str(AgentmemError("short")) == bounded("short") == "short"


def test_values_are_quoted_in_few_words() -> None:
    """Long texts, long lists and numbers that Python refuses to write are cut or named."""
    assert shown("a") == "'a'"
    assert shown(10**5000) == "<int of 16610 bits>"
    assert max(len(shown(value)) for value in (LONG, WORDS, KEYS, {"a": WORDS}, [[LONG]])) < 500


def test_few_faults_are_told_and_the_others_counted() -> None:
    """Each fault has its place, what is wrong and the value there; from a thousand on there is only their number."""

    class Point(BaseModel):
        places: dict[str, int]

    def told(count: int) -> str:
        given = {"places": dict.fromkeys(map(str, range(count)), "far")}
        with pytest.raises(ValidationError) as raised:
            Point.model_validate(given)
        return faults(raised.value, given)

    assert told(1).startswith("places.0: Input should be a valid integer")
    assert told(1).endswith("(got 'far')")
    assert told(9).endswith("; and 5 more")
    assert told(2000) == "2000 of its values are wrong"


def test_json_is_bounded_before_it_is_built() -> None:
    """Keys of one object are counted; strict JSON has no key twice, and no number that is none."""
    with pytest.raises(ValueError, match=f"an object of {MAX_KEYS + 1} keys; the limit is {MAX_KEYS}"):
        parsed(json.dumps(KEYS | {"one": "more"}).encode(), 1 << 30)
    assert json_value(b'[1, {"a": 1, "a": 2}, NaN]', 100, strict=False)[1] == {"a": 2}
    for wrong, said in ((b'{"a":1,"b":1,"a":2}', "key 'a' twice"), (b'{"a":NaN}', "NaN"), (b"[]", "type list")):
        with pytest.raises(ValueError, match=said):
            parsed(wrong, 100)


def test_a_plain_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    """A file of exactly the limit is read, one byte more is refused, and a folder is no file."""
    (tmp_path / "file").write_bytes(b"12345")

    assert read_plain(tmp_path / "file", 5) == b"12345"
    for path, most in ((tmp_path / "file", 4), (tmp_path, 100)):
        with pytest.raises(OSError, match=f"no plain file of at most {most} bytes"):
            read_plain(path, most)
