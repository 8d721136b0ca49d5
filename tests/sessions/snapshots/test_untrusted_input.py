"""What a snapshot, a spec or a text says: no file of its naming is opened, and no search runs without a bound."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem import plugins
from agentmem.contracts import without_files
from agentmem.errors import RequestRefused, SettingsRefused, SnapshotRefused
from agentmem.policies.am_recall import CRITICAL
from agentmem.reference_queries.patterns import Marks
from agentmem.serving.recipes import Extension, Recipe
from agentmem.sessions.snapshots.manifest import FORMAT, Manifest, spelled
from agentmem.sessions.snapshots.recipe import Named
from agentmem.untrusted.json_text import parsed
from support import tiny_chat


@pytest.mark.parametrize("table", ["/dev/zero", "table.json"])
def test_no_file_that_a_snapshot_names_is_opened(table: str) -> None:
    """A policy that is made from a snapshot's words opens no table; the refusal names it."""
    with without_files(), pytest.raises(SettingsRefused, match="named by a snapshot"):
        plugins.policy(f"am-halving[budgets=calibrated[table={table}]]")


def test_a_table_that_is_no_plain_file_is_refused_unread() -> None:
    """A device has no end: what is no plain file of bounded size is not read."""
    with pytest.raises(SettingsRefused, match="no plain file"):
        plugins.policy("am-halving[budgets=calibrated[table=/dev/zero]]")


def test_a_pattern_of_a_snapshot_runs_with_the_callers_consent_only(tmp_path: Path) -> None:
    """A saved ``pin_pattern`` is refused until the caller gives one."""
    with tiny_chat.runtime(2) as made:
        tiny_chat.filled(made, 30, pin_pattern="a+").save(tmp_path)
        with pytest.raises(SnapshotRefused, match="brings pin_pattern='a\\+'"):
            made.load(tmp_path)
        for given in ("a+", ""):
            with made.load(tmp_path, pin_pattern=given) as loaded:
                assert loaded.settings.pin_pattern == given


def test_a_search_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exponential pattern is refused after a bounded time."""
    monkeypatch.setattr("agentmem.reference_queries.patterns.SECONDS", 0.2)
    text = "a" * 4000 + "!"
    with pytest.raises(SettingsRefused, match="took longer than"):
        Marks(r"(a|aa|aaa)+\1c?$", lambda ids: [text[each] for each in ids]).spans(range(len(text)))


def test_the_critical_pattern_is_linear_and_finds_identifiers() -> None:
    """A hundred thousand letters are searched at once; identifiers are found from their beginning, or behind digits."""
    text = "acgt" * 25_000
    assert Marks(CRITICAL, lambda ids: [text[each] for each in ids]).spans(range(len(text))) == []

    words = "abc_d 12abc3 plain"
    spans = Marks(CRITICAL, lambda ids: [words[each] for each in ids]).spans(range(len(words)))
    assert spans == [(0, 12)]


@pytest.mark.parametrize(
    "spec", ["am-halving[probe=replay:" + "1" * 4000 + "x]", "am-halving[" + "x" * (1 << 20) + "]"]
)
def test_a_long_spec_is_refused_at_once_and_in_few_words(spec: str) -> None:
    """Specs are bounded, and read in linear time; a refusal does not repeat them without end."""
    with pytest.raises(SettingsRefused) as refused:
        plugins.policy(spec)
    assert len(str(refused.value)) < 5000


@pytest.mark.parametrize("unit", [b"400,", b"]", b'"ab",'])
def test_a_text_of_too_many_values_is_refused_before_it_is_built(unit: bytes) -> None:
    """Values and closing brackets are counted in the bytes."""
    with pytest.raises(ValueError, match="the limit is"):
        parsed(b'{"row":[' + unit * (3 << 20) + b"0]}", 64 << 20)


@pytest.mark.parametrize("where", ["manifest", "settings", "tensors"])
def test_many_foreign_keys_are_refused_in_few_words(where: str) -> None:
    """A manifest with too many keys is refused by their number, before each is looked at."""
    keys = {f"{number:05x}": 1 for number in range(20_000)}
    body = {"format": FORMAT, "version": 1} | (keys if where == "manifest" else {where: keys})
    with pytest.raises(ValueError, match=f"{where} has .* keys; the limit is") as refused:
        Manifest.from_bytes(b'{"manifest":' + spelled(body) + b"}")
    assert len(str(refused.value)) < 200


FILE = "am-halving[budgets=calibrated[table=table.json]]"
PATTERN = "am-recall[pattern=(a|aa)+$]"


@pytest.mark.parametrize(("spec", "said"), [(FILE, "have files opened"), (PATTERN, "brings a pattern")])
def test_a_policy_that_a_snapshot_names_brings_no_file_and_no_pattern(spec: str, said: str) -> None:
    """The record of a policy is made again only if its words open no file and have no search of their own run."""
    plain = Named.of(plugins.policy("am-recall"))

    assert plain.again().name == "am-recall"
    with pytest.raises(SettingsRefused, match=f"{said}.*give it again"):
        plain.model_copy(update={"name": spec}).again()


@pytest.mark.parametrize(
    ("spec", "error", "said"), [(FILE, SettingsRefused, "have files opened"), (PATTERN, RequestRefused, "a pattern")]
)
def test_a_policy_that_a_client_names_brings_no_file_and_no_pattern(
    spec: str, error: type[Exception], said: str
) -> None:
    """A request is refused before its policy is used, and a kept recipe's policy opens no file either."""
    assert Recipe.of(Extension(policy="am-recall"), None).made_policy() is not None
    with pytest.raises(error, match=said):
        Recipe.of(Extension(policy=spec), None)
    if error is SettingsRefused:
        with pytest.raises(error, match=said):
            Recipe(spec).made_policy()
