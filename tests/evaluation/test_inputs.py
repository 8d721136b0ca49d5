"""What an evaluation is given: terms, the key of its settings, and the text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.contracts import Policy
from agentmem.errors import SettingsRefused
from agentmem.evaluation import Terms, default_text, passage, read_text
from agentmem.evaluation.kept import settings_key

TERMS = Terms(slots=64, keep_first=4, keep_recent=8, chunk=48)


@dataclass(frozen=True, slots=True)
class Slotted:
    """A part of a policy that has no ``__dict__``."""

    depth: int = 1


def test_options_of_a_part_with_slots_make_another_key() -> None:
    """A dataclass with slots hides its fields from ``vars``; the key sees them all the same."""
    budgets: list[Any] = [Slotted(), Slotted(), Slotted(2)]
    keys = []
    for part in budgets:
        policy = Policy("p", "-", "-", None)
        object.__setattr__(policy, "budgets", part)
        keys.append(settings_key(policy, TERMS))

    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe": "reply"}, "'reply' is unknown; did you mean 'replay'"),
        ({"probe": "replay+replay"}, "names a source twice"),
        ({"keep_first": -1}, "keep_first: .* \\(got -1\\)"),
    ],
)
def test_terms_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    """The message has the field and the value, and begins with neither twice."""
    with pytest.raises(SettingsRefused, match=message):
        Terms.of(**change)


def test_the_common_probe_leaves_the_rest_of_a_policys_queries_alone() -> None:
    """Only sources and tokens are replaced, and only where a policy asks for queries; the label stays."""
    terms = TERMS.model_copy(update={"probe": "replay:3+spread", "probe_tokens": 40})

    policy = terms.policy("am-halving[probe=live]")

    assert (str(policy.queries), policy.queries.tokens) == ("replay+spread", 40)
    assert policy.name == "am-halving[probe=live]"
    assert terms.policy("window").queries.parts == ()
    assert str(TERMS.policy("am-halving[probe=live]").queries) == "live"


class Characters:
    """A tokenizer: one token per character."""

    def __call__(self, text: str, **_: object) -> dict[str, torch.Tensor]:
        """Code points."""
        return {"input_ids": torch.tensor([[ord(character) for character in text]])}


def test_a_passage_begins_at_the_offset() -> None:
    """Offset counts characters; one token more than asked for is returned, to be predicted."""
    found = passage(Characters(), "abcdefgh", offset=2, tokens=3)  # type: ignore[arg-type]

    assert "".join(map(chr, found.tolist())) == "cdef"


@pytest.mark.parametrize(("offset", "tokens"), [(0, 8), (6, 2), (100, 1), (0, 0), (-1, 2)])
def test_a_text_that_is_too_short_is_refused(offset: int, tokens: int) -> None:
    """The message has both numbers."""
    with pytest.raises(SettingsRefused, match=str(tokens)):
        passage(Characters(), "abcdefgh", offset=offset, tokens=tokens)  # type: ignore[arg-type]


def test_the_shipped_text_is_there() -> None:
    """A few pages of plain prose, enough for the default number of tokens."""
    text = default_text()

    assert 20_000 < len(text) < 26_000
    assert text.isascii()


def test_bad_texts_are_refused(tmp_path: Path) -> None:
    """A missing file and one that is not UTF-8 are refused by name."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")

    with pytest.raises(SettingsRefused, match=r"nowhere\.txt"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(SettingsRefused, match="0xe9 at 3"):
        read_text(tmp_path / "latin.txt")
