"""Conversations: what is appended and written is what one prefill of it all gives; what is refused changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import agentmem
from agentmem.errors import SettingsRefused, UnsupportedGeneration
from agentmem.reporting.report import SummaryReport
from agentmem.sessions import Session
from support import chat_templates, talk

FAMILIES = sorted(chat_templates.FAMILIES)
TOLERANCE = 2e-5
SYSTEM, FIRST, SECOND = "You are terse.", "What is the capital of France?", "And of Italy? 🙂"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds one.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def state(session: Session) -> tuple[Any, ...]:
    """Everything of a session that a refusal must leave alone."""
    stats = session.stats.model_dump(exclude={"peak_bytes", "charged_bytes"})
    return list(session.ids), session.dialogue, list(session.entries), session.reply, stats, session.view.columns


def opened(session: Session, tokens: int) -> list[int]:
    """Stock's reply to a conversation in ChatML that no reply was opened in."""
    prompt = torch.tensor([[*session.transcript.ids, *talk.ids("<|im_start|>assistant\n")]])
    made = talk.model().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    return list(made[0, prompt.shape[1] :].tolist())


# ---- turns are one prefill


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_give_the_logits_of_one_prefill(family: str) -> None:
    """After messages, an ended reply and a cut one, the next logits are stock's for the whole conversation at once."""
    end = chat_templates.FAMILIES[family].ends[-1]
    with talk.session(family) as session:
        session.append("system", SYSTEM)
        for question in (FIRST, SECOND, "And of Spain?"):
            session.append("user", question)
            assert torch.allclose(
                talk.next_logits(session), talk.stock_logits(session, talk.model(family)), atol=TOLERANCE
            )
            said = talk.dictate("Paris." + end if question == FIRST else "It is", family)
            reply = session.generate(**said)
            assert reply.reason == ("end" if question == FIRST else "length")
            assert torch.allclose(
                talk.next_logits(session), talk.stock_logits(session, talk.model(family)), atol=TOLERANCE
            )
        assert session.stats.compactions == 0
        bos = chat_templates.FAMILIES[family].bos
        if bos is not None:  # Llama 2 writes it before every user's message
            assert session.transcript.text.count(bos) == (3 if family == "llama2" else 1)


@pytest.mark.parametrize("family", ["chatml", "gemma", "qwen3"])
def test_turns_are_stock_ids(family: str) -> None:
    """Messages and replies together are the ids that apply_chat_template gives for the whole conversation."""
    chat = [{"role": "system", "content": SYSTEM}]
    with talk.session(family) as session:
        session.append("system", SYSTEM)
        for question, answer in ((FIRST, "Paris."), (SECOND, "Rome."), ("And?", "")):
            session.append("user", question)
            chat.append({"role": "user", "content": question})
            if answer:
                session.generate(**talk.dictate(answer + chat_templates.FAMILIES[family].ends[0], family))
                chat.append({"role": "assistant", "content": answer})

        assert list(session.transcript.ids) == chat_templates.stock_ids(family, chat)


def test_the_default_model_talks_as_stock_does(default_model: tuple[Any, Any]) -> None:
    """With SmolLM2's own template: ids, replies and next logits of two turns are those of stock without a memory."""
    model, tokenizer = default_model
    chat: list[dict[str, str]] = []
    with agentmem.Runtime(model, tokenizer, cap="64MiB") as runtime:
        session = runtime.session()
        for role, text in (("system", SYSTEM), ("user", FIRST), ("user", "And of Italy?")):
            session.append(role, text)
            chat.append({"role": role, "content": text})
            if role == "user":
                reply = session.generate(max_new_tokens=9, do_sample=False)
                prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
                    "input_ids"
                ]
                expected = model.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)
                assert reply.ids == expected[0, prompt.shape[1] :].tolist()
                assert list(session.transcript.ids) == expected[0].tolist()
                chat.append({"role": "assistant", "content": reply.text})
        assert "Rome" in reply.text
        assert torch.allclose(talk.next_logits(session), talk.stock_logits(session, model), atol=2e-3)


@pytest.mark.parametrize("family", ["mistral", "llama2"])
def test_a_template_without_a_generation_prompt(family: str) -> None:
    """The model replies right after the user's message; the last id of what was appended was left for that."""
    with talk.session(family) as session:
        session.append("user", FIRST)
        assert session.stats.pending == 1
        expected = talk.stock(session, 5, family)
        assert talk.greedy(session, 5) == expected


def test_a_text_without_a_template_goes_on_like_stock() -> None:
    """``read`` takes texts and ids as they are; a reply to them opens no message."""
    with talk.session() as session:
        session.read("Once upon a time")
        session.read(talk.ids(" there was <|im_end|>"))
        assert list(session.ids) == talk.ids("Once upon a time") + talk.ids(" there was <|im_end|>")
        expected = talk.stock(session, 6)
        assert talk.greedy(session, 6) == expected
        assert [entry.kind for entry in session.transcript.entries] == ["text", "text", "reply"]


def test_tools_stand_where_the_template_puts_them_and_are_pinned() -> None:
    """Schemas, a call and two results read together are stock's ids; the schemas are pinned with the system prompt."""
    with talk.session("llama3", tools=[ADD], name="adder") as session:
        system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": "Add one to 1 and 2."}
        session.extend([system, user])
        call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        results = [{"role": "tool", "content": text, "name": "add", "tool_call_id": "abcdefghi"} for text in "23"]
        session.append("assistant", tool_calls=[CALL])
        session.extend(results)

        assert list(session.ids) == chat_templates.stock_ids("llama3", [system, user, call, *results], tools=[ADD])
        schema, entries = session.transcript.entries[0], session.transcript.entries
        assert "Adds one." in schema.text
        assert schema.pinned
        assert [entry.name for entry in entries[-2:]] == ["add", "add"]
        assert session.stats.pinned_tokens == sum(entry.stop - entry.start for entry in entries if entry.pinned)
        assert session.stats.name == "adder"


def test_entries_tile_the_transcript() -> None:
    """Every id belongs to one entry, in order, while a reply is open too; the texts of entries are the whole text."""
    with talk.session() as session:
        session.extend([{"role": "system", "content": SYSTEM}, {"role": "user", "content": FIRST}])
        session.generate(**talk.dictate("Paris.<|im_end|>"))
        session.read(" [noise] ")
        session.append("user", SECOND)
        session.generate(max_new_tokens=3, keep_open=True)
        session.say(" Wait,")
        transcript = session.transcript

        assert [entry.start for entry in transcript.entries] == [0, *(entry.stop for entry in transcript.entries[:-1])]
        assert transcript.entries[-1].stop == len(transcript.ids) == session.stats.tokens
        assert "".join(entry.text for entry in transcript.entries) == transcript.text
        assert transcript.text == session.tokenizer.decode(list(session.ids))
        assert [entry.kind for entry in transcript.entries].count("reply") == 2
        reply = next(entry for entry in transcript.entries if entry.kind == "reply")
        assert transcript.ids_of(reply) == tuple(talk.ids("Paris.<|im_end|>"))


def test_stats_are_a_moment_in_numbers() -> None:
    """Counts of tokens, slots and bytes are the memory's own, before and after a compaction."""
    with talk.session(**talk.TIGHT) as session:
        session.append("system", SYSTEM)
        before = session.stats
        session.append("user", FIRST * 12)
        stats, row = session.stats, session.memory.sequences[0]

        assert (before.compactions, before.total_slots) == (0, (before.tokens - 1) * 4)
        assert (stats.state, stats.policy, stats.capacity) == ("idle", "window", 64)
        assert stats.tokens == len(session.transcript.ids) == row.seen + stats.pending
        assert (stats.total_slots, stats.room, stats.next_position) == (row.held, row.room, row.next_position)
        assert stats.compactions == len(session.memory.compactions) > 1
        assert stats.pinned_tokens == len(chat_templates.stock_ids("chatml", [{"role": "system", "content": SYSTEM}]))
        assert stats.peak_bytes == session.memory.ledger.peak <= stats.lease_bytes == stats.charged_bytes
        session.close()
        assert session.stats.state == "closed"


def test_only_summaries_that_stand_are_in_the_transcript() -> None:
    """One that stands for more replaces those within it; they are no tokens of the session's."""
    with talk.session(**talk.TIGHT) as session:
        (report, *_) = session.append("user", FIRST * 12)
        before = session.transcript
        for start, stop, text in ((4, 30, "first"), (4, 50, "second"), (50, 60, "third")):
            made = SummaryReport(text=text, tokens=1, start=start, stop=stop, position=4, slots_before=9, slots_after=8)
            session.compacted(report.model_copy(update={"summary": made}))
        after = session.transcript
        assert (after.ids, after.text) == (before.ids, before.text)
        summaries = [(entry.start, entry.stop, entry.text) for entry in after.entries if entry.kind == "summary"]
        assert summaries == [(4, 50, "second"), (50, 60, "third")]


# ---- refusals


@pytest.mark.parametrize("options", [
    {"input_ids": torch.ones(1, 2, dtype=torch.long)},
    {"past_key_values": object()},
    {"streamer": object()},
    {"attention_mask": torch.ones(1, 2)},
    {"num_return_sequences": 2, "do_sample": True},
    {"num_beams": 2},
    {"max_new_token": 5},
    {"temperature": -1.0, "do_sample": True, "max_new_tokens": 3},
    {"guidance_scale": 2.0},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_an_option_that_cannot_be_served_changes_nothing(options: dict[str, Any]) -> None:
    """It is refused by name, and the session is as it was."""
    with talk.session() as session:
        session.append("user", FIRST)
        before = state(session)
        with pytest.raises(UnsupportedGeneration, match=next(iter(options))):
            session.generate(**options)
        assert state(session) == before
        expected = opened(session, 4)
        assert talk.greedy(session, 4) == expected


def test_nothing_to_reply_to_is_refused() -> None:
    """Before anything was read, and after an end that was kept open; messages then go on as if nothing was asked."""
    with talk.session() as session:
        before = state(session)
        with pytest.raises(SettingsRefused, match="nothing new"):
            session.generate()
        assert state(session) == before
        session.append("user", FIRST)
        session.generate(**talk.dictate("Paris.<|im_end|>", keep_open=True))
        before = state(session)
        with pytest.raises(SettingsRefused, match=r"session\.say"):
            session.generate()
        assert state(session) == before
        session.append("user", "Thanks.")
        chat = [("user", FIRST), ("assistant", "Paris."), ("user", "Thanks.")]
        stock = chat_templates.stock_ids("chatml", [{"role": role, "content": text} for role, text in chat])
        assert list(session.ids) == stock


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda session: session.append("usr", "x"), SettingsRefused, "did you mean 'user'"),
    (lambda session: session.extend([{"role": "user", "kind": "x"}]), SettingsRefused, "kind"),
    (lambda session: session.append("user", "x", pins=True), TypeError, "pins"),
    (lambda session: session.append("user", "x", compact="now"), SettingsRefused, "write 'after'"),
    (lambda session: session.append("user", "x", pin=True, compact="after"), SettingsRefused, "choose one"),
    (lambda session: session.append("user", "x", focus="y"), SettingsRefused, "compact='after'"),
    (lambda session: session.read([3, 1 << 40]), SettingsRefused, "no ids of this model"),
    (lambda session: session.compact(policy="nothing"), SettingsRefused, "this memory was planned for"),
    (lambda session: session.compact(target=2.0), SettingsRefused, "between 0 and 1"),
    (lambda session: session.pin(0, 1000), SettingsRefused, "not among the"),
], ids=lambda given: given if isinstance(given, str) else "")  # fmt: skip
def test_what_is_refused_changes_nothing(call: Any, error: type[Exception], message: str) -> None:
    """With a reply open, which goes on as before; the session is not left in mid-turn."""
    with talk.session() as session:
        session.append("user", FIRST)
        session.generate(max_new_tokens=2, do_sample=False, keep_open=True)
        before = state(session)
        with pytest.raises(error, match=message):
            call(session)
        assert state(session) == before
        assert session.stats.state == "idle"
        expected = talk.stock(session, 3)
        assert talk.greedy(session, 3)[-3:] == expected


@pytest.mark.parametrize(("name", "value", "message"), [
    ("pin_pattern", "(", "no regular expression"),
    ("pin_roles", ("sytem",), "pin_roles"),
    ("soft", 0.9, "soft"),
    ("share", 1.5, "no part"),
])  # fmt: skip
def test_a_setting_that_cannot_work_is_refused(name: str, value: Any, message: str) -> None:
    """By its name, before there is a session."""
    runtime = talk.runtime()
    before = list(runtime.sessions)
    with pytest.raises(SettingsRefused, match=message):
        runtime.session("window", **{name: value})
    assert runtime.sessions == before
