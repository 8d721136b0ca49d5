"""Marks: which tokens a pattern names, against loops over characters, and what becomes of their queries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentmem import api, plugins
from agentmem.compaction.references import References
from agentmem.compaction.request import Request
from agentmem.contracts import Compaction, Compactor, Policy, Queries, Segment, SegmentShape
from agentmem.errors import SettingsRefused
from agentmem.hf import CappedCache
from agentmem.policies.am_recall import CRITICAL
from agentmem.reference_queries.patterns import Marks
from agentmem.reference_queries.probe import LEAD, SPAN, Probe
from support import tiny

PATTERNS = (r"\d+", r"[A-Z]\w*", "ab", "1 2", "b*", "$", r"\ba", "(?<=a)1", r"a.b", "(?s)a.*", r"\n", CRITICAL)
PIECES = st.lists(st.text("ab1 2X_\n", max_size=4), max_size=24)


def naive(pattern: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Character by character: every token that shares one with a match, and the token before the first of them."""
    owner = [token for token, piece in enumerate(pieces) for _ in piece]
    marked: set[int] = set()
    for match in re.finditer(pattern, "".join(pieces)):
        named = {owner[place] for place in range(match.start(), match.end())}
        if named:
            marked |= set(range(max(0, min(named) - 1), max(named) + 1))
    spans: list[tuple[int, int]] = []
    for token in sorted(marked):
        if spans and spans[-1][1] == token:
            spans[-1] = (spans[-1][0], token + 1)
        else:
            spans.append((token, token + 1))
    return spans


def marks(pattern: str, pieces: Sequence[str]) -> tuple[Marks, list[int]]:
    """Marks whose ids are indices of ``pieces``, and all the ids that they ever read."""
    asked: list[int] = []

    def read(ids: Sequence[int]) -> list[str]:
        asked.extend(ids)
        return [pieces[each] for each in ids]

    return Marks(pattern, read), asked


@pytest.mark.parametrize(
    ("pattern", "pieces", "spans"),
    [
        (r"\d+", ["the", " code", " is", " 12", "34", "."], [(2, 5)]),
        (r"\d+", ["12", " a", " b", " c", " 3"], [(0, 1), (3, 5)]),
        (r"\d+", ["1", " a", "2"], [(0, 3)]),
        (r"\d+", ["a", "", "", "1", "", "2", "", "b"], [(2, 6)]),
        ("Red Door", ["the", " R", "ed D", "oor", " is"], [(0, 4)]),
        ("x*", ["ab", "cd"], []),
        (r"\d+", [], []),
        (r"\d", ["", ""], []),
    ],
)
def test_a_match_names_its_tokens_and_the_one_before(
    pattern: str, pieces: list[str], spans: list[tuple[int, int]]
) -> None:
    """The token before asks for the first; matches that touch are one; empty matches and texts name none."""
    assert naive(pattern, pieces) == spans
    assert marks(pattern, pieces)[0].spans(range(len(pieces))) == spans


@pytest.mark.parametrize("pattern", PATTERNS)
@given(pieces=PIECES)
def test_spans_are_those_of_loops_over_characters(pattern: str, pieces: list[str]) -> None:
    """Tokens of any length, empty ones too, and matches over several of them; ascending and apart."""
    found = marks(pattern, pieces)[0].spans(range(len(pieces)))

    assert found == naive(pattern, pieces)
    assert all(0 <= low < high <= len(pieces) for low, high in found)
    assert all(one[1] < other[0] for one, other in pairwise(found))


@pytest.mark.parametrize("pattern", [r"\d+", "(?s)a.*", CRITICAL])
@given(pieces=PIECES, steps=st.lists(st.integers(0, 7), max_size=6))
def test_a_transcript_that_grows_is_read_once(pattern: str, pieces: list[str], steps: list[int]) -> None:
    """After every step the spans are those of the whole so far, and no id is read a second time."""
    growing, asked = marks(pattern, pieces)
    for stop in (*accumulate(steps), len(pieces), len(pieces)):
        seen = pieces[: min(stop, len(pieces))]
        seen = pieces[: max(len(seen), len(asked))]
        assert growing.spans(range(len(seen))) == naive(pattern, seen)
        assert asked == list(range(len(seen)))


@pytest.mark.parametrize("pattern", ["(", "*", "[z-a]", r"\k<x>"])
def test_what_is_no_regular_expression_is_refused(pattern: str) -> None:
    """With the pattern and what is wrong with it, wherever it is given."""
    said = re.escape(f"pattern: {pattern!r} is no regular expression: ")
    with pytest.raises(ValueError, match=said):
        replace(Queries.of("replay"), pattern=pattern)
    with pytest.raises(SettingsRefused, match=said):
        plugins.policy("am-halving", pattern=pattern)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_is_positive_and_finite(weight: float) -> None:
    """The message has the value and what would do."""
    with pytest.raises(ValueError, match=f"pattern_weight: {weight} is no weight; give a number above 0"):
        replace(Queries.of("replay"), pattern_weight=weight)


def test_a_pattern_needs_a_tokenizer() -> None:
    """It is matched against text, so a memory without one is refused before any work."""
    policy = plugins.policy("am-halving", pattern=r"\d")
    with pytest.raises(SettingsRefused, match=r"'am-halving' with 'pattern'.*needs a tokenizer"):
        api.wrap(tiny.llama(), cap=1 << 24, policy=policy, **tiny.SETTINGS)


# ---- end to end

FIRST_DIGIT = 120
SLOTS = 400
EVERY = 20
"""Two digits stand side by side in each of so many tokens."""
WEIGHT = 5.0


class Tokenizer:
    """A stub: ids from 120 on are digits, all others words."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """As the tests' other one."""
        return tiny.tokenizer(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids."""
        return self.batch_decode([ids])[0]

    def batch_decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of every row of ids."""
        return ["".join(self.piece(each) for each in row) for row in rows]

    @staticmethod
    def piece(token: int) -> str:
        """A digit, or a word."""
        return str(token - FIRST_DIGIT) if token >= FIRST_DIGIT else f" w{chr(97 + token % 26)}"


def text(count: int, seed: int = 0) -> torch.Tensor:
    """Random words ``[1, count]`` with two digits at 10 and 11 of every 20 tokens."""
    ids = tiny.ids(count, seed) % (FIRST_DIGIT - 3) + 3
    digits = torch.arange(count) % EVERY // 2 == 5
    return torch.where(digits, FIRST_DIGIT + ids % 8, ids)


def marked(count: int) -> list[tuple[int, int]]:
    """The spans of such a text: the two digits and the word before them."""
    return [(low, low + 3) for low in range(9, count - 2, EVERY)]


@dataclass
class Spy(Compactor):
    """Another compactor that remembers the parts that it was given."""

    inner: Compactor
    parts: list[list[tuple[str, float, tuple[int, int] | None]]] = field(default_factory=list)
    needs_queries = True

    def workspace(self, shape: SegmentShape) -> int:
        """What the other needs."""
        return self.inner.workspace(shape)

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """Look, then hand over."""
        assert segment.weights == tuple(part.weight for part in segment.references)
        self.parts.append([(part.source, part.weight, part.span) for part in segment.references])
        return self.inner.compact(segment, slots)


def policy(probe: str, **options: Any) -> tuple[Policy, Spy]:
    """AM halving that names digits, and who watches its compactor."""
    made = plugins.policy("am-halving", probe=probe, pattern=r"\d+", pattern_weight=WEIGHT, **options)
    assert made.compactor is not None
    spy = Spy(made.compactor)
    return replace(made, compactor=spy), spy


@contextmanager
def capped(made: Policy, **settings: Any) -> Iterator[CappedCache]:
    """400 slots per head under the smallest cap; a refusal is an error."""
    settings = tiny.SETTINGS | {"max_slots": SLOTS, "chunk": 320, "on_failure": "raise"} | settings
    if "cap" not in settings:
        needed = api.plan(tiny.llama(), cap=1 << 30, policy=made, **settings)
        settings["cap"] = needed.resident_bytes + needed.workspace_bytes
    with api.capped(tiny.llama(), policy=made, tokenizer=Tokenizer(), **settings) as memory:
        memory.subscribe(lambda _: tiny.audit(memory.memory))
        yield memory


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Probe]]:
    """Every probe that is run, and how many tokens its row had seen."""
    found: list[tuple[int, Probe]] = []
    run = References.run

    def watched(self: References, visit: Any) -> None:
        found.append((self.sequence.seen, self.probe))
        run(self, visit)

    monkeypatch.setattr(References, "run", watched)
    return found


def test_queries_of_marked_tokens_weigh_more(probes: list[tuple[int, Probe]]) -> None:
    """A replay is cut where marks begin and end; the parts that a fit is given weigh 2 and, marked, 5 times as much."""
    made, spy = policy("replay*2", probe_tokens=200)
    with capped(made) as memory:
        tiny.feed(memory, text(601))
        assert all(report.faults == () for report in memory.compactions)
    assert [seen for seen, _ in probes] == [400, 600]
    for seen, probe in probes:
        spans = [piece.span for piece in probe.pieces if piece.span is not None]
        assert (spans[0][0], spans[-1][1]) == (seen - 200, seen)
        assert all(one[1] == other[0] for one, other in pairwise(spans))
        assert [span for span in spans if span in marked(seen)] == [m for m in marked(seen) if m[0] >= seen - 200]
        for piece, span in zip(probe.pieces, spans, strict=True):
            assert piece.weight == (2 * WEIGHT if span in marked(seen) else 2)
            assert list(probe.ids[piece.start : piece.stop]) == text(seen)[0, span[0] : span[1]].tolist()
    for parts, (_, probe) in zip(spy.parts[::2], probes, strict=True):
        given = [(source, weight, span and span[1]) for source, weight, span in parts]
        assert given == [(piece.source, piece.weight, piece.span and piece.span[1]) for piece in probe.pieces]


def test_a_pattern_that_matches_nothing_changes_nothing() -> None:
    """The slots are, to the bit, those of the policy without a pattern."""
    slots = []
    for pattern in ("", "nothing like this"):
        made = plugins.policy("am-halving", probe="replay+spread", probe_tokens=200, pattern=pattern)
        with capped(made) as memory:
            tiny.feed(memory, text(601))
            slots.append([run.keys.clone() for s in memory.memory.sequences[0].stores if s for run in s.runs()])
    assert all(torch.equal(one, other) for one, other in zip(*slots, strict=True))


def runs(probe: Probe) -> list[tuple[int, int]]:
    """The stretches of the transcript that a probe's ``spread`` pieces run again, in order."""
    found: list[tuple[int, int]] = []
    for piece in probe.pieces:
        if piece.source == "spread" and piece.span is not None:
            if found and found[-1][1] == piece.span[0]:
                found[-1] = (found[-1][0], piece.span[1])
            else:
                found.append(piece.span)
    return found


def test_spread_comes_by_marked_spans_first(probes: list[tuple[int, Probe]]) -> None:
    """As many as half of its tokens hold, with what leads up to them; other ones at other compactions; never a prefix.

    Of 160 tokens 80 hold seven spans of 3 and their 8 tokens of lead; the rest is one evenly spread span.
    """
    made, _ = policy("replay+spread", probe_tokens=320)
    with capped(made) as memory:
        tiny.feed(memory, text(1401))
        assert len(memory.compactions) == 6
    visited: list[set[tuple[int, int]]] = []
    for seen, probe in probes:
        short = [run for run in runs(probe) if run[1] - run[0] < SPAN]
        long = [run for run in runs(probe) if run[1] - run[0] >= SPAN]
        wanted = [(max(4, low - LEAD), high) for low, high in marked(seen) if high <= seen - 160]
        assert set(short) <= set(wanted)
        inside = sum(any(low <= lead and high <= stop for low, stop in long) for lead, high in wanted)
        assert 7 - inside <= len(short) <= 7
        assert sum(high - low for low, high in short) <= 80
        assert sum(high - low for low, high in long) == SPAN
        assert all(low >= 4 and high <= seen - 160 for low, high in runs(probe))
        visited.append(set(short))
    assert all(one != other for one, other in pairwise(visited))
    assert len(set.union(*visited)) >= 20


@pytest.mark.parametrize("probe", ["replay", "replay+spread", "self-study+replay+spread+live"])
def test_a_row_in_a_batch_is_the_row_alone(probe: str) -> None:
    """Each row's own transcript is read."""
    made, _ = policy(probe, probe_tokens=60)
    settings = {"max_new_tokens": 40, "do_sample": False}
    prompts, model = torch.cat((text(150, seed=1), text(157, seed=2)[:, 7:])), tiny.llama()
    with capped(made, max_slots=150, cap=1 << 24) as memory:
        together = model.generate(prompts, past_key_values=memory, **settings)
        assert len(memory.compactions) >= 2
    for row in range(2):
        with capped(made, max_slots=150) as memory:
            alone = model.generate(prompts[row : row + 1], past_key_values=memory, **settings)
        assert together[row].tolist() == alone[0].tolist()


def test_another_policy_s_pattern_is_its_own(probes: list[tuple[int, Probe]]) -> None:
    """A policy beside the memory's own marks what its pattern names, and the memory's own marks nothing for it."""
    made, _ = policy("replay")
    settings = tiny.SETTINGS | {"max_slots": SLOTS, "chunk": 320, "cap": 1 << 26}
    with api.capped(
        tiny.llama(), policy="am-halving", tokenizer=Tokenizer(), extra_policies=(made,), **settings
    ) as memory:
        tiny.feed(memory, text(300), pieces=100)
        row = memory.memory.sequences[0]
        memory.engine.compact(row, Request(slots=200, policy=made))
        tiny.feed(memory, text(60, seed=1), pieces=60)
        memory.engine.compact(row, Request(slots=180))
    (_, first), (_, second) = probes
    assert {piece.weight for piece in first.pieces} == {1.0, WEIGHT}
    assert {piece.weight for piece in second.pieces} == {1.0}
