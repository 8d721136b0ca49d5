"""What is read with ``compact="after"``: compacted right then, apart from the rest, by what it says itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import agentmem.api
from agentmem.compaction.references import References
from agentmem.compaction.request import Request
from agentmem.errors import SettingsRefused
from agentmem.memory.store import LayerStore
from agentmem.reference_queries.probe import Probe
from agentmem.sessions import CompactionFinished, Session
from agentmem.sessions.turn import LEAST_SPAN
from agentmem.testing import tiny_model
from support import chat_templates, talk

SYSTEM, QUESTION = "You are terse.", "What is the capital of France?"
FACT = "The quick brown fox jumps over the lazy dog while it rains. "
ROOMY: dict[str, Any] = {"max_slots": 512, "chunk": 64}
POLICIES = ["window", "am-halving", "am-halving[probe=replay+spread]"]


class Watched:
    """The probes of a memory, each with the job that it was run for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.spans: list[Probe] = []
        self.whole: list[Probe] = []
        real = References.run

        def run(references: References, visit: Any) -> None:
            assert references.sequence.job is not None
            (self.whole if references.sequence.job.whole else self.spans).append(references.probe)
            real(references, visit)

        patch.setattr(References, "run", run)


@contextmanager
def begun(policy: str = "am-halving", **settings: Any) -> Iterator[Session]:
    """A session with a system prompt and a question."""
    with talk.session(policy=policy, **(ROOMY | settings)) as session:
        session.append("system", SYSTEM)
        session.append("user", QUESTION)
        yield session


def stores(session: Session) -> list[LayerStore]:
    """The stores of the only row."""
    return [store for store in session.memory.sequences[0].stores if store is not None]


def front(session: Session, slots: int) -> list[list[float]]:
    """The first keys and values of every head of every layer."""
    heads = [store.segment(head, 0, 0) for store in stores(session) for head in range(len(store.lengths))]
    return [column[:slots].flatten().tolist() for each in heads for column in (each.keys, each.values)]


# ---- how much stays


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("target", [0.25, 0.6, 20])
def test_a_document_is_compacted_right_after_it_was_read(policy: str, target: float) -> None:
    """To a fraction of it or to slots per head, piece by piece; what came before it stays bit for bit."""
    with begun(policy) as session:
        start = len(session.ids)
        session.append("user", QUESTION)  # the last token before the document is read with it
        before = front(session, start)
        begin = len(session.ids)
        reports = session.append("tool", FACT * 20, compact="after", target=target)
        tokens = len(session.ids) - begin
        share = target if target < 1 else target / tokens

        assert len(reports) == session.stats.compactions >= 3
        assert front(session, start) == before
        left, intact = 0, begin
        for report in reports:
            span, intact = report.tokens_seen - 8 - intact, report.tokens_seen - 8
            assert report.slots_before - report.slots_after == 4 * (span - math.ceil(share * span))
            left += math.ceil(share * span)
        spans = intact - begin
        assert spans >= tokens - 8 - LEAST_SPAN
        assert session.stats.total_slots == 4 * (session.memory.sequences[0].seen - spans + left)
        assert left <= share * spans + len(reports)
        assert len(talk.greedy(session, 5)) == 5


def test_several_results_are_one_document() -> None:
    """Tool results that are given together are compacted together."""
    with begun() as session:
        result = {"role": "tool", "content": FACT * 4, "name": "fox"}
        begin = len(session.ids)
        reports = session.extend([result, result], compact="after", target=0.25)
        tokens = len(session.ids) - begin
        assert session.stats.total_slots <= 4 * (begin + 8 + LEAST_SPAN + 0.25 * tokens + len(reports))


def test_a_text_outside_the_template_is_compacted_after_too() -> None:
    """``read`` takes the same options."""
    with begun() as session:
        reports = session.read(FACT * 8, compact="after", target=0.25, focus="fox")
        assert {report.queries for report in reports} == {"focus+replay"}
        assert session.stats.total_slots < 4 * 80


@pytest.mark.parametrize("times", [0, 1])
def test_a_short_text_is_left_as_it_is(times: int) -> None:
    """Fewer tokens than a span has, or than the recent window: nothing is compacted, nothing is refused."""
    with begun() as session:
        assert session.append("tool", "fox " * 3 * times, compact="after") == ()
        assert session.stats.compactions == 0


def test_what_is_pinned_in_a_document_stays() -> None:
    """A pattern's matches are no part of what is compacted, nor of what the fraction counts."""
    with begun(pin_pattern=r"code \d+") as session:
        begin = len(session.ids)
        reports = session.append("tool", FACT * 3 + "The code 4217 opens. " + FACT * 3, compact="after", target=0.25)
        row = session.memory.sequences[0]
        spans = [(low, high) for low, high in row.pins.spans if low >= begin]
        assert [session.tokenizer.decode(list(session.ids[low:high])) for low, high in spans] == [" The code 4217"]
        intact = begin
        for report in reports:
            start, intact = intact, report.tokens_seen - 8
            tokens = intact - start - row.pins.count(start, intact)
            assert report.slots_before - report.slots_after == 4 * (tokens - math.ceil(0.25 * tokens))
        for store in stores(session):
            for head in range(2):
                positions = store.segment(head, 0, 0).positions.tolist()
                assert all(at in positions for low, high in spans for at in range(low, high))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("target", [0.5, 0.2, 17])
def test_a_compaction_by_hand_leaves_what_it_is_told(family: Any, target: float) -> None:
    """That part of what is neither prefix, pinned nor recent, in the layers that are compacted; sliding ones do not."""
    tokenizer = chat_templates.tokenizer("chatml")
    model = talk.model() if family == "llama" else tiny_model(family, vocab_size=len(tokenizer))
    with agentmem.Runtime(model, tokenizer, cap="64MiB") as runtime:
        session = talk.audited(runtime.session("window", **talk.ROOMY, pin_request=False))
        session.append("system", SYSTEM)
        session.append("user", FACT * 6)
        pinned, seen = session.stats.pinned_tokens, session.memory.sequences[0].seen
        assert session.compact(target=target) is not None
        segment = seen - pinned - 8
        left = math.ceil(target * segment) if target < 1 else target
        kept = [store.lengths for store in stores(session) if store.spec.shape.window is None]
        assert kept == [[pinned + left + 8] * 2] * (2 if family == "llama" else 1)


# ---- larger than the cap


@pytest.mark.parametrize("policy", POLICIES)
def test_a_document_of_five_capacities_streams_through(policy: str) -> None:
    """Under a lease that is not a byte larger than 64 slots need, audited after every forward; all of it is read."""
    settings = talk.TIGHT
    plan = agentmem.api.plan(talk.model(), cap=1 << 30, policy=policy, **settings)
    lease = plan.resident_bytes + plan.workspace_bytes
    with begun(policy, **settings, share=lease) as session:
        document = FACT * 25
        start = len(session.ids)
        events = session.appending([{"role": "tool", "content": document}], compact="after", target=0.25)
        reports = [event.report for event in events if isinstance(event, CompactionFinished)]
        stats = session.stats
        assert stats.tokens - start > 5 * stats.capacity
        assert len(reports) == stats.compactions > 10
        assert (stats.pending, stats.lease_bytes, stats.capacity) == (1, lease, 64)
        assert max(report.bytes_peak for report in reports) <= stats.peak_bytes <= lease
        assert not any(report.faults for report in reports)
        assert session.transcript.entries[-1].text.count(FACT.strip()) == 25
        assert len(talk.greedy(session, 20)) == 20


def test_a_result_that_jumps_past_every_threshold() -> None:
    """Without ``compact="after"`` too: it is read in pieces, each made room for, and the turn goes on."""
    with begun(**talk.TIGHT) as session:
        assert session.stats.room > 30
        reports = session.append("tool", FACT * 40)
        assert len(reports) >= 8
        assert len(session.ids) > 8 * 64
        assert len(talk.greedy(session, 5)) == 5


def test_a_deadline_leaves_the_rest_for_later() -> None:
    """A document that was not read to its end is read by the next turn; nothing is lost or read twice."""
    with begun() as session:
        assert session.append("tool", FACT * 10, compact="after", deadline=0.0) == ()
        pending = session.pending
        assert len(pending) > 100
        talk.greedy(session, 2)
        assert session.transcript.ids == (*session.memory.sequences[0].ids, *session.pending)
        assert len(session.pending) == 1


# ---- by which queries, by which policy


@pytest.mark.parametrize("tight", [False, True])
def test_a_span_is_probed_by_its_own_content(tight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs again is the document itself and a focus, never what came before it, also while it streams through."""
    watched = Watched(monkeypatch)
    focus, words = "the lazy dog", talk.ids("the lazy dog")
    with begun("am-halving[probe=replay+spread]", **(talk.TIGHT if tight else ROOMY)) as session:
        start = len(session.ids)
        reports = session.append("tool", FACT * 20, compact="after", target=0.25, focus=focus)
        transcript = session.transcript.ids
        assert len(watched.spans) >= 3
        assert bool(watched.whole) == tight
        for probe in watched.spans:
            told, *pieces = probe.pieces
            assert (told.source, list(probe.ids[: told.stop])) == ("focus", words)
            assert pieces
            for piece in pieces:
                assert piece.span is not None
                assert piece.span[0] >= start
                assert probe.ids[piece.start : piece.stop] == transcript[slice(*piece.span)]
        assert {report.queries for report in reports} <= {"focus+replay+spread", "replay+spread"}


@pytest.mark.parametrize("own", [True, False])
def test_each_piece_is_probed_from_where_it_begins(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is no longer than the probe of the policy that compacts it, so that all of it runs again."""
    watched, policy = Watched(monkeypatch), "am-halving[probe_tokens=32]"
    with begun(policy if own else "window", extra_policies=() if own else (policy,)) as session:
        intact = len(session.ids)
        reports = session.append("tool", FACT * 20, compact="after", policy=policy)
        for report, probe in zip(reports, watched.spans, strict=True):
            (piece,) = probe.pieces
            assert piece.span is not None
            assert piece.span[1] == report.tokens_seen
            assert piece.span[0] <= max(intact, report.tokens_seen - 32)
            assert report.tokens_seen - 8 - intact <= 32
            intact = report.tokens_seen - 8


def test_another_policy_compacts_what_is_read() -> None:
    """One of the session's, by name; later compactions are the session's own again."""
    with begun("window", extra_policies=("am-halving",)) as session:
        reports = session.append("tool", FACT * 10, compact="after", policy="am-halving", focus="fox")
        assert {(report.policy, report.queries) for report in reports} == {("am-halving", "focus+replay")}
        later = session.compact(target=0.5)
        assert later is not None
        assert later.policy == "window"


@pytest.mark.parametrize(("policy", "how", "message"), [
    ("am-halving", {"target": 0.0}, "target=0.0: give a fraction between 0 and 1"),
    ("am-halving", {"target": 1.0}, "target=1.0"),
    ("am-halving", {"target": -3}, "target=-3"),
    ("am-halving", {"target": math.nan}, "target=nan"),
    ("am-halving", {"target": 300}, "leaves 256 slots per head in all"),
    ("am-halving", {"policy": "window"}, "planned for 'am-halving'"),
    ("am-halving", {"compact": "before"}, "write 'after'"),
    ("window", {"focus": "fox"}, "runs no probe"),
    ("full", {}, "never compacts"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_read(policy: str, how: dict[str, Any], message: str) -> None:
    """By name, with the value and the remedy; the session is as it was."""
    with begun(policy) as session:
        before = (list(session.ids), session.dialogue, session.stats)
        with pytest.raises(SettingsRefused, match=message):
            session.append("tool", FACT * 10, **({"compact": "after"} | how))
        assert (list(session.ids), session.dialogue, session.stats) == before
        assert len(talk.greedy(session, 3)) == 3


def test_a_session_that_never_compacts_refuses_to_compact_after() -> None:
    """``mode="off"``: before anything is read."""
    with begun(mode="off") as session, pytest.raises(SettingsRefused, match="mode='off'"):
        session.append("tool", FACT * 10, compact="after")


@pytest.mark.parametrize("before", ["", "Hi", SYSTEM], ids=["first of all", "behind two letters", "behind a prompt"])
def test_a_document_near_the_start_leaves_the_prefix_as_it_is(before: str, tmp_path: Path) -> None:
    """``keep_first`` is kept where a document reaches into it; the session can be saved and loaded."""
    with talk.session(policy="am-halving", **(ROOMY | {"keep_first": 24})) as session:
        if before:
            session.append("system", before)
        assert session.append("user", FACT * 10, compact="after", target=0.2)

        for store in stores(session):
            assert all(store.positions[start : start + 24].tolist() == list(range(24)) for start in store.starts)
        session.save(tmp_path)
        talk.runtime().load(tmp_path).close()


def test_a_request_for_a_span_never_reaches_into_the_prefix() -> None:
    """A memory's own ``compact`` with a start inside the prefix begins behind it."""
    with talk.session(policy="window", **(ROOMY | {"keep_first": 24})) as session:
        session.read(FACT * 4)
        session.engine.compact(session.memory.sequences[0], Request(slots=16, start=0))

        for store in stores(session):
            assert all(length == 24 + 16 + 8 for length in store.lengths)
            assert all(store.positions[start : start + 24].tolist() == list(range(24)) for start in store.starts)
