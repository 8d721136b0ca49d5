"""The mixture of reference queries: how it is written, what is refused, and how tokens are shared."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentmem.contracts import Compaction, Compactor, HeadSegment, Policy, Segment, SegmentShape
from agentmem.policies.budgets.uniform import Uniform
from agentmem.queries import PROBING, STORED, WORDED, Part, Queries, Reference, Source

SOURCES = get_args(Source)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("replay", (("replay", 1, 1),)),
        ("replay+spread", (("replay", 1, 1), ("spread", 1, 1))),
        ("replay:3+spread:1*0.5", (("replay", 3, 1), ("spread", 1, 0.5))),
        (" live*2 + random:.25 ", (("live", 1, 2), ("random", 0.25, 1))),
    ],
)
def test_a_mixture_is_written_in_one_line(text: str, parts: tuple[tuple[str, float, float], ...]) -> None:
    """Sources are joined by +, each with its share after a colon and its weight after a star."""
    queries = Queries.of(text, 7)

    assert tuple((part.source, part.share, part.weight) for part in queries.parts) == parts
    assert queries.tokens == 7
    assert str(queries) == "+".join(source for source, _, _ in parts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "echo",
            r"probe: 'echo' is unknown; choose from replay, repeat, spread, transcript, focus",
        ),
        ("", r"probe: cannot read ''; write source\[:share\]\[\*weight\], as in replay:3\+spread"),
        ("replay+", r"probe: cannot read ''"),
        ("replay 3", r"probe: cannot read 'replay 3'"),
        ("replay:", r"probe: cannot read 'replay:'"),
        ("replay*1:2", r"probe: cannot read 'replay\*1:2'"),
        ("replay:-1", r"probe: cannot read 'replay:-1'"),
        ("Replay", r"probe: cannot read 'Replay'"),
        ("replay:0", r"probe: the share of 'replay' is 0\.0; give one above 0"),
        ("replay*0", r"probe: the weight of 'replay' is 0\.0; give one above 0"),
        ("replay:1.2.3", r"probe: cannot read 'replay:1\.2\.3'"),
        ("replay:.", r"probe: cannot read 'replay:\.'"),
        ("replay+live+replay", r"probe: replay\+live\+replay names a source twice; give each once, with a share"),
        ("focus", r"probe: 'focus' needs a text, what must stay recallable"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    """The message has what was written and what would do."""
    with pytest.raises(ValueError, match=message):
        Queries.of(text)


@pytest.mark.parametrize("tokens", [0, -3])
def test_no_tokens_are_refused(tokens: int) -> None:
    """A count is positive, or left to the plan."""
    with pytest.raises(
        ValueError, match=f"probe_tokens: {tokens} is too few or no whole number; give at least 1, or None"
    ):
        Queries.of("replay", tokens)


@pytest.mark.parametrize("field", ["share", "weight"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_share_and_a_weight_are_positive_and_finite(field: str, value: float) -> None:
    """Whichever it is, the message names it with its value."""
    with pytest.raises(ValueError, match=f"probe: the {field} of 'live' is {value}; give one above 0"):
        Part("live", **{field: value})


def test_a_text_is_for_the_sources_that_say_something() -> None:
    """``repeat`` has an instruction of its own, ``focus`` needs the caller's, blanks are none; no other has a text."""
    assert Part("repeat").texts == WORDED["repeat"] != ()
    assert Part("repeat", text="say it again").texts == ("say it again",)
    replay, focus = Queries.of("replay+focus", focus="the door is red").parts
    assert (replay.texts, focus.texts) == ((), ("the door is red",))
    with pytest.raises(ValueError, match="'focus' needs a text"):
        Part("focus", text="  ")


def test_every_source_either_probes_or_stores() -> None:
    """Parts are told apart by what they cost; only a transcript's cost has no bound."""
    queries = Queries(tuple(Part(source, text="x" if source == "focus" else "") for source in SOURCES))

    assert set(SOURCES) == PROBING | STORED
    assert not PROBING & STORED
    assert {part.source for part in queries.probing} == PROBING
    assert {part.source for part in queries.stored} == STORED
    assert queries.outside_cap
    assert not Queries(tuple(part for part in queries.parts if part.source != "transcript")).outside_cap


def test_no_parts_are_no_queries() -> None:
    """Policies that need none say so by having none."""
    queries = Queries()

    assert (queries.parts, queries.probing, queries.stored, str(queries)) == ((), (), (), "none")
    assert not queries.outside_cap


@given(
    shares=st.lists(st.floats(0.01, 100), min_size=1, max_size=len(SOURCES)),
    order=st.permutations(SOURCES),
)
def test_shares_are_fractions_of_the_whole(shares: list[float], order: list[Source]) -> None:
    """They sum to 1 and are as the numbers that were given."""
    pairs = zip(order, shares, strict=False)
    parts = tuple(Part(source, share, text="x" if source == "focus" else "") for source, share in pairs)
    queries = Queries(parts)
    fractions = [queries.share(part) for part in parts]

    assert sum(fractions) == pytest.approx(1)
    assert all(
        fraction * shares[0] == pytest.approx(fractions[0] * share)
        for fraction, share in zip(fractions, shares, strict=True)
    )


class Needing(Compactor):
    """A compactor that cannot do without reference queries."""

    needs_queries = True

    def workspace(self, shape: SegmentShape) -> int:
        """Nothing."""
        return 0

    def compact(self, segment: Segment, slots: object) -> Compaction:
        """Nobody calls."""
        raise NotImplementedError


def test_a_policy_that_fits_to_queries_needs_some() -> None:
    """A compactor that says so is refused without parts, by name, before any work."""
    with pytest.raises(ValueError, match=r"policy 'mine': Needing fits to reference queries.*no parts.*'replay'"):
        Policy("mine", "-", "-", Needing(), Uniform())
    assert Policy("mine", "-", "-", Needing(), Uniform(), Queries.of("live")).queries.stored


def test_a_segment_hands_out_the_queries_of_one_head() -> None:
    """Views of each part's rows, as many as the group, with the parts' weights beside them."""
    parts = (torch.randn(6, 3, 2), torch.randn(6, 1, 2))
    references = (Reference(parts[0], 2.0, "replay", (10, 13)), Reference(parts[1], 0.5, "random"))
    head = HeadSegment(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4), torch.arange(4))
    segment = Segment(0, (head,) * 3, references, 1.0, torch.Generator(), 0)

    assert segment.group == 2
    assert segment.weights == (2.0, 0.5)
    assert [part.tokens for part in references] == [3, 1]
    for index in range(3):
        for mine, whole in zip(segment.queries(index), parts, strict=True):
            assert torch.equal(mine, whole[2 * index : 2 * index + 2])
            assert mine.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_a_segment_without_references_says_so() -> None:
    """A compactor that asks for queries nobody gave is told why there are none."""
    head = HeadSegment(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4), torch.arange(4))
    segment = Segment(0, (head,), (), 1.0, torch.Generator(), 0)

    assert segment.weights == ()
    with pytest.raises(ValueError, match="no reference queries: the policy's Queries has no parts"):
        segment.queries(0)
