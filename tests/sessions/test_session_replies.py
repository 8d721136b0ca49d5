"""Replies: options of ``generate`` mean what they mean to stock, and text comes in whole characters."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

from agentmem.errors import MemoryClosed, SettingsRefused
from agentmem.sessions import Session
from agentmem.sessions.chat.text_decoder import UNFINISHED, TextPieces
from support import chat_templates, talk

QUESTION = "What is the capital of France?"
ODD = "Grüße 🙂, 日本語 👩‍👩‍👧 a\u0301 – ½"
END = "<|im_end|>"


def asked(session: Session, times: int = 1) -> Session:
    """The session with a question and an open reply, so that stock can go on from the same ids."""
    session.append("user", QUESTION * times)
    session.say("")
    return session


# ---- options are stock's


@pytest.mark.parametrize("options", [
    {},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 4},
    {"bad_words_ids": [[7], [9]], "forced_eos_token_id": 5},
    {"generation_config": GenerationConfig(max_new_tokens=9, suppress_tokens=list(range(2, 30000)))},
    {"prefix_allowed_tokens_fn": lambda _row, ids: [11 + len(ids) % 7, 40]},
    {"do_sample": True, "temperature": 0.8, "top_k": 40},
    {"do_sample": True, "top_p": 0.9, "min_p": 0.01},
], ids=lambda options: "+".join(options) or "greedy")  # fmt: skip
def test_a_reply_is_stocks_token_by_token(options: dict[str, Any]) -> None:
    """Below the cap, with the same options and the same global seed, for two replies after each other."""
    given = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0} | options
    if "generation_config" in options:
        del given["max_new_tokens"]
    with talk.session() as session:
        for _ in range(2):
            asked(session)
            prompt = torch.tensor([session.transcript.ids])
            torch.manual_seed(5)
            expected = talk.model().generate(prompt, attention_mask=torch.ones_like(prompt), **given)
            torch.manual_seed(5)
            assert session.generate(**given).ids == expected[0, prompt.shape[1] :].tolist()
            assert session.stats.compactions == 0


def test_a_seed_of_its_own_is_reproducible_and_touches_nothing_else() -> None:
    """Equal seeds sample alike, others otherwise, and the global random state stays."""

    def sampled(seed: int) -> list[int]:
        with talk.session(seed=seed) as session:
            first = asked(session).generate(max_new_tokens=12, do_sample=True).ids
            return first + asked(session).generate(max_new_tokens=12, do_sample=True).ids

    before = torch.get_rng_state()
    assert sampled(3) == sampled(3) != sampled(4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("said", "options", "reason", "text"), [
    (f"Paris.{END} more", {}, "end", "Paris."),
    ("Paris. STOP here", {"stop_strings": "STOP"}, "stop", "Paris. STOP"),
    ("Paris. STOP here", {"generation_config": GenerationConfig(stop_strings=["nowhere", "ris."])}, "stop", "Paris."),
    ("one two three", {"eos_token_id": [2, 827]}, "end", "one"),
    ("one two three", {"max_new_tokens": 2}, "length", "one two"),
    ("one two three", {"max_time": 0.0}, "stop", "one"),
    ("one two three", {"eos_token_id": 827, "max_new_tokens": 2}, "end", "one"),
])  # fmt: skip
def test_what_ends_a_reply(said: str, options: dict[str, Any], reason: str, text: str) -> None:
    """An end of several, a stop string, the length, the time: the reason says which, and the next turn is in order."""
    assert talk.ids(" two") == [827]
    with talk.session() as session:
        session.append("user", QUESTION)
        opened = len(session.ids) + len(talk.ids("<|im_start|>assistant\n"))
        reply = session.generate(**(talk.dictate(said) | options))
        assert (reply.reason, reply.text) == (reason, text)
        assert list(session.ids)[opened:] == reply.ids
        session.append("user", "Thanks.")
        closing = "\n" if reply.ids[-1] == talk.ids(END)[0] else END + "\n"
        assert list(session.ids)[opened + len(reply.ids) :] == talk.ids(f"{closing}<|im_start|>user\nThanks.{END}\n")
        assert talk.greedy(session, 3) == list(session.ids)[-3:]


def test_a_criterion_and_a_processor_of_the_caller_are_asked() -> None:
    """With the whole conversation, as stock asks them."""
    lengths: list[int] = []

    class Third(StoppingCriteria):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
            lengths.append(input_ids.shape[1])
            return torch.tensor([len(lengths) == 3])  # type: ignore[return-value]

    with talk.session() as session:
        asked(session)
        start = len(session.ids)
        reply = session.generate(stopping_criteria=[Third()], max_new_tokens=9, do_sample=False)
        assert (reply.reason, len(reply.ids)) == ("stop", 3)
        assert lengths == [start + 1, start + 2, start + 3]


# ---- a reply that is kept open


def test_budget_forcing_gives_exactly_the_ids() -> None:
    """Words take the place of an end that the model chose; what it writes then follows them, as stock would."""
    with talk.session() as session:
        asked(session)
        start = len(session.ids)
        first = session.generate(**talk.dictate(f"Paris.{END}", keep_open=True))
        session.say(" Wait,")
        assert list(session.ids)[start:] == talk.ids("Paris.") + talk.ids(" Wait,")
        expected = talk.stock(session, 6)
        second = session.generate(max_new_tokens=6, do_sample=False, keep_open=True)
        session.say(" So:")
        third = session.generate(**talk.dictate(f" yes{END}"))

        assert (first.ids, first.text, first.reason) == (talk.ids(f"Paris.{END}"), "Paris.", "end")
        assert second.ids == talk.ids("Paris.") + talk.ids(" Wait,") + expected
        assert third.ids == second.ids + talk.ids(" So:") + talk.ids(f" yes{END}") == list(session.ids)[start:]
        assert third.text == session.tokenizer.decode(third.ids, skip_special_tokens=True)
        session.append("user", "Thanks.")
        tail = talk.ids(f"\n<|im_start|>user\nThanks.{END}\n")
        assert list(session.ids)[start + len(third.ids) :] == tail


@pytest.mark.parametrize("keep_open", [False, True])
def test_a_message_ends_an_open_reply(keep_open: bool) -> None:
    """Whether it was kept open or not, the reply is closed once, and its entry holds all of it."""
    with talk.session() as session:
        asked(session)
        start = len(session.ids)
        reply = session.generate(max_new_tokens=4, do_sample=False, keep_open=keep_open)
        session.append("user", "Thanks.")
        assert list(session.ids)[start + 4 :] == talk.ids(f"{END}\n<|im_start|>user\nThanks.{END}\n")
        (entry,) = [entry for entry in session.transcript.entries if entry.kind == "reply"]
        assert session.transcript.ids_of(entry) == tuple(reply.ids)


@pytest.mark.parametrize("opened_by", ["say", "deadline", "end"])
def test_a_reply_may_be_empty(opened_by: str) -> None:
    """Opened and never written, or ended at once: its text is empty and the conversation goes on."""
    with talk.session() as session:
        session.append("user", QUESTION)
        if opened_by == "say":
            session.say("")
        elif opened_by == "deadline":
            assert session.generate(max_new_tokens=3, deadline=0.0).ids == []
        else:
            assert session.generate(**talk.dictate(END)).text == ""
        session.append("user", "Well?")
        chat = [("user", QUESTION), ("assistant", ""), ("user", "Well?")]
        stock = chat_templates.stock_ids("chatml", [{"role": role, "content": text} for role, text in chat])
        assert list(session.ids) == stock
        assert len(talk.greedy(session, 3)) == 3


@pytest.mark.parametrize("keep_open", [False, True])
def test_an_iterator_that_is_closed_at_the_end_token(keep_open: bool) -> None:
    """The end counts as sampled, so that nothing closes the reply twice; the text is whole up to there."""
    with talk.session() as session:
        asked(session)
        start = len(session.ids)
        events = session.stream(**talk.dictate(f"Paris.{END}"), keep_open=keep_open)
        assert any(event.type == "token" and event.id == talk.ids(END)[0] for event in events)
        events.close()  # type: ignore[attr-defined]  # a generator
        if keep_open:
            session.say(" Wait")
            assert list(session.ids)[start:] == talk.ids("Paris.") + talk.ids(" Wait")
            reply = session.generate(**talk.dictate(END))
            assert reply.text == "Paris. Wait"
        session.append("user", "Thanks.")
        assert session.transcript.text.count(f"{END}\n<|im_start|>user\nThanks.") == 1
        assert session.transcript.text.count(f"{END}{END}") == 0


def test_a_reply_that_was_returned_stays_as_it_was() -> None:
    """What goes on with an open reply is another value."""
    with talk.session() as session:
        asked(session)
        first = session.generate(max_new_tokens=2, do_sample=False, keep_open=True)
        ids, text = list(first.ids), first.text
        session.say(" and")
        second = session.generate(max_new_tokens=2, do_sample=False)
        assert (first.ids, first.text) == (ids, text)
        assert second.ids[:2] == ids


def test_only_an_idle_session_takes_words() -> None:
    """In mid-turn and after its end a session refuses what is said."""
    with talk.session() as session:
        session.append("user", QUESTION)
        events = session.stream(max_new_tokens=5, do_sample=False)
        next(events)
        with pytest.raises(SettingsRefused, match="mid-turn"):
            session.say("x")
        assert len(list(events)) > 4
        session.close()
        with pytest.raises(MemoryClosed):
            session.say("x")


# ---- events and text


def test_events_come_in_order_and_as_json() -> None:
    """Tokens before their text, a start before every finish, one end; all survive JSON through the union's adapter."""
    with talk.session(**talk.TIGHT) as session:
        read = list(session.appending([{"role": "user", "content": QUESTION * 12}]))
        asked(session)
        written = list(session.stream(max_new_tokens=60, do_sample=False))
        for events, reason in ((read, "read"), (written, "length")):
            kinds = [event.type for event in events]
            assert kinds.count("compaction_started") == kinds.count("compaction_finished") >= 1
            for one, other in pairwise(kinds):
                assert (one == "compaction_started") == (other == "compaction_finished")
                assert other != "text" or one == "token"
            assert talk.ended(events).reason == reason
            for event in events:
                assert talk.EVENTS.validate_json(talk.EVENTS.dump_json(event)) == event
        tokens = [event.id for event in written if event.type == "token"]
        assert tokens == list(session.ids)[-60:]
        assert "".join(event.text for event in written if event.type == "text") == talk.ended(written).text
        starts = [event for event in (*read, *written) if event.type == "compaction_started"]
        assert all(event.forced and event.policy == "window" and event.slots == 64 * 4 for event in starts)


def test_text_comes_in_whole_characters() -> None:
    """Pieces of a reply with characters of several tokens are the decoded reply, and none holds half a character."""
    written = talk.ids(ODD)
    assert any(UNFINISHED in session_text for session_text in _singly(written))
    with talk.session() as session:
        asked(session)
        events = list(session.stream(**talk.dictate(f"{ODD}{END}")))
        pieces = [event.text for event in events if event.type == "text"]
        assert "".join(pieces) == talk.ended(events).text == ODD
        assert not any(UNFINISHED in piece or not piece for piece in pieces)
        assert talk.ended(events).tokens == len(written) + 1


def _singly(ids: list[int]) -> list[str]:
    return [chat_templates.tokenizer("chatml").decode([each]) for each in ids]


@pytest.mark.parametrize("keep_open", [False, True])
def test_a_character_that_is_cut(keep_open: bool) -> None:
    """Shown as it is where the reply ends there; where the reply goes on, it comes when it is complete."""
    written = talk.ids("a🙂b")
    half = next(at for at in range(2, len(written)) if session_decode(written[:at]).endswith(UNFINISHED))
    with talk.session() as session:
        asked(session)
        first = list(session.stream(**talk.dictate(written[:half], keep_open=keep_open)))
        text = "".join(event.text for event in first if event.type == "text")
        assert text == talk.ended(first).text == ("a" if keep_open else session_decode(written[:half]))
        if keep_open:
            second = list(session.stream(**talk.dictate(written[half:])))
            assert "".join(event.text for event in second if event.type == "text") == "🙂b"
            assert talk.ended(second).text == "a🙂b"


def session_decode(ids: list[int]) -> str:
    """The text of ids."""
    return str(chat_templates.tokenizer("chatml").decode(ids))


def test_pieces_of_any_ids_are_their_text() -> None:
    """Random ids, bytes that are no characters and special tokens among them; begun anywhere."""
    generator = torch.Generator().manual_seed(1)
    tokenizer = chat_templates.tokenizer("chatml")
    for round_ in range(40):
        ids = torch.randint(0, 49152 if round_ % 2 else 300, (30,), generator=generator).tolist()
        for start in (0, 1, 13):
            pieces = TextPieces(tokenizer, ids[:start])
            text = "".join([*map(pieces.push, ids[start:]), pieces.rest()])
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            before = TextPieces(tokenizer)
            shown = "".join(map(before.push, ids[:start]))
            assert shown + text == whole
