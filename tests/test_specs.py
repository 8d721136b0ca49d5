"""The parser of specs, lists and mixtures: what is printed is read again, and what cannot be read is refused."""

from __future__ import annotations

import contextlib
import re
import tracemalloc
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem import plugins, specs
from agentmem.errors import SettingsRefused, UnknownPolicy
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.budgets.tabled import Tabled
from agentmem.queries import Queries
from agentmem.specs import Spec, Term

NAMES = st.from_regex(r"[a-z0-9_]+(-[a-z0-9_]+)*", fullmatch=True)
OPTIONS = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]*", fullmatch=True)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="[],"), min_size=1, max_size=12).map(str.strip)


def with_options(values: st.SearchStrategy[str]) -> st.SearchStrategy[Spec]:
    """Specs with up to four options of these values."""
    return st.builds(Spec, NAMES, st.dictionaries(OPTIONS, values, max_size=4))


SPECS = with_options(st.one_of(WORDS.filter(bool), with_options(WORDS.filter(bool)).map(str)))
"""Values are words or specs again."""
NUMBERS = st.floats(min_value=0, max_value=1e15)


@given(SPECS)
@settings(max_examples=200, deadline=None)
def test_a_printed_spec_is_read_as_it_was(spec: Spec) -> None:
    """Name and options, nested specs among them, come back, in their order; spaces around the parts are no part."""
    assert specs.parsed(str(spec), "policy") == spec
    assert list(specs.parsed(str(spec), "policy").options) == list(spec.options)
    assert specs.parsed(f"  {str(spec).replace(']', ' ] ')} ", "policy").name == spec.name
    assert specs.plain_name(str(spec)) == spec.name


@given(st.lists(SPECS.map(str), max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_printed_list_is_read_as_it_was(entries: list[str]) -> None:
    """Commas inside brackets separate nothing."""
    assert specs.entries(" , ".join(entries), "policies") == entries


@given(st.lists(st.builds(Term, st.from_regex(r"[a-z]+(-[a-z]+)*", fullmatch=True), NUMBERS, NUMBERS), min_size=1))
@settings(max_examples=60, deadline=None)
def test_a_printed_mixture_is_read_as_it_was(terms: list[Term]) -> None:
    """Shares and weights come back to the last bit, however small or large."""
    assert specs.mixture("+".join(map(str, terms)), "probe") == terms


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    """There is no other fault than a refusal."""
    for read in (specs.parsed, specs.entries, specs.mixture):
        with contextlib.suppress(ValueError):
            read(text, "policy")


@pytest.mark.parametrize("read", [specs.parsed, specs.entries, specs.mixture])
def test_a_text_is_bounded_in_length(read: object) -> None:
    """One character more than the limit is refused with both numbers; the limit itself is read."""
    assert callable(read)
    read("a" * specs.MAX_CHARACTERS, "policy")
    with pytest.raises(ValueError, match=r"policy 'aaa.*… has 4097 characters; 4096 are allowed"):
        read("a" * (specs.MAX_CHARACTERS + 1), "policy")


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (specs.parsed, f"a[{','.join(f'o{i}=1' for i in range(257))}]"),
        (specs.entries, ",".join("a" * 257)),
        (specs.mixture, "+".join("a" * 257)),
    ],
)
def test_a_text_is_bounded_in_parts(read: object, text: str) -> None:
    """So are options, entries and terms."""
    assert callable(read)
    with pytest.raises(ValueError, match=r"has 257 parts; 256 are allowed"):
        read(text, "policy")


def test_budgets_are_written_as_policies_are() -> None:
    """The same brackets inside a policy's option, the same suggestions, refusals and bounds."""
    assert plugins.policy("am-halving[budgets=pyramid[steepness=4],steps=1]").budgets.steepness == 4  # type: ignore[union-attr]
    budgets = by_name("calibrated[floor=0.5,any_weights=true]")
    assert isinstance(budgets, Tabled)
    assert (budgets.floor, budgets.any_weights) == (0.5, True)
    for text, message in (
        ("pyramid[steepnes=3]", "budgets 'pyramid' has no option 'steepnes'; did you mean 'steepness'"),
        (
            "pyramid[steepness=3",
            "budgets 'pyramid\\[steepness=3' cannot be read: its '\\[' is never closed; write name",
        ),
        ("pyramid;steepness=3", "'pyramid;steepness=3' is unknown; did you mean 'pyramid'"),
        ("p" * 5000, "has 5000 characters"),
    ):
        with pytest.raises(ValueError, match=message):
            by_name(text)


def test_a_table_named_by_digits_is_a_file() -> None:
    """Values are texts where the default is one."""
    with pytest.raises(SettingsRefused, match="123"):
        plugins.policy("am-halving[budgets=calibrated[table=123]]")


def test_names_are_suggested_everywhere() -> None:
    """The nearest known name, whatever is read."""
    with pytest.raises(ValueError, match="'replai' is unknown; did you mean 'replay'"):
        Queries.of("replai:2+live")
    with pytest.raises(UnknownPolicy, match="did you mean 'window'"):
        plugins.policy("Windo[steps=1]")


def test_reading_a_spec_again_leaves_nothing_behind() -> None:
    """What is learnt of a factory is kept: a second reading allocates a few kilobytes, not a table of all modules."""
    plugins.policy("window")
    tracemalloc.start()
    try:
        for _ in range(3):
            plugins.policy("window")
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


def test_values_are_checked_by_annotations() -> None:
    """Numbers, truth values, texts, None and what literals hold; ranges and other types are the factory's own."""

    def factory(
        *, share: float = 0.5, count: int | None = None, exact: bool = False, word: str = "", kind: Literal["a"] = "a",
        place: Path | None = None,
    ) -> None: ...  # fmt: skip

    fits: list[dict[str, object]] = [
        {"share": 1, "count": 3, "exact": True, "word": "x"}, {"count": None, "kind": "b", "place": 7, "other": 7},
    ]  # fmt: skip
    for values in fits:
        specs.check_values(values, factory, "p")
    for values, said in (
        ({"share": "yes"}, "p: share='yes' is a text, and the option takes a number; give one, such as 0.5"),
        ({"count": 1.5}, "p: count=1.5 is a number, and the option takes a whole number or None; give one"),
        ({"count": True}, "count=True is true or false"),
        ({"exact": 1}, "exact=1 is a whole number, and the option takes true or false; give one, such as false"),
        ({"word": 5}, "takes a text"),
        ({"kind": 5}, "takes a text; give one, such as a"),
        ({"share": [1]}, "is a list, and"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            specs.check_values(values, factory, "p")
