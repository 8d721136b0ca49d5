"""Compaction items: latent memory behind an encrypted token, restored for whom it was made, refused to all others."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from openai.types.responses import CompactedResponse, Response, ResponseCompactionItem
from openai.types.responses.response_input_item import Message

from agentmem import Session
from agentmem.errors import RuntimeBusy, SettingsRefused
from agentmem.serving.items import read_keys
from agentmem.serving.server import Server
from agentmem.testing import tiny_model
from support import serving, tiny_chat
from support.responses import CALL, ROUTE, TOOL, body, events, respond
from support.serving import MODEL

COMPACT = "/v1/responses/compact"
LONG = "A long message of many words that fills more than half of all the slots there are."


async def compacted(http: Any, given: Any = None, **fields: Any) -> dict[str, Any]:
    """A compaction, checked against the SDK's models: the user's messages as inputs, then one item."""
    answer = await http.post(COMPACT, json={"model": MODEL, "input": given} | fields)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    *said, item = made["output"]
    CompactedResponse.model_validate(made | {"output": [item]}, strict=True)
    ResponseCompactionItem.model_validate(item, strict=True)
    assert all(Message.model_validate({k: v for k, v in each.items() if k != "id"}).role == "user" for each in said)
    return made


def user(text: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": text}


async def reply(http: Any, item: Any, text: str = "And now?", **fields: Any) -> Response:
    """What follows an item."""
    return await respond(http, [item, user(text)], **fields)


def cached(made: Response) -> int:
    """Tokens that were not read again."""
    assert made.usage is not None
    return made.usage.input_tokens_details.cached_tokens


async def test_an_item_is_the_memory_of_what_was_read() -> None:
    """What follows it is written from the same slots as by the session that was compacted."""
    of = serving.server(serving.runtime(3, policy="am-halving"))
    async with serving.client(of) as http:
        made = await compacted(http, LONG)
        user_message, item = made["output"]
        assert user_message["content"] == [{"type": "input_text", "text": LONG}]
        assert [each["slots_before"] > each["slots_after"] for each in made["agentmem"]["compactions"]][-1]

        with of.runtime.session(seed=0) as session:
            session.append("user", LONG)
            session.compact()
            session.append("user", "And now?")
            expected = session.generate(max_new_tokens=6, do_sample=False).text
        live = await respond(http, [*made["output"], user("And now?")])
        restored = await reply(http, item)

        assert live.output_text == restored.output_text == expected
        assert made["agentmem"]["session"] == live.agentmem["session"] != restored.agentmem["session"]  # type: ignore[attr-defined]
        assert cached(live) == cached(restored) == made["usage"]["total_tokens"]
        tiny_chat.audit(of.runtime)


async def test_a_cap_that_is_leased_while_an_item_is_saved_does_not_compact_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The save is tried again, and it alone."""
    of, tries, calls = serving.server(serving.runtime(3, policy="am-halving")), iter([True, False]), list[str]()
    make, compact = of.items.make, Session.compact

    def busy(*given: Any) -> tuple[str, str]:
        if next(tries):
            raise RuntimeBusy("leased")
        return make(*given)

    def counted(session: Session, **how: Any) -> Any:
        calls.append(session.name)
        return compact(session, **how)

    monkeypatch.setattr(of.items, "make", busy)
    monkeypatch.setattr(Session, "compact", counted)
    async with serving.client(of) as http:
        await compacted(http, LONG)
    assert len(calls) == 1
    assert next(tries, None) is None


async def test_an_item_outlives_its_server(tmp_path: Path) -> None:
    """After a restart, with another key in front of the one it was made with, it restores the same memory."""
    texts = []
    item: Any = None
    for _ in range(2):
        of = serving.server(serving.runtime(3, policy="am-halving"), state=tmp_path)
        async with serving.client(of) as http:
            item = item or (await compacted(http, LONG))["output"][-1]
            made = await reply(http, item, prompt_cache_key="fresh", agentmem={})
            texts.append((made.output_text, cached(made) > 0))
        shutil.rmtree(tmp_path / "conversations")
        keys = tmp_path / "items.key"
        keys.write_bytes(Fernet.generate_key() + b"\n" + keys.read_bytes())

    assert texts[0] == texts[1]
    assert texts[0][1]


def token_of(of: Server, **said: Any) -> dict[str, Any]:
    """A token of this server's own key that says something else."""
    item = next(iter(of.items.kept.names()))
    made = {"item": item, "owner": "local", "model": of.items._identity, "created": time.time()} | said
    return {"type": "compaction", "encrypted_content": of.items._cipher.encrypt(json.dumps(made).encode()).decode()}


async def test_items_that_are_not_ones_own_are_refused_by_name() -> None:
    """Forged, cut, expired, another key's, another model's, forgotten: each its own code and status, nothing read."""
    of = serving.server(serving.runtime(3))
    async with serving.client(of) as http:
        item = (await compacted(http, LONG))["output"][-1]
        token = item["encrypted_content"]
        wrong = [
            ({**item, "encrypted_content": Fernet(Fernet.generate_key()).encrypt(b"{}").decode()}, 400, "invalid"),
            ({**item, "encrypted_content": token[:-4] + "AAA="}, 400, "invalid"),
            ({**item, "encrypted_content": token[:40]}, 400, "invalid"),
            ({**item, "encrypted_content": "a readable summary"}, 400, "invalid"),
            ({**item, "encrypted_content": "x" * 100_000}, 400, "invalid"),
            (token_of(of, created=time.time() - of.settings.item_seconds - 1), 400, "expired"),
            (token_of(of, owner="somebody else"), 403, "foreign"),
            (token_of(of, model="0" * 64), 400, "other_model"),
            (token_of(of, item="0" * 32), 404, "forgotten"),
        ]
        for given, status, code in wrong:
            for path in (ROUTE, COMPACT):
                answer = await http.post(path, json={"model": MODEL, "input": [given, user("x")]})
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, f"compaction_{code}")
        assert len(of.runtime.sessions) == 1


async def test_another_key_cannot_use_an_item() -> None:
    """Bob has Alice's token, and learns nothing but that it is not his."""
    of = serving.server(serving.runtime(3), keys=serving.KEYS)
    async with serving.client(of, serving.KEYS[0]) as http:
        item = (await compacted(http, LONG))["output"][-1]
        headers = {"Authorization": f"Bearer {serving.KEYS[1]}"}
        answer = await http.post(ROUTE, json=body([item, user("What did Alice say?")]), headers=headers)

        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "compaction_foreign")
        assert cached(await reply(http, item)) > 0


async def test_an_item_of_another_model_is_refused(tmp_path: Path) -> None:
    """The same folder and keys under a server of other weights."""
    async with serving.client(serving.server(state=tmp_path)) as http:
        item = (await compacted(http, LONG))["output"][-1]
    other = serving.runtime(3, on=tiny_model("llama", num_hidden_layers=3, seed=9))
    async with serving.client(serving.server(other, state=tmp_path)) as http:
        answer = await http.post(ROUTE, json=body([item, user("x")]))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "compaction_other_model")


async def test_a_trigger_at_the_end_gives_exactly_one_item() -> None:
    """The stream of a coding client: one item, done, and completed; its response can be gone on from."""
    of = serving.server(serving.runtime(3, policy="am-halving"))
    async with serving.client(of) as http:
        found = await events(http, [user(LONG), {"type": "compaction_trigger"}])
        kinds = [each.type.removeprefix("response.") for each in found]
        assert kinds == ["created", "in_progress", "output_item.added", "output_item.done", "completed"]
        (item,) = found[-1].response.output
        assert item == found[-2].item
        assert item.type == "compaction"

        after = await respond(http, "And now?", previous_response_id=found[-1].response.id)
        assert after.output_text == (await reply(http, item.model_dump())).output_text
        assert cached(after) == found[-1].response.usage.total_tokens


async def test_a_threshold_compacts_by_itself() -> None:
    """Below it nothing; from it on one item before the reply, and again when as many tokens have come."""
    of = serving.server(serving.runtime(3, policy="am-halving"))
    management = [{"type": "compaction", "compact_threshold": 100}]
    async with serving.client(of) as http:
        kinds, previous = [], None
        for _ in range(5):
            made = await respond(
                http, "x" * 40, previous_response_id=previous, context_management=management, instructions="Be brief."
            )
            previous = made.id
            kinds.append([item.type for item in made.output])
            assert previous is None or len(kinds) == 1 or cached(made) > 0

        assert kinds[0] == ["message"]
        items = [at for at, each in enumerate(kinds) if each == ["compaction", "message"]]
        assert len(items) == 2
        assert items[1] - items[0] > 1


async def test_an_item_keeps_tools_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compacted with tools goes on with them, and is refused with others."""
    serving.dictated(monkeypatch, "Hello.", CALL)
    of = serving.server(serving.runtime(3, tools=True, slots=1024))
    async with serving.client(of) as http:
        first = await respond(
            http, "Hi", tools=[TOOL], agentmem={"keep_recent": 9}, instructions="Be brief.", max_output_tokens=50
        )
        said = [user("Hi"), *(each.model_dump() for each in first.output)]
        made = await compacted(http, said, instructions="Be brief.")
        assert made["usage"]["input_tokens_details"]["cached_tokens"] == first.usage.total_tokens  # type: ignore[union-attr]
        item = made["output"][-1]

        more = await reply(http, item, tools=[TOOL], instructions="Be brief.", max_output_tokens=100)
        assert [each.type for each in more.output] == ["function_call"]
        for fields in ({}, {"tools": [TOOL | {"name": "other"}]}, {"tools": [TOOL], "agentmem": {"keep_recent": 5}}):
            answer = await http.post(ROUTE, json=body([item, user("x")], **fields))
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "compaction_other_recipe")


async def test_compaction_needs_a_model_and_something_to_compact() -> None:
    """As the conformance suite of Open Responses has it: 400 without a model; and without any input."""
    async with serving.client(serving.server()) as http:
        missing = await http.post(COMPACT, json={"input": "x"})
        nothing = await http.post(COMPACT, json={"model": MODEL})
        assert (missing.status_code, missing.json()["error"]["param"]) == (400, "model")
        assert (nothing.status_code, nothing.json()["error"]["param"]) == (400, "input")


async def test_a_short_conversation_becomes_an_item_too() -> None:
    """Where there is nothing to reclaim, the item holds the memory as it is; a focus is taken where there is."""
    async with serving.client(serving.server(serving.runtime(3, policy="am-halving"))) as http:
        made = await compacted(http, "Hi", agentmem={"focus": "the door"})
        assert made["agentmem"]["compactions"] == []
        assert cached(await reply(http, made["output"][-1])) == made["usage"]["total_tokens"]
        focused = await compacted(http, LONG, agentmem={"focus": "the door"})
        assert len(focused["agentmem"]["compactions"]) >= 1


def older(of: Server) -> None:
    """Make every item ten seconds older: a file system may give the same time to two in a row."""
    kept = of.items.kept
    for name in kept.names():
        written = (kept.folder / name).stat().st_mtime
        os.utime(kept.folder / name, (written - 10, written - 10))


async def test_items_are_deleted_by_age_and_bytes() -> None:
    """The oldest go first, whenever one is made."""
    small = serving.server(serving.runtime(3), quota_bytes=1)
    async with serving.client(small) as http:
        items = [(await compacted(http, "One"))["output"][-1]]
        older(small)
        items.append((await compacted(http, "Two"))["output"][-1])
        gone = await http.post(ROUTE, json=body([items[0], user("x")]))
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "compaction_forgotten")
        assert cached(await reply(http, items[1])) > 0
    of = serving.server(serving.runtime(3))
    async with serving.client(of) as http:
        for text in ("One", "Two", "Three"):
            older(of)
            await compacted(http, text)
        kept = of.items.kept
        newest = max(kept.names(), key=lambda name: (kept.folder / name).stat().st_mtime_ns)
        size = sum(path.stat().st_size for path in (kept.folder / newest).rglob("*") if path.is_file())
        kept.sweep(1000, size - 1)
        assert list(kept.names()) == [newest]
        kept.sweep(-1, 1 << 30)
        assert list(kept.names()) == []


def test_keys_of_items_are_made_once_and_private(tmp_path: Path) -> None:
    """The file is made with one key that only the user can read; one that holds no keys is refused."""
    file = tmp_path / "deep" / "items.key"
    made = read_keys(file)
    assert read_keys(file) == made
    assert len(made) == 1
    assert file.stat().st_mode & 0o777 == 0o600
    for text in (b"", b"no key\n"):
        file.write_bytes(text)
        with pytest.raises(SettingsRefused):
            read_keys(file)
