"""The text of a probe: how many tokens of what, in which order, and whose queries they give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.queries import Part, Queries, Source
from agentmem.reference_queries.probe import SPAN, Piece, Probe, make_probe, spread_spans

LAW = settings(deadline=None, derandomize=True, max_examples=200)
TRANSCRIPT = range(1000, 1400)
"""400 tokens whose ids say where they stand: 1000 + place."""


def probe(
    text: str,
    tokens: int,
    *,
    seen: int = 400,
    prefix: int = 16,
    turn: int = 0,
    words: Mapping[Source, tuple[int, ...]] | None = None,
) -> Probe:
    """The probe of that mixture over the first ``seen`` tokens of the transcript."""
    queries = Queries.of(text, focus="a text")
    return make_probe(TRANSCRIPT[:seen], queries, tokens, words or {}, prefix=prefix, turn=turn)


def told(made: Probe) -> list[tuple[Source, int, tuple[int, int] | None]]:
    """Source, tokens and span of every piece."""
    return [(piece.source, piece.stop - piece.start, piece.span) for piece in made.pieces]


# ---- single sources


def test_replay_runs_the_newest_tokens_again() -> None:
    """As many as asked for, and their span says where they stand in the transcript."""
    made = probe("replay", 30)

    assert made.ids == tuple(range(1370, 1400))
    assert made.pieces == (Piece(0, 30, "replay", 1.0, (370, 400)),)


@pytest.mark.parametrize("text", ["replay", "repeat", "transcript"])
def test_a_short_transcript_is_run_whole(text: str) -> None:
    """Fewer tokens than asked for are all there are."""
    made = probe(text, 30, seen=5)

    assert made.ids == tuple(range(1000, 1005))
    assert told(made) == [(text, 5, (0, 5))]


def test_repeat_says_its_instruction_first() -> None:
    """The instruction takes part of the tokens; its queries have no span; the newest tokens follow."""
    made = probe("repeat", 10, words={"repeat": (7, 8, 9)})

    assert made.ids == (7, 8, 9, *range(1393, 1400))
    assert told(made) == [("repeat", 3, None), ("repeat", 7, (393, 400))]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_an_instruction_leaves_room_for_a_token(tokens: int) -> None:
    """However long it is, the newest token is there and the sum is kept."""
    made = probe("repeat", tokens, words={"repeat": tuple(range(50))})

    assert made.ids == (*range(tokens - 1), 1399)


def test_a_transcript_is_longer_than_any_plan() -> None:
    """Every token of it, whatever was planned; the others keep to their share."""
    assert probe("transcript", 8).ids == tuple(TRANSCRIPT)
    made = probe("transcript+replay", 8)
    assert told(made) == [("transcript", 400, (0, 400)), ("replay", 4, (396, 400))]


def test_a_focus_text_is_cut_to_its_share() -> None:
    """Its first tokens; they stand nowhere in the transcript."""
    made = probe("focus", 4, words={"focus": (7, 8, 9, 10, 11, 12)})

    assert made.ids == (7, 8, 9, 10)
    assert told(made) == [("focus", 4, None)]


def test_policies_that_store_queries_have_no_probe() -> None:
    """Nothing is run for parts that keep what the model itself asked."""
    assert probe("live+context+random", 100) == Probe((), ())
    assert told(probe("live:9+replay", 20)) == [("replay", 20, (380, 400))]


# ---- mixtures


def test_focus_comes_first_and_the_newest_tokens_last() -> None:
    """Whatever order the parts are written in, pieces follow each other without gaps."""
    words: dict[Source, tuple[int, ...]] = {"focus": (7, 8), "repeat": (9,)}
    for text in ("replay+repeat+spread+focus", "focus+spread+repeat+replay", "spread+replay+focus+repeat"):
        made = probe(text, 80, words=words)
        sources = [piece.source for piece in made.pieces]
        assert sources == ["focus", "spread", "repeat", "repeat", "replay"]
        assert made.pieces[0].start == 0
        assert all(one.stop == other.start for one, other in pairwise(made.pieces))
        assert made.pieces[-1].stop == len(made.ids)


def test_what_a_focus_text_leaves_goes_to_the_others() -> None:
    """A short text hands its remaining tokens on by the others' shares; alone it keeps them to itself."""
    short = probe("focus:2+replay:3+spread:1", 60, words={"focus": (7, 8, 9, 10)})
    assert told(short)[0] == ("focus", 4, None)
    assert sum(size for source, size, _ in told(short) if source == "spread") == 10 + 4
    assert told(short)[-1] == ("replay", 30 + 12, (358, 400))
    assert len(short.ids) == 60
    assert probe("focus", 60, words={"focus": (7, 8)}).ids == (7, 8)
    assert told(probe("focus+replay", 60)) == [("replay", 60, (340, 400))], "a text of no tokens hands on all"


def test_every_piece_has_its_part_s_weight() -> None:
    """Both pieces of an instructed part, and every span."""
    made = probe("replay*3+spread:20*0.25+repeat*2", 300, words={"repeat": (1, 2)})

    assert {(piece.source, piece.weight) for piece in made.pieces} == {("replay", 3), ("spread", 0.25), ("repeat", 2)}
    assert len([piece for piece in made.pieces if piece.source == "spread"]) == 4


MIXTURES = st.lists(
    st.tuples(st.sampled_from(["replay", "repeat", "spread", "focus"]), st.floats(0.05, 20)),
    min_size=1,
    unique_by=lambda item: item[0],
).map(lambda parts: Queries(tuple(Part(source, share, text="x") for source, share in parts)))
WORDS = st.fixed_dictionaries(
    {source: st.lists(st.integers(0, 99), max_size=30).map(tuple) for source in ("focus", "repeat")}
)


@LAW
@given(
    queries=MIXTURES,
    tokens=st.integers(1, 700),
    seen=st.integers(1, 1500),
    prefix=st.integers(0, 40),
    turn=st.integers(0, 50),
    words=WORDS,
)
def test_a_probe_keeps_to_its_plan(
    queries: Queries, tokens: int, seen: int, prefix: int, turn: int, words: dict[Source, tuple[int, ...]]
) -> None:
    """At most the tokens planned, one at least; ids are the transcript's at their spans; spans keep out of others'."""
    transcript = range(1000, 1000 + seen)
    made = make_probe(transcript, queries, tokens, words, prefix=min(prefix, seen), turn=turn)
    replayed = [piece.span for piece in made.pieces if piece.span and piece.source in ("replay", "repeat")]
    newest = min((start for start, _ in replayed), default=seen)

    assert len(made.ids) <= tokens
    for piece in made.pieces:
        assert piece.stop > piece.start
        if piece.span is not None:
            assert list(made.ids[piece.start : piece.stop]) == list(transcript[slice(*piece.span)])
        if piece.source == "spread":
            assert piece.span is not None
            assert min(prefix, seen) <= piece.span[0] < piece.span[1] <= newest
            assert piece.stop - piece.start <= SPAN or piece.span == (min(prefix, seen), newest)
    spans = sorted(piece.span for piece in made.pieces if piece.source == "spread" and piece.span)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    assert made == make_probe(transcript, queries, tokens, words, prefix=min(prefix, seen), turn=turn)


@LAW
@given(queries=MIXTURES, tokens=st.integers(1, 700))
def test_every_part_gets_its_share_and_no_token_is_lost(queries: Queries, tokens: int) -> None:
    """Texts and transcript without end: each part within one token of its share, and the sum is the plan's."""
    words: dict[Source, tuple[int, ...]] = {"focus": (1,) * 700, "repeat": (2,)}
    made = make_probe(range(10**6), queries, tokens, words, prefix=0, turn=0)
    sizes = {part.source: 0 for part in queries.parts}
    for piece in made.pieces:
        sizes[piece.source] += piece.stop - piece.start
    for part in queries.parts:
        wanted = tokens * queries.share(part)
        if part.source == "spread":  # whole spans
            wanted = max(0, wanted) if wanted < SPAN else wanted // SPAN * SPAN
            assert wanted - SPAN - 1 <= sizes["spread"] <= tokens * queries.share(part) + 1
        else:
            assert abs(sizes[part.source] - wanted) <= 1
    if all(part.source != "spread" for part in queries.parts):
        assert sum(sizes.values()) == len(made.ids) == tokens


MARKS = st.lists(st.tuples(st.integers(0, 1500), st.integers(1, 30)), max_size=8).map(
    lambda found: sorted((low, low + length) for low, length in found)
)


@LAW
@given(queries=MIXTURES, tokens=st.integers(1, 700), seen=st.integers(1, 1500), turn=st.integers(0, 50), marks=MARKS)
def test_marked_tokens_weigh_more_and_cost_no_more(
    queries: Queries, tokens: int, seen: int, turn: int, marks: list[tuple[int, int]]
) -> None:
    """The plan holds with marks too; a piece is marked whole or not at all, and weighs four times as much."""
    queries, transcript = replace(queries, pattern_weight=4.0), range(1000, 1000 + seen)
    marks = [(low, high) for low, high in marks if high <= seen]
    made = make_probe(transcript, queries, tokens, {}, prefix=0, turn=turn, marks=marks)
    weights = {part.source: part.weight for part in queries.parts}

    assert len(made.ids) <= tokens
    for piece in made.pieces:
        assert piece.span is not None
        assert list(made.ids[piece.start : piece.stop]) == list(transcript[slice(*piece.span)])
        inside = {any(low <= place < high for low, high in marks) for place in range(*piece.span)}
        assert len(inside) == 1
        assert piece.weight == weights[piece.source] * (4.0 if inside == {True} else 1.0)


def test_spread_comes_by_marked_tokens_first() -> None:
    """What a pattern names is run again with what leads up to it, though the turn's spans lie elsewhere."""
    queries = Queries.of("spread")
    plain = make_probe(range(2000), queries, 64, {}, prefix=16, turn=0)
    marked = make_probe(range(2000), queries, 64, {}, prefix=16, turn=0, marks=[(1500, 1510)])

    assert not {*range(1492, 1510)} & {*plain.ids}
    assert {*range(1492, 1510)} <= {*marked.ids}
    assert [piece.weight for piece in marked.pieces if piece.span == (1500, 1510)] == [queries.pattern_weight]


# ---- spans


def test_spans_lie_in_strata_and_move_with_the_turn() -> None:
    """Four spans of 64 in four quarters; the next compaction takes other places; the same turn the same ones."""
    turns = [spread_spans(100, 1100, 256, turn) for turn in range(3)]

    for spans in turns:
        assert [stop - start for start, stop in spans] == [SPAN] * 4
        assert [(start - 100) // 250 for start, _ in spans] == [0, 1, 2, 3]
        assert all(
            100 + 250 * quarter <= start and stop <= 350 + 250 * quarter for quarter, (start, stop) in enumerate(spans)
        )
    assert len({spans[0] for spans in turns}) == 3
    assert turns[1] == spread_spans(100, 1100, 256, 1)


@pytest.mark.parametrize(("first", "stop", "spans"), [(5, 5, []), (9, 5, []), (5, 9, [(5, 9)]), (0, 100, [(0, 100)])])
def test_all_of_a_short_text_is_one_span(first: int, stop: int, spans: list[tuple[int, int]]) -> None:
    """Nothing where there is nothing, everything where it fits."""
    assert spread_spans(first, stop, 100, 3) == spans


@LAW
@given(first=st.integers(0, 100), length=st.integers(1, 900), tokens=st.integers(1, 300))
def test_successive_turns_come_by_everywhere(first: int, length: int, tokens: int) -> None:
    """Every token is in some span after as many turns as a span has places, three times over; none is outside."""
    stop = first + length
    places = max(1, length // max(1, tokens // min(SPAN, tokens)) - min(SPAN, tokens) + 2)
    covered: set[int] = set()
    for turn in range(3 * places):
        for span in spread_spans(first, stop, tokens, turn):
            covered.update(range(*span))

    assert covered == set(range(first, stop))


@LAW
@given(first=st.integers(0, 100), length=st.integers(1, 5000), tokens=st.integers(1, 600), turn=st.integers(0, 10**6))
def test_spans_are_in_order_and_apart_at_every_turn(first: int, length: int, tokens: int, turn: int) -> None:
    """However late the turn: inside, ascending, not overlapping, at most so many tokens, and at least half of them."""
    spans = spread_spans(first, first + length, tokens, turn)
    ends = [end for span in spans for end in span]

    assert ends == sorted(ends)
    assert first <= ends[0]
    assert ends[-1] <= first + length
    assert all(stop - start >= 1 for start, stop in spans)
    assert min(length, tokens) / 2 <= sum(stop - start for start, stop in spans) <= tokens


# ---- references


def test_references_are_views_of_one_layer_s_queries() -> None:
    """Each piece's columns, with its weight, source and span; nothing is copied."""
    made = probe("focus*2+spread+replay", 30, words={"focus": (7, 8)})
    queries = torch.randn(len(made.ids), 6, 4).transpose(0, 1)
    references = made.references(queries)

    assert sum(each.tokens for each in references) == len(made.ids)
    for piece, each in zip(made.pieces, references, strict=True):
        assert torch.equal(each.queries, queries[:, piece.start : piece.stop])
        assert each.queries.untyped_storage().data_ptr() == queries.untyped_storage().data_ptr()
        assert (each.weight, each.source, each.span) == (piece.weight, piece.source, piece.span)
