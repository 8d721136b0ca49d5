"""Turns that end early, anywhere, for any reason: the session goes on as if they had not, or where they ended."""

from __future__ import annotations

import pytest
import torch

import agentmem
from agentmem.errors import MemoryClosed
from agentmem.hf.forward_context import FRAME
from agentmem.sessions.conversation import Interrupted, Watch
from agentmem.testing import tiny_model
from support import chat_templates, talk

SYSTEM, FIRST, SECOND = "You are terse.", "What is the capital of France?", "And of Italy? 🙂"


class _Cut:
    """Ends turns at the boundaries with these numbers, counted over all turns."""

    def __init__(self, patch: pytest.MonkeyPatch, at: frozenset[int]) -> None:
        self.count = 0
        real = Watch.check

        def check(watch: Watch) -> None:
            real(watch)
            self.count += 1
            if self.count in at:
                raise Interrupted("cancelled")

        patch.setattr(Watch, "check", check)


def _conversation(policy: str, *, at: frozenset[int] = frozenset()) -> tuple[list[int], list[int], int]:
    """Ids and reply of a conversation that is compacted again and again, cut at these boundaries and gone on with."""
    with pytest.MonkeyPatch.context() as patch, talk.session(policy=policy, **talk.TIGHT) as session:
        cut = _Cut(patch, at)
        session.append("system", SYSTEM)
        session.append("user", FIRST * 12)
        reply, left = session.generate(max_new_tokens=40, do_sample=False, keep_open=True), 40
        while (left := 40 - len(reply.ids)) > 0 and reply.reason == "cancelled":
            assert FRAME.get() is None
            reply = session.generate(max_new_tokens=left, do_sample=False, keep_open=True)
        assert session.stats.compactions >= 3
        return list(session.ids), reply.ids, cut.count


@pytest.mark.parametrize("policy", ["window", "am-halving"])
def test_a_turn_cut_anywhere_goes_on_as_if_it_had_not_been(policy: str) -> None:
    """Cut at any boundary (reading, between layers of a compaction, writing), the whole conversation is the same."""
    ids, reply, boundaries = _conversation(policy)
    assert boundaries > 50
    for start in range(7):
        cuts = frozenset(range(1 + start, boundaries, 7))
        assert _conversation(policy, at=cuts)[:2] == (ids, reply)


def test_a_closed_iterator_leaves_a_valid_session() -> None:
    """Closed at any event, a reply ends where it is, and what follows is what follows a reply of that length."""
    for events in range(1, 13):
        with talk.session(**talk.TIGHT) as session, talk.session(**talk.TIGHT) as other:
            for each in (session, other):
                each.append("user", FIRST * 5)
            found = session.stream(max_new_tokens=20, do_sample=False)
            seen = [next(found) for _ in range(events)]
            found.close()  # type: ignore[attr-defined]  # a generator
            written = [event.id for event in seen if event.type == "token"]
            if written:
                assert talk.greedy(other, len(written)) == written
            else:
                other.say("")
            for each in (session, other):
                each.append("user", SECOND)
            assert list(session.ids) == list(other.ids)
            assert talk.greedy(session, 8) == talk.greedy(other, 8)


def _rebased(*, close: bool) -> tuple[list[int], int]:
    """The ids of a reply that runs past the model's positions, and how often it was re-based."""
    model = tiny_model("llama", vocab_size=49152, max_position_embeddings=96)
    with agentmem.Runtime(model, chat_templates.tokenizer("chatml"), cap="64MiB") as runtime:
        session, count = runtime.session("window", rebase=True, **talk.TIGHT), 0
        session.append("system", SYSTEM)
        session.append("user", FIRST)
        session.say("")
        start = len(session.ids)
        while (left := start + 90 - len(session.ids)) > 0:
            events = session.stream(max_new_tokens=left, do_sample=False, keep_open=True)
            for event in events:
                count += event.type == "rebased"
                if event.type == "rebased" and close:
                    events.close()  # type: ignore[attr-defined]  # a generator
        return list(session.ids), count


def test_a_turn_closed_when_it_was_rebased_goes_on() -> None:
    """Whether a re-basing came with a compaction or with a token's forward, no token is lost and none comes twice."""
    ids, count = _rebased(close=False)
    assert count >= 1
    assert _rebased(close=True) == (ids, count)


def test_a_deadline_ends_reading_and_writing() -> None:
    """What was not read stays pending and is read by the next turn; a reply that has not begun can begin later."""
    with talk.session() as session:
        session.append("user", FIRST * 4, deadline=0.0)
        tokens = len(session.ids)
        assert session.stats.pending == tokens > 20
        empty = session.generate(max_new_tokens=5, do_sample=False, deadline=0.0)
        assert (empty.reason, empty.ids, empty.text) == ("deadline", [], "")
        assert session.stats.pending == len(session.ids) > tokens
        expected = talk.stock(session, 5)
        assert talk.greedy(session, 5, deadline=60.0) == expected
        assert len(session.ids) == tokens + len(talk.ids("<|im_start|>assistant\n")) + 5


def test_a_fault_while_a_token_is_chosen_can_be_tried_again() -> None:
    """What a logits processor raises comes out; the same call then writes what it would have written."""
    with talk.session(**talk.TIGHT) as session, talk.session(**talk.TIGHT) as other:
        for each in (session, other):
            each.append("user", FIRST * 7)

        def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                session.generate(max_new_tokens=5, logits_processor=[broken])
            assert session.stats.pending == 5
        assert talk.greedy(session, 30) == talk.greedy(other, 30)
        assert list(session.ids) == list(other.ids)
        assert session.stats.model_dump(exclude={"name"}) == other.stats.model_dump(exclude={"name"})


def test_a_closed_session_has_numbers_and_no_memory() -> None:
    """It shares nothing with anybody, and says that it is closed wherever its memory is asked for."""
    with talk.session() as session:
        session.append("user", FIRST)
        other = session.fork()
        assert [session.stats.shared_with, other.stats.shared_with] == [1, 1]
        session.close()
        assert [session.stats.shared_with, other.stats.shared_with] == [1, 0]
        other.close()
        assert (other.stats.shared_with, other.stats.state) == (0, "closed")
        for name in ("memory", "view"):
            with pytest.raises(MemoryClosed, match="is closed, or its memory is on disk"):
                getattr(other, name)
