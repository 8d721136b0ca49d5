"""Two servers, one state folder: a conversation goes on at whichever is asked, and never from what is not its own."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import AgentmemError, SettingsRefused
from agentmem.serving.items import read_keys
from agentmem.serving.kept import Kept
from agentmem.serving.server import Server
from agentmem.serving.settings import ServerSettings
from agentmem.serving.shelf import Shelf
from agentmem.sessions import Session
from support import serving
from support.responses import body, respond
from support.waiting import LIMIT, until

ROUTE, SESSION = "/v1/chat/completions", "X-Agentmem-Session"
BOB = {"Authorization": f"Bearer {serving.KEYS[1]}"}


@asynccontextmanager
async def two(state: Path, **settings: Any) -> AsyncIterator[tuple[tuple[Any, Any], tuple[Any, Any]]]:
    """Two servers that share a folder, and a client of Alice's for each."""
    made = [
        serving.server(serving.runtime(4, slots=512), serving.KEYS, state=state, shared=True, **settings)
        for _ in range(2)
    ]
    one, other = (serving.client(each, serving.KEYS[0]) for each in made)
    async with one as first, other as second:
        yield (made[0], made[1]), (first, second)


async def say(http: Any, messages: list[Any], text: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """One turn of a chat, whose messages grow; what was found and read, with the session and the reply."""
    messages.append({"role": "user", "content": text})
    answer = await http.post(ROUTE, json=serving.chat() | {"messages": messages}, headers=headers or {})
    assert answer.status_code == 200, answer.text
    made = answer.json()
    messages.append(made["choices"][0]["message"])
    facts: dict[str, Any] = made["agentmem"]
    return {**facts, "cached": made["usage"]["prompt_tokens_details"]["cached_tokens"], **made["usage"]}


def saves(of: Server) -> list[str]:
    """Names of all saves in the folder of the conversations."""
    return list(of.shelf.kept.names())


def test_what_is_shared_is_named(tmp_path: Path) -> None:
    """Without a folder there is nothing to share."""
    with pytest.raises(SettingsRefused, match="give state"):
        ServerSettings.of(models=("x",), shared=True)
    assert ServerSettings.of(models=("x",), shared=True, state=tmp_path).shared


async def test_a_conversation_goes_on_at_the_other_server(tmp_path: Path) -> None:
    """Turn by turn at another server, only what is new is read, and the replies are those of one server."""
    async with (
        two(tmp_path / "shared") as (_, https),
        serving.client(serving.server(serving.runtime(4, slots=512))) as lone,
    ):
        there: list[Any] = []
        here: list[Any] = []
        facts = [await say(https[at % 2], there, f"Words {at}") for at in range(5)]
        for at in range(5):
            await say(lone, here, f"Words {at}")

        assert [each["continued"] for each in facts] == [False, True, True, True, True]
        assert [each["cached"] for each in facts[1:]] == [each["total_tokens"] for each in facts[:-1]]
        assert len({each["session"] for each in facts}) == 1
        assert there == here


async def test_a_conversation_is_saved_before_its_turn_is_seen_to_end(tmp_path: Path) -> None:
    """What is on the disk when the answer comes suffices to go on: nothing waits for a graceful end."""
    async with two(tmp_path) as (of, (http, _)):
        talk: list[Any] = []
        first = await say(http, talk, "One")
        shutil.copytree(tmp_path, tmp_path.with_name("killed"))
        assert len(saves(of[0])) == 1
    async with two(tmp_path.with_name("killed")) as (_, (http, _)):
        second = await say(http, talk, "Two")
    assert (second["continued"], second["cached"]) == (True, first["total_tokens"])


async def test_a_turn_whose_answer_was_lost_is_repeated_from_where_it_began(tmp_path: Path) -> None:
    """The server saved the turn and died before its client saw the end: the turn alone is read and written again."""
    async with two(tmp_path) as (of, https):
        talk: list[Any] = []
        first = await say(https[0], talk, "One")
        before = list(talk)
        lost = await say(https[0], talk, "Two")
        again = await say(https[1], before, "Two")
        assert (again["continued"], again["cached"], again["read_tokens"]) == (
            True,
            first["total_tokens"],
            lost["read_tokens"],
        )
        assert before == talk
        third = await say(https[1], before, "Three")
        assert third["cached"] == again["total_tokens"]
        assert len(saves(of[0])) == 2


async def test_a_server_does_not_go_on_from_an_older_copy_of_its_own(tmp_path: Path) -> None:
    """What went on elsewhere is loaded when it comes back, in place of the session that is behind."""
    async with two(tmp_path) as (of, https):
        talk: list[Any] = []
        for at in (0, 1, 0, 0, 1):
            facts = await say(https[at], talk, "More")
        assert facts["continued"]
        assert [len(each.runtime.sessions) for each in of] == [1, 1]
        assert [len(each.conversations) for each in of] == [1, 1]


async def test_another_key_never_goes_on_from_a_save(tmp_path: Path) -> None:
    """Bob sends Alice's messages, her session's name and her response to the other server: he gets nothing of hers."""
    async with two(tmp_path) as (_, (one, other)):
        talk: list[Any] = []
        hers = await say(one, talk, "One")
        theirs = list(talk)
        his = await say(other, theirs, "Two", BOB | {SESSION: hers["session"]})
        assert (his["continued"], his["cached"]) == (False, 0)

        response = await respond(one, "A secret")
        item = (await one.post("/v1/responses/compact", json={"model": "tiny", "input": "Words"})).json()["output"][-1]
        gone = await other.post("/v1/responses", json=body("x", previous_response_id=response.id), headers=BOB)
        foreign = await other.post("/v1/responses", json=body([item]), headers=BOB)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "previous_response_not_found")
        assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "compaction_foreign")


async def test_a_name_finds_its_conversation_at_the_other_server(tmp_path: Path) -> None:
    """The newest save of that name goes on; what does not extend it takes its place for both servers."""
    async with two(tmp_path) as (_, (one, other)):
        talk, name = list[Any](), {SESSION: "mine"}
        first = await say(one, talk, "One", name)
        second = await say(other, talk, "Two", name)
        assert (second["continued"], second["cached"], second["session"]) == (True, first["total_tokens"], "mine")
        else_: list[Any] = []
        assert not (await say(other, else_, "Other words", name))["continued"]
        assert (await say(one, else_, "More", name))["continued"]


async def test_a_busy_conversation_is_not_loaded_beside_itself(tmp_path: Path) -> None:
    """Two requests at once that extend the same conversation never have one id in one server."""
    async with two(tmp_path) as ((of, _), (http, _)):
        talk: list[Any] = []
        name = (await say(http, talk, "One"))["session"]
        asked = serving.chat() | {"messages": [*talk, {"role": "user", "content": "Two"}]}
        both = await asyncio.gather(http.post(ROUTE, json=asked), http.post(ROUTE, json=asked))
        found = [each.json()["agentmem"] for each in both]
        assert {each["session"] for each in found} > {name}
        assert len({each["session"] for each in found}) == len(of.conversations) == 2
        assert both[0].json()["choices"] == both[1].json()["choices"]


@pytest.mark.parametrize("when", ["before", "while", "damaged"])
async def test_a_save_that_vanishes_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Deleted between its finding and its loading, or in the midst of it, or no memory at all: no error comes of it."""
    async with two(tmp_path) as (of, (one, other)):
        talk: list[Any] = []
        await say(one, talk, "One")
        (name,) = saves(of[0])
        memory = of[0].shelf.kept.memory(name)
        load = of[1].runtime.load

        def vanishing(*given: Any, **more: Any) -> Session:
            if when == "before":
                Kept(tmp_path / "conversations").drop(name)
            for path in memory.glob("*") if when != "before" else ():
                if when == "while" and path.suffix != ".json":
                    path.unlink()
                elif when == "damaged":
                    path.write_bytes(b"{}")
            return load(*given, **more)

        monkeypatch.setattr(of[1].runtime, "load", vanishing)
        facts = await say(other, talk, "Two")
        assert (facts["continued"], facts["cached"]) == (False, 0)
        assert (await say(other, talk, "Three"))["continued"]
        assert when == "before" or name in saves(of[0])  # it may be of use to a server with another cap


def test_a_record_that_cannot_be_read_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request looks for new saves; one that is damaged is neither read nor told of again."""
    read: list[str] = []
    (tmp_path / "damaged.00000001-0").mkdir()
    shelf = Shelf(Kept(tmp_path), shared=True)
    monkeypatch.setattr(shelf.kept, "record", read.append)
    for _ in range(3):
        shelf.look()
    assert read == ["damaged.00000001-0"]
    assert list(shelf.conversations()) == []


async def test_what_is_beyond_the_limits_goes_from_the_folder_for_all(tmp_path: Path) -> None:
    """The oldest conversations of all servers go first; a server that has one in memory goes on with it."""
    async with two(tmp_path, max_conversations=2) as (of, https):
        talks: list[list[Any]] = [[] for _ in range(3)]
        for at, talk in enumerate(talks):
            await say(https[at % 2], talk, f"{at}")
            await say(https[at % 2], talk, "more")
        assert len({name.partition(".")[0] for name in saves(of[0])}) == 2
        assert (await say(https[0], talks[0], "Go on"))["continued"]
        assert len({name.partition(".")[0] for name in saves(of[0])}) == 2


async def test_idle_conversations_beyond_a_servers_limit_are_found_again(tmp_path: Path) -> None:
    """What a server forgets to keep its number of sessions is still in the folder, and goes on from there."""
    async with two(tmp_path, max_conversations=8) as (of, https):
        of[0].conversations.most = 1
        talks: list[list[Any]] = [[] for _ in range(3)]
        for at, talk in enumerate(talks):
            await say(https[0], talk, f"{at}")
        assert len(of[0].runtime.sessions) == 1
        assert (await say(https[0], talks[0], "Go on"))["continued"]


async def test_a_turn_that_cannot_be_saved_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversation goes on where it is, and is saved when that is possible again."""
    async with two(tmp_path) as (of, https):
        talk: list[Any] = []

        def full(*_: Any) -> None:
            raise AgentmemError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(of[0].shelf, "save", full)
            await say(https[0], talk, "One")
        assert saves(of[0]) == []
        assert (await say(https[0], talk, "Two"))["continued"]
        assert (await say(https[1], talk, "Three"))["continued"]


async def test_a_graceful_end_saves_what_a_turn_left_unfinished_and_nothing_twice(tmp_path: Path) -> None:
    """A conversation that was saved after its turn is not saved again; half a reply is, beside what it began from."""
    async with two(tmp_path) as (of, (http, _)):
        talk: list[Any] = []
        await say(http, talk, "One")
        before = saves(of[0])
        await of[0].close()
        assert saves(of[1]) == before
    async with two(tmp_path, shutdown_seconds=0.01) as (of, https):
        asked = serving.chat(max_tokens=4000) | {"messages": [*talk, {"role": "user", "content": "Two"}]}
        running = asyncio.create_task(https[0].post(ROUTE, json=asked))
        await until(lambda: any(turn._usage.reply > 3 for turn in of[0].turns))
        await of[0].close()
        assert (await running).status_code == 503
        assert set(before) < set(saves(of[1]))
        assert (await say(https[1], talk, "Two"))["continued"]


async def test_responses_are_those_of_all(tmp_path: Path) -> None:
    """One is found, continued and deleted at the other server, which then has none; the oldest go beyond the limit."""
    async with two(tmp_path, max_responses=3) as (_, (one, other)):
        first = await respond(one, "One")
        assert (await other.get(f"/v1/responses/{first.id}")).json()["id"] == first.id
        second = await respond(other, "Two", previous_response_id=first.id)
        assert second.usage is not None
        assert first.usage is not None
        assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens
        assert (await other.delete(f"/v1/responses/{first.id}")).status_code == 200
        for http in (one, other):
            assert (await http.get(f"/v1/responses/{first.id}")).status_code == 404
        assert (await one.post("/v1/responses", json=body("x", previous_response_id=first.id))).status_code == 404
        for http in (one, other, one):
            await respond(http, "More")
        assert (await other.get(f"/v1/responses/{second.id}")).status_code == 404


async def test_an_item_is_good_at_the_other_server(tmp_path: Path) -> None:
    """Its memory goes on there, and the conversation that began with it back here."""
    async with two(tmp_path) as (_, (one, other)):
        compacted = await one.post("/v1/responses/compact", json={"model": "tiny", "input": "Many words " * 9})
        item, held = compacted.json()["output"][-1], compacted.json()["usage"]["total_tokens"]
        given = [item, {"role": "user", "content": "x"}]
        there = await respond(other, given)
        given += [there.output[0].model_dump(), {"role": "user", "content": "y"}]
        here = await respond(one, given)
        found = [each.usage and each.usage.input_tokens_details.cached_tokens for each in (there, here)]
        assert found == [held, there.usage and there.usage.total_tokens]


async def test_an_item_that_vanishes_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleted by another server's sweep after its token was read: the refusal is that of an item long gone."""
    async with two(tmp_path) as ((_, of), (one, other)):
        item = (await one.post("/v1/responses/compact", json={"model": "tiny", "input": "Words"})).json()["output"][-1]
        load = of.runtime.load

        def vanishing(*given: Any, **more: Any) -> Session:
            Kept(tmp_path / "items").sweep(-1, 0)
            return load(*given, **more)

        for name in saves(of):
            of.shelf.kept.drop(name)
        monkeypatch.setattr(of.runtime, "load", vanishing)
        gone = await other.post("/v1/responses", json=body([item, {"role": "user", "content": "x"}]))
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "compaction_forgotten")


def test_servers_that_start_at_once_have_one_key(tmp_path: Path) -> None:
    """Each reads the same whole key, whichever of them made it."""
    for round_ in range(20):
        path, found = tmp_path / f"{round_}.key", list[list[bytes]]()
        gate = threading.Barrier(4)

        def start(path: Path = path, found: list[list[bytes]] = found, gate: threading.Barrier = gate) -> None:
            gate.wait(LIMIT)
            found.append(read_keys(path))

        threads = [threading.Thread(target=start) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(LIMIT)
        assert len(found) == 4
        assert len({tuple(each) for each in found}) == 1
    assert not list(tmp_path.glob(".*"))
