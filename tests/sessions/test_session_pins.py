"""Pinned messages, texts and patterns: their slots stay bit for bit, they count, and too many are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agentmem.errors import CapTooSmall, SettingsRefused, UnsupportedGeneration
from agentmem.sessions import Session
from agentmem.sessions.transcript import Entry
from support import chat_templates, talk

SYSTEM, QUESTION = "You are terse.", "What is the capital of France?"
NUMBERS = "one two three four five six seven eight nine ten eleven twelve"


def slots(session: Session, tokens: set[int]) -> dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, float]]:
    """Key, value and β of the slots at the positions of these tokens, by layer, head and position."""
    row = session.memory.sequences[0]
    tail = torch.frombuffer(row.tail, dtype=torch.int32) if row.tail else torch.empty(0)
    found = {}
    for layer, store in enumerate(row.stores):
        assert store is not None
        store.settle(tail)
        for head in range(len(store.lengths)):
            held = store.segment(head, 0, 0)
            for at, position in enumerate(held.positions.tolist()):
                if position in tokens:
                    key, value = held.keys[at].clone(), held.values[at].clone()
                    found[layer, head, position] = (key, value, float(held.bias[at]))
    return found


def kept(session: Session, tokens: set[int], more: Any, compactions: int = 4) -> None:
    """Go on until the memory was compacted so often; the slots of these tokens are as before, in every head."""
    before, done = slots(session, tokens), session.stats.compactions
    assert len(before) == len(tokens) * 4
    while session.stats.compactions < done + compactions:
        more()
    after = slots(session, tokens)
    assert after.keys() == before.keys()
    for at, (key, value, bias) in before.items():
        assert torch.equal(key, after[at][0])
        assert torch.equal(value, after[at][1])
        assert bias == after[at][2] == 0.0


def tokens_of(*entries: Entry) -> set[int]:
    """The tokens of entries that have been read: the last id of a conversation is not yet."""
    return {token for entry in entries for token in range(entry.start, entry.stop)}


@pytest.mark.parametrize("policy", ["window", "am-halving", "heavy-hitters"])
@pytest.mark.parametrize("pinned", ["roles", "names", "pin"])
def test_pinned_messages_keep_their_slots(policy: str, pinned: str) -> None:
    """By role, by name or by hand: through four compactions and more in every head of every layer."""
    settings: dict[str, dict[str, Any]] = {
        "roles": {"pin_roles": ("tool",)},
        "names": {"pin_names": ("adder",), "pin_roles": ()},
        "pin": {},
    }
    with talk.session(policy=policy, **talk.TIGHT, **settings[pinned]) as session:
        session.append("system", SYSTEM)
        session.append("user", QUESTION)
        session.append("tool", "4217", name="adder", pin=pinned == "pin")
        session.append("user", QUESTION)
        tool = next(entry for entry in session.transcript.entries if entry.role == "tool")
        system = session.transcript.entries[0]
        wanted = {"roles": {tool}, "names": {tool}, "pin": {tool, system}}[pinned]
        assert {entry for entry in session.transcript.entries if entry.pinned} == wanted
        assert session.stats.pinned_tokens == len(tokens_of(*wanted))
        kept(session, tokens_of(*wanted), lambda: talk.greedy(session, 12))
        assert session.stats.pinned_tokens == len(tokens_of(*wanted))


def test_a_pattern_pins_what_it_matches() -> None:
    """In every message that is appended: the tokens of each match and the one before, and nothing else."""
    with talk.session(**talk.TIGHT, pin_roles=(), pin_pattern=r"code \d+") as session:
        session.append("system", SYSTEM)
        session.append("user", f"My code 4217 is old. {QUESTION} The code 93 is new.")
        session.append("user", QUESTION)
        row = session.memory.sequences[0]
        texts = [session.tokenizer.decode(list(session.ids[start:stop])) for start, stop in row.pins.spans]
        assert texts == ["My code 4217", " The code 93"]
        assert not any(entry.pinned for entry in session.transcript.entries)
        tokens = {token for start, stop in row.pins.spans for token in range(start, stop)}
        kept(session, tokens, lambda: session.append("user", QUESTION))


def test_a_range_of_tokens_is_pinned() -> None:
    """Any tokens that no compaction has reached, the last one too, which is not read yet; others are refused."""
    with talk.session(**talk.TIGHT) as session:
        session.append("system", SYSTEM)
        session.append("user", QUESTION)
        end = len(session.ids)
        session.pin(14, 17)
        session.pin(end - 2, end)
        assert session.stats.pending == 1
        session.append("user", QUESTION)
        kept(session, {14, 15, 16, end - 2, end - 1}, lambda: session.append("user", NUMBERS))
        before = session.stats
        with pytest.raises(SettingsRefused, match="have been compacted"):
            session.pin(20, 23)
        with pytest.raises(SettingsRefused, match="not among the"):
            session.pin(len(session.ids), len(session.ids) + 1)
        assert session.stats == before


def test_replies_are_pinned_where_their_role_is() -> None:
    """What the model writes, and what was put into its mouth; a reply that no longer fits ends with an error."""
    with talk.session(**talk.TIGHT, pin_roles=("assistant",)) as session:
        session.append("system", SYSTEM)
        session.append("user", QUESTION)
        session.say("It is")
        written = session.generate(max_new_tokens=4, do_sample=False).ids
        session.append("user", QUESTION)
        reply = next(entry for entry in session.transcript.entries if entry.kind == "reply")
        assert reply.pinned
        assert session.transcript.ids_of(reply) == tuple(written)
        header = next(entry for entry in session.transcript.entries if entry.role == "assistant")
        assert header.pinned
        kept(session, tokens_of(header, reply), lambda: session.append("user", NUMBERS))
        with pytest.raises(CapTooSmall, match="pinned tokens"):
            session.generate(max_new_tokens=30, do_sample=False)
        assert 0 < len(session.transcript.ids_of(session.transcript.entries[-1])) < 30
        session.append("user", QUESTION)
        assert session.stats.pending == 1


def test_a_reply_that_is_refused_pins_nothing() -> None:
    """Its opening is taken back, and so is what was pinned of it."""
    with talk.session(**talk.TIGHT, pin_roles=("assistant",)) as session:
        session.append("user", QUESTION)
        before = (session.stats, list(session.memory.sequences[0].pins.spans))
        with pytest.raises(UnsupportedGeneration, match="num_beams"):
            session.generate(num_beams=2)
        assert (session.stats, list(session.memory.sequences[0].pins.spans)) == before


@pytest.mark.parametrize("way", ["pin", "role", "read", "range", "open"])
def test_pins_that_cannot_fit_are_refused(way: str) -> None:
    """With what they need and what there is; nothing was appended, pinned, read or closed."""
    with talk.session(**talk.TIGHT, pin_roles=("system", "tool")) as session:
        session.append("system", SYSTEM)
        session.append("user", QUESTION * 2)
        if way == "open":
            session.generate(max_new_tokens=2, do_sample=False, keep_open=True)
        before = (list(session.ids), session.dialogue, list(session.entries), session.reply, session.stats)
        pins = list(session.memory.sequences[0].pins.spans)
        calls: dict[str, Any] = {
            "pin": lambda: session.append("user", NUMBERS * 2, pin=True),
            "role": lambda: session.append("tool", NUMBERS * 2),
            "read": lambda: session.read(NUMBERS * 2, pin=True),
            "range": lambda: session.pin(9, len(session.ids)),
            "open": lambda: session.append("tool", NUMBERS * 2),
        }
        with pytest.raises(CapTooSmall, match=r"need \d+ slots per head, and a compaction leaves 32"):
            calls[way]()
        assert (list(session.ids), session.dialogue, list(session.entries), session.reply, session.stats) == before
        assert list(session.memory.sequences[0].pins.spans) == pins
        assert len(talk.greedy(session, 3)) >= 3


def test_what_is_pinned_counts_only_behind_the_prefix() -> None:
    """Tokens of the prefix are never compacted anyway, so a text that begins there needs so many slots fewer."""
    with talk.session(**talk.TIGHT) as session:
        session.read(talk.ids(NUMBERS)[:4] * 5, pin=True)  # 4 of 20 are the prefix: 4 + 16 + 8 + 1 of 32
        session.read(talk.ids(NUMBERS)[:3], pin=True)
        with pytest.raises(CapTooSmall, match="20 pinned tokens"):
            session.read(talk.ids(NUMBERS)[:1], pin=True)


@pytest.mark.parametrize("policy", ["window", "am-halving"])
def test_pins_longer_than_the_room_are_read_in_pieces(policy: str) -> None:
    """A pinned text that arrives when the memory is almost full: compactions come in between, none touches it."""
    with talk.session(policy=policy, **talk.TIGHT) as session:
        session.append("system", SYSTEM)
        session.append("user", QUESTION * 6)
        while session.stats.room > 4:
            talk.greedy(session, 1)
        start, compactions = len(session.ids), session.stats.compactions
        session.read(talk.ids(NUMBERS)[:12], pin=True)
        assert session.stats.compactions > compactions
        session.append("user", QUESTION)
        kept(session, set(range(start, start + 12)), lambda: session.append("user", NUMBERS))


def test_a_deferred_system_message_is_pinned_with_the_message_that_carries_it() -> None:
    """Gemma writes the system prompt into the user's first message; its own tokens are pinned all the same."""
    with talk.session("gemma", **talk.TIGHT) as session:
        session.append("system", SYSTEM)
        assert len(session.ids) == 0
        session.append("user", QUESTION)
        pinned = [entry for entry in session.transcript.entries if entry.pinned]
        assert [entry.role for entry in pinned] == ["system"]
        assert SYSTEM in pinned[0].text
        assert session.stats.pinned_tokens == len(tokens_of(*pinned))
        user = {"role": "user", "content": QUESTION}
        assert list(session.ids) == chat_templates.stock_ids("gemma", [{"role": "system", "content": SYSTEM}, user])
