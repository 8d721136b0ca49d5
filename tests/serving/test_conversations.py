"""Conversations that continue: only what is new is read, and nobody goes on from what is not theirs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from agentmem.errors import RequestRefused
from agentmem.serving.conversations import Conversation, Conversations
from agentmem.serving.history import digest, extends, marker
from agentmem.serving.recipes import Recipe
from agentmem.serving.turns import Request, Sampling, Turn
from agentmem.sessions import Message
from support import serving, tiny_chat

ROUTE, SESSION = "/v1/chat/completions", "X-Agentmem-Session"


class Talk:
    """A conversation of a client that sends all messages every time."""

    def __init__(self, http: Any, **fields: Any) -> None:
        self.http, self.fields, self.messages = http, fields, list[Any]()

    async def say(self, text: str, **headers: str) -> dict[str, Any]:
        """Say something; what the response has under ``agentmem``, with the cached tokens."""
        self.messages.append({"role": "user", "content": text})
        body = serving.chat("") | {"messages": self.messages} | self.fields
        answer = await self.http.post(ROUTE, json=body, headers={**headers})
        assert answer.status_code == 200, answer.text
        made = ChatCompletion.model_validate(answer.json())
        self.messages.append(made.choices[0].message.model_dump())
        assert answer.headers[SESSION] == answer.json()["agentmem"]["session"]
        usage = answer.json()["usage"]
        return {**answer.json()["agentmem"], "cached": usage["prompt_tokens_details"]["cached_tokens"], **usage}

    @property
    def text(self) -> str:
        """The newest reply."""
        return str(self.messages[-1]["content"])


async def test_only_what_is_new_is_read() -> None:
    """The second request finds the first one's tokens in the memory, and replies as if it had read all."""
    of = serving.server(serving.runtime(3, slots=512))
    async with serving.client(of) as http:
        held = Talk(http)
        first = await held.say("One")
        second = await held.say("Two")
        anew = Talk(http, prompt_cache_key="another")
        anew.messages = held.messages[:2]
        fresh = await anew.say("Two")

        assert (first["continued"], second["continued"], fresh["continued"]) == (False, True, False)
        assert second["cached"] == first["total_tokens"]
        assert second["read_tokens"] == second["prompt_tokens"] - first["total_tokens"]
        assert (fresh["cached"], fresh["prompt_tokens"]) == (0, second["prompt_tokens"])
        assert held.text == anew.text
        assert (second["session"], len(of.conversations)) == (first["session"], 2)


async def test_a_conversation_of_many_caps_goes_on() -> None:
    """Its prompts stay under the cap, every turn reads only what is new, and the response says what was compacted."""
    of = serving.server(serving.runtime(1))
    async with serving.client(of) as http:
        talk = Talk(http)
        facts = [await talk.say(f"Message number {at}, with some words.") for at in range(8)]

        assert facts[-1]["prompt_tokens"] > 5 * 64
        assert all(each["continued"] for each in facts[1:])
        assert facts[-1]["total_compactions"] == sum(len(each["compactions"]) for each in facts) > 3
        assert all(each["peak_bytes"] <= each["lease_bytes"] <= of.runtime.cap for each in facts)
        report = next(each["compactions"][0] for each in facts if each["compactions"])
        assert report["slots_after"] < report["slots_before"]
        tiny_chat.audit(of.runtime)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "Other"}]},
        {"agentmem": {"keep_recent": 7}},
        {"agentmem": {"policy": "am-halving"}},
        {"agentmem": {"pin_request": False}},
        {"prompt_cache_key": "other"},
        {"model": "gpt-4o-tiny"},
    ],
)
async def test_what_differs_is_not_continued(change: dict[str, Any]) -> None:
    """Another message, policy, setting or cache key is read from the start; another name of the model is not."""
    async with serving.client(serving.server(serving.runtime(3))) as http:
        talk = Talk(http)
        await talk.say("One")
        talk.messages[:1] = change.pop("messages", talk.messages[:1])
        talk.fields |= change
        facts = await talk.say("Two")

        assert facts["continued"] == ("model" in change)


async def test_a_request_is_pinned_unless_its_client_says_no() -> None:
    """The session that a request begins has the setting of the request; its reply written, nothing is pinned."""
    of = serving.server(serving.runtime(3, slots=512))
    async with serving.client(of) as http:
        for given in (None, True, False):
            await Talk(http, agentmem={} if given is None else {"pin_request": given}).say("One")
        sessions = of.runtime.sessions
        assert [each.settings.pin_request for each in sessions] == [True, True, False]
        assert [each.stats.request_tokens for each in sessions] == [0, 0, 0]


async def test_another_key_never_continues() -> None:
    """Bob sends Alice's messages, and her session's name: he reads them himself, under a session of his own."""
    of = serving.server(serving.runtime(3), keys=serving.KEYS)
    async with serving.client(of, serving.KEYS[0]) as http:
        alice = Talk(http)
        hers = await alice.say("One")
        bob = Talk(http)
        bob.messages = list(alice.messages)
        key = {"Authorization": f"Bearer {serving.KEYS[1]}"}
        his = await bob.say("Two", **key, **{SESSION: hers["session"]})
        again = await alice.say("Two")

        assert (his["continued"], his["cached"]) == (False, 0)
        assert (again["continued"], again["session"]) == (True, hers["session"])


async def test_a_name_pins_a_conversation() -> None:
    """A session that the client names goes on under its name; what does not extend it takes its place."""
    of = serving.server(serving.runtime(3))
    async with serving.client(of) as http:
        talk, other = Talk(http), Talk(http)
        name = {SESSION: "my-session"}
        assert (await talk.say("One", **name))["session"] == "my-session"
        assert (await talk.say("Two", **name))["continued"]
        facts = await other.say("Three", **name)
        assert (facts["continued"], facts["session"]) == (False, "my-session")
        assert not (await talk.say("Four", **name))["continued"]
        await other.say("Five", **name)
        assert (len(of.conversations), len(of.runtime.sessions)) == (1, 1)

        wrong = await http.post(ROUTE, json=serving.chat("x"), headers={SESSION: "a/b"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, SESSION)


async def test_a_named_conversation_in_mid_turn_is_409_and_an_unnamed_one_is_read_again() -> None:
    """Two requests that extend the same conversation at once never share a memory."""
    of = serving.server(serving.runtime(3, slots=512))
    async with serving.client(of) as http:
        talk = Talk(http)
        name = (await talk.say("One"))["session"]
        body = serving.chat("") | {"messages": [*talk.messages, {"role": "user", "content": "Two"}]}
        named = [http.post(ROUTE, json=body, headers={SESSION: name}) for _ in range(2)]
        free = [http.post(ROUTE, json=body) for _ in range(2)]
        first, second = await asyncio.gather(*named)
        third, fourth = await asyncio.gather(*free)

        assert sorted((first.status_code, second.status_code)) == [200, 409]
        assert (third.status_code, fourth.status_code) == (200, 200)
        assert third.json()["agentmem"]["session"] != fourth.json()["agentmem"]["session"]
        assert third.json()["choices"] == fourth.json()["choices"]


async def test_what_the_template_refuses_to_go_on_with_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal in mid-conversation is answered by reading everything from the start."""
    of = serving.server(serving.runtime(3))
    async with serving.client(of) as http:
        talk, twin = Talk(http), Talk(http)
        await asyncio.gather(talk.say("One"), twin.say("One"))
        assert len(of.conversations) == 2
        for held in of.conversations:
            assert held.session is not None
            monkeypatch.setattr(held.session, "template", None)
        facts = await talk.say("Two")

        assert not facts["continued"]
        assert len(of.conversations) == len(of.runtime.sessions) == 1


async def test_a_turn_that_is_ended_leaves_what_was_read() -> None:
    """The same request again goes on from it, and a longer one does not mistake the half reply for a whole one."""
    of = serving.server(serving.runtime(2, slots=512))
    message = Message.of(role="user", content="One")
    async with serving.client(of) as http:
        turn = Turn(of, Request("local", [message], sampling=Sampling(temperature=0, tokens=3000)))
        async for _ in turn.pieces():
            break
        await turn.stop()
        (held,) = of.conversations
        assert held.history[0] == digest(message)
        assert not held.busy
        talk, still_open = Talk(http), held.open
        facts = await talk.say("One")
        assert facts["continued"] == still_open
        assert (await talk.say("Two"))["continued"]


async def test_idle_conversations_are_forgotten_by_number_age_and_bytes() -> None:
    """The longest idle go first, and their memories are freed."""
    of = serving.server(serving.runtime(8), max_conversations=2)
    async with serving.client(of) as http:
        names = [(await Talk(http).say(f"{at}"))["session"] for at in range(3)]
        assert [each.id for each in of.conversations] == names[1:]
        assert len(of.runtime.sessions) == 2

        oldest, newest = of.conversations
        of.conversations.quota_bytes = newest.bytes
        assert newest.bytes > 0
        assert of.conversations.surplus() == [oldest]
        of.conversations.quota_bytes = 1 << 30
        newest.used = time.time() - of.settings.forget_after - 1
        assert of.conversations.surplus() == [newest]
        newest.busy = True
        assert of.conversations.surplus() == []
        newest.busy = False


async def test_conversations_outlive_their_server(tmp_path: Path) -> None:
    """After a graceful end a new server goes on from the memory, for the key it belongs to, with the same reply."""
    body: dict[str, Any] = {}
    replies, cached = [], []
    for state in (tmp_path / "kept", tmp_path / "kept", None):
        of = serving.server(serving.runtime(2, slots=512), keys=serving.KEYS, state=state)
        async with serving.client(of, serving.KEYS[0]) as http:
            talk = Talk(http)
            if not body:
                first = await talk.say("One")
                body = {"messages": talk.messages}
                continue
            other = Talk(http)
            other.messages, talk.messages = list(body["messages"]), list(body["messages"])
            his = await other.say("Two", Authorization=f"Bearer {serving.KEYS[1]}")
            cached.append(((await talk.say("Two"))["cached"], his["cached"]))
            replies.append((talk.text, other.text))

    assert cached == [(first["total_tokens"], 0), (0, 0)]
    assert len({text for pair in replies for text in pair}) == 1
    assert not list((tmp_path / "kept" / "conversations" / ".passing").glob("agentmem-*"))


async def test_a_kept_conversation_that_is_damaged_is_read_anew(tmp_path: Path) -> None:
    """Neither a broken record nor a broken memory ends a request."""
    talks = []
    for damage in (None, "memory", "record.json"):
        if damage is not None:
            for path in (tmp_path / "conversations").rglob("*"):
                if path.is_file() and damage in str(path.relative_to(tmp_path)):
                    path.write_bytes(b"{}")
        of = serving.server(serving.runtime(2), state=tmp_path)
        async with serving.client(of) as http:
            talk = Talk(http)
            talk.messages = list(talks[-1]) if talks else []
            facts = await talk.say("more")
            talks.append(talk.messages)
            assert (facts["continued"], facts["cached"]) == (False, 0)


def test_a_message_is_recognised_however_it_is_written() -> None:
    """Null, a list of parts and a dict of arguments say the same as their plain forms; other words do not."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": 2}'}}
    same = {**call, "function": {"name": "f", "arguments": {"a": 2, "b": 1}}}
    pairs = [
        ({"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "assistant", "tool_calls": [same]}),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "user", "content": "x"}),
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
    ]
    for one, other in pairs:
        assert digest(Message.of(**one)) == digest(Message.of(**other))
    others = [{"role": "user", "content": text} for text in ("x", "x ", "", "y")]
    assert len({digest(Message.of(**each)) for each in others}) == 4


def test_a_marker_stands_for_what_an_item_holds() -> None:
    """A request that begins with it wants what follows that place; any other must begin from the beginning."""
    held, anchors = ["a", "b", "c"], {marker("1"): 2}
    assert extends(held, ["a", "b", "c", "d"], anchors) == 3
    assert extends(held, [marker("1"), "c", "d"], anchors) == 2
    assert extends(held, [marker("1"), "d"], anchors) is None
    assert extends(held, [marker("2"), "c"], anchors) is None
    assert extends(held, ["a", "b"], anchors) is None


def test_the_longest_held_conversation_is_claimed() -> None:
    """Of two that fit, the one that holds more; a busy one is never claimed."""
    held = Conversations(9, 1 << 30, 60)
    short, long = (Conversation(name, "me", None, Recipe()) for name in ("short", "long"))
    short.history, long.history = ["a"], ["a", "b"]
    held.hold(short)
    held.hold(long)
    found, count = held.claim("me", Recipe(), ["a", "b", "c"])
    assert (found, count) == (long, 2)
    assert held.claim("me", Recipe(), ["a", "b", "c"]) == (short, 1)
    assert held.claim("me", Recipe(), ["a", "b", "c"])[1] == 0
    with pytest.raises(RequestRefused, match="mid-turn"):
        held.claim("me", Recipe(), ["a"], name="long")


def test_a_compaction_finds_what_it_names_without_instructions() -> None:
    """Held behind instructions that the request leaves out: only where any recipe will do, and never other words."""
    held = Conversations(9, 1 << 30, 60)
    one = Conversation("one", "me", None, Recipe(tools="[1]"), ["lead", "a", "b"])
    one.lead = "lead"
    held.hold(one)
    assert held.claim("me", Recipe(), ["a", "b", "c"], any_recipe=True) == (one, 2)
    held.release(one)
    for owner, wanted, any_recipe in (("me", ["a", "x"], True), ("me", ["a", "b"], False), ("you", ["a", "b"], True)):
        assert held.claim(owner, Recipe(tools="[1]"), wanted, any_recipe=any_recipe)[1] == 0
