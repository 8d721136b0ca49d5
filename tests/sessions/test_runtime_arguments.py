"""What a runtime and its sessions are made with: refused at once, by its name, and nothing is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import CapTooSmall, SettingsRefused, SnapshotRefused
from agentmem.sessions import Runtime
from support import tiny_chat


@pytest.mark.parametrize(("given", "message"), [
    ({"polcy": "window"}, "^polcy: no such setting; did you mean 'policy'"),
    ({"keep_recnt": 4}, "did you mean 'keep_recent'"),
    ({"policy": "windw"}, "did you mean 'window'"),
    ({"policy": None}, "^policy None is neither a name nor a Policy; give one of .*window"),
    ({"policy": 3}, "^policy 3 is neither"),
    ({"policy": "window[size=3]"}, "no option 'size'"),
    ({"keep_recent": -1}, "keep_recent"),
    ({"share": 2.0}, "share: 2.0"),
    ({"share": "50%"}, "^share: cannot read '50%'.*; a fraction is a number such as 0.5"),
    ({"share": "0.5"}, "^share: '0.5' is 0 bytes, and 0 is not positive; .* a fraction is a number"),
    ({"share": True}, "^share: give a fraction of the runtime's cap, such as 0.5, or bytes .got True"),
    ({"share": 0}, "^share: 0 is not positive"),
    ({"target": "0.5"}, "^target: '0.5' is 0 bytes, and 0 is not positive; .* a fraction is a number"),
    ({"target": "half"}, "^target: cannot read 'half'"),
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


@pytest.mark.parametrize("tokenizer", [None, "gpt2", object()])
def test_what_is_no_tokenizer_is_refused(tokenizer: Any) -> None:
    """The name of one among them."""
    with pytest.raises(SettingsRefused, match=r"^tokenizer=.* is no tokenizer; load .*AutoTokenizer"):
        Runtime(tiny_chat.model(), tokenizer, cap="64MiB")


@pytest.mark.parametrize(("given", "message"), [
    ({"policy": 3}, "^policy 3 is neither a name nor a Policy"),
    ({"policy": ""}, "^policy '' is unknown"),
    ({"extra_policies": [None]}, "^extra_policies: policy None is neither"),
    ({"extra_policies": "window"}, "^extra_policies=.window. is no list of policies; write"),
    ({"extra_policies": ["windw"]}, "^extra_policies: .*did you mean 'window'"),
    ({"extra_policies": 3}, "^extra_policies=3 is no list"),
    ({"tools": [lambda x: 1]}, "^tools: no schema can be made of .*docstring"),
    ({"tools": [3]}, "^tools: 3 is neither a JSON schema .* nor a function"),
    ({"tools": "x"}, "^tools='x': give a list of JSON schemas or functions"),
    ({"template_options": 3}, "^template_options=3: give a dict"),
    ({"template_options": {1: 2}}, "^template_options="),
    ({"before_compact": 3}, "^before_compact=3: give a function, or leave it out"),
    ({"after_compact": "x"}, "^after_compact='x': give a function"),
], ids=lambda given: next(iter(given)) if isinstance(given, dict) else "")  # fmt: skip
def test_a_session_refuses_what_cannot_work(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A new one, and one that is loaded; nothing is left of either."""
    with tiny_chat.runtime(3) as made:
        session = tiny_chat.filled(made, 20)
        session.save(tmp_path)
        for call in (made.session, lambda **given: made.load(tmp_path, **given)):
            with pytest.raises(SettingsRefused, match=message):
                call(**given)
        assert made.sessions == [session]


@pytest.mark.parametrize("place", ["", None, 3, b""])
def test_a_place_that_is_none_is_refused(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written to the current folder, and nothing is read from it."""
    monkeypatch.chdir(tmp_path)
    with tiny_chat.runtime(2) as made:
        session = tiny_chat.filled(made, 20)
        for call in (session.save, made.load):
            with pytest.raises(SettingsRefused, match=r"^url=.*: give the path of a folder, or a URL"):
                call(place)
        with pytest.raises(SettingsRefused, match=r"^spill=''"):
            Runtime(tiny_chat.model(), tiny_chat.tokenizer(), cap="64MiB", spill="")
        assert (list(tmp_path.iterdir()), session.stats.state, made.sessions) == ([], "idle", [session])


@pytest.mark.parametrize("of", [str, Path])
def test_a_tilde_is_the_users_folder(of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a session is saved, and where it is loaded from."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(here)
    with tiny_chat.runtime(3) as made:
        session = tiny_chat.filled(made, 20)
        session.save(of("~/saved"))
        assert (home / "saved" / "manifest.json").exists()
        assert not list(here.iterdir())
        assert list(made.load(of("~/saved")).ids) == list(session.ids)


def test_a_cap_that_cannot_be_read_is_refused_by_its_name() -> None:
    """As every setting is."""
    for cap, message in (
        ("4 bits", "^cap: cannot read '4 bits'"),
        (0, "^cap: 0 is not positive"),
        (None, "^cap: None"),
    ):
        with pytest.raises(SettingsRefused, match=message):
            Runtime(tiny_chat.model(), tiny_chat.tokenizer(), cap=cap)  # type: ignore[arg-type]  # that is the point


def test_a_share_that_is_too_small_is_named(tmp_path: Path) -> None:
    """With its bytes, those of the runtime, what would do, and the remedy: not another snapshot."""
    with tiny_chat.runtime(2) as made:
        with pytest.raises(
            CapTooSmall,
            match=rf"^share=1 is 1 bytes of the runtime's [\d.]+ KiB \({made.cap} bytes\): .* need \d+ bytes",
        ) as told:
            made.session(share=1)
        assert str(told.value).endswith("The cap of a session is its share: raise that, or the runtime's cap")
        tiny_chat.filled(made, 20).save(tmp_path)
        with pytest.raises(SnapshotRefused, match=r"share=0\.01 is [\d.]+ KiB .* of .* raise that") as refused:
            made.load(tmp_path, share=0.01)
        assert "nother snapshot" not in str(refused.value)
