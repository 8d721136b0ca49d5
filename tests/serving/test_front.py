"""The front of several replicas: where a request goes, what a client sees of a replica's death, and who is let in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agentmem.serving.app import create_app
from agentmem.serving.front import create_front
from agentmem.serving.inprocess import answer
from agentmem.serving.server import Server
from support import serving
from support.responses import body, respond
from support.waiting import LIMIT, until

CHAT = "/v1/chat/completions"


class DiedError(Exception):
    """A replica's process is gone."""


class Replicas:
    """Servers in this process as a front reaches them; a dead one breaks off at its n-th message."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers, self.apps = servers, [create_app(each) for each in servers]
        self.dies_at: dict[int, int] = {}
        self.asked: list[tuple[str, int]] = []

    async def call(self, key: str, scope: Any, body: bytes) -> AsyncGenerator[Any]:
        """Answer by the replica of a key, or of the next key if that one is dead."""
        living = [at for at in range(len(self.apps)) if at not in self.dies_at or self.dies_at[at] > 0]
        at = living[hash(key) % len(living)] if living else 0
        self.asked.append((key, at))
        messages, left = answer(self.apps[at], dict(scope), body), self.dies_at.get(at)
        try:
            while left is None or left > 1:
                message = await anext(messages, None)
                if message is None:
                    return
                yield message
                left = None if left is None else left - 1
            self.dies_at[at] = 0
            raise DiedError
        finally:
            await messages.aclose()


@asynccontextmanager
async def front(state: Path, **settings: Any) -> AsyncIterator[tuple[Replicas, httpx2.AsyncClient]]:
    """Two replicas behind a front, and Alice as its client."""
    made = [
        serving.server(serving.runtime(4, slots=512), serving.KEYS, state=state, shared=True, **settings)
        for _ in range(2)
    ]
    of = Replicas(made)
    app = create_front(of.call, (DiedError,), made[0].settings, made[0].keys, len(made))
    transport = httpx2.ASGITransport(app)
    headers = {"Authorization": f"Bearer {serving.KEYS[0]}"}
    async with httpx2.AsyncClient(transport=transport, base_url="http://front", headers=headers) as http:
        async with of.apps[0].router.lifespan_context(None), of.apps[1].router.lifespan_context(None):
            yield of, http
        for each in made:
            each.runtime.close()


async def say(http: Any, messages: list[Any], text: str) -> dict[str, Any]:
    """One turn of a chat; what the answer has under ``agentmem``."""
    messages.append({"role": "user", "content": text})
    said = await http.post(CHAT, json=serving.chat() | {"messages": messages})
    assert said.status_code == 200, said.text
    messages.append(said.json()["choices"][0]["message"])
    facts: dict[str, Any] = said.json()["agentmem"]
    return facts


async def test_a_conversation_stays_at_its_replica_and_goes_on_elsewhere_when_that_dies(tmp_path: Path) -> None:
    """All its turns are asked of one replica; the turn in which it dies is repeated by the other, and no more."""
    async with front(tmp_path) as (of, http):
        talk: list[Any] = []
        for at in range(3):
            assert (await say(http, talk, f"Words {at}"))["continued"] == (at > 0)
        assert len(set(of.asked)) == 1
        place = of.asked[0][1]
        of.dies_at[place] = 1
        assert (await say(http, talk, "More"))["continued"]
        assert [at for _, at in of.asked[3:]] == [place, 1 - place]
        assert (await say(http, talk, "And more"))["continued"]


async def test_a_replica_that_died_after_its_turn_has_that_turn_repeated(tmp_path: Path) -> None:
    """It had saved the reply that nobody saw; the same reply is written again from where the turn began."""
    async with front(tmp_path) as (of, http):
        talk: list[Any] = []
        await say(http, talk, "One")
        place, call = of.asked[0][1], of.call

        async def dies(key: str, scope: Any, body: bytes) -> AsyncGenerator[Any]:
            if of.asked[1:]:
                async for message in call(key, scope, body):
                    yield message
                return
            async for _ in call(key, scope, body):
                pass
            of.dies_at[place] = 0
            raise DiedError

        of.call = dies  # type: ignore[method-assign]
        app = create_front(dies, (DiedError,), of.servers[0].settings, of.servers[0].keys, 2)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://front") as other:
            other.headers["Authorization"] = f"Bearer {serving.KEYS[0]}"
            assert (await say(other, talk, "Two"))["continued"]
        assert len(of.asked) == 3


@pytest.mark.parametrize("streams", [False, True])
async def test_when_every_replica_dies_the_client_is_told(tmp_path: Path, streams: bool) -> None:
    """Nothing was sent: a status that OpenAI's client tries again after."""
    async with front(tmp_path) as (of, http):
        of.dies_at = {0: 1, 1: 1}
        said = await http.post(CHAT, json=serving.chat("x", stream=streams))
        assert (said.status_code, said.json()["error"]["code"]) == (503, "replica_lost")
        assert len(of.asked) == 2


async def test_a_stream_that_is_lost_ends_with_an_error(tmp_path: Path) -> None:
    """A part was sent, so that nothing is tried again: the last event is OpenAI's error object."""
    async with front(tmp_path) as (of, http):
        of.dies_at = {0: 3, 1: 3}
        said = await http.post(CHAT, json=serving.chat("x", stream=True))
        events = [line.removeprefix("data: ") for line in said.text.splitlines() if line]
        assert said.status_code == 200
        assert json.loads(events[-1])["error"]["code"] == "replica_lost"
        assert "[DONE]" not in said.text
        assert len(of.asked) == 1


async def test_an_answer_that_is_lost_after_its_last_byte_is_whole(tmp_path: Path) -> None:
    """Its replica died when all had been sent: nothing is asked again, and no error is added."""
    async with front(tmp_path) as (of, http):
        of.dies_at = {0: 3, 1: 3}  # start, body, and the death in place of the end
        assert (await http.post(CHAT, json=serving.chat("x"))).status_code == 200
        assert len(of.asked) == 1


async def test_responses_are_asked_where_they_were_made(tmp_path: Path) -> None:
    """One by its id, one that continues it, and one that is cancelled while it runs."""
    async with front(tmp_path) as (of, http):
        first = await respond(http, "One")
        second = await respond(http, "Two", previous_response_id=first.id)
        assert second.usage is not None
        assert second.usage.input_tokens_details.cached_tokens > 0
        begun = await http.post("/v1/responses", json=body("x" * 40, background=True, max_output_tokens=3000))
        name = begun.json()["id"]
        await until(lambda: any(each.turns for each in of.servers))
        ended = await http.post(f"/v1/responses/{name}/cancel")
        assert ended.json()["status"] == "cancelled"
        assert not any(each.turns for each in of.servers)
        assert len(set(of.asked)) == 2
        assert (await http.get(f"/v1/responses/{first.id}")).json()["id"] == first.id


async def test_the_front_lets_in_whom_the_server_lets_in(tmp_path: Path) -> None:
    """A wrong key and a body that is too large never reach a replica; its own health needs none."""
    async with front(tmp_path, max_body_bytes=1000) as (of, http):
        wrong = await http.post(CHAT, json=serving.chat("x"), headers={"Authorization": "Bearer wrong-key-here"})
        large = await http.post(CHAT, json=serving.chat("x" * 2000))
        health = await http.get("/health", headers={"Authorization": ""})
        assert [each.status_code for each in (wrong, large, health)] == [401, 413, 200]
        assert of.asked == []
        for path in ("/ready", "/"):
            assert (await http.get(path, headers={"Authorization": ""})).status_code == 200
        assert (await http.get("/v1/models")).json()["data"][0]["id"] == serving.MODEL
        nonsense = await http.post(CHAT, content=b"{")
        assert (nonsense.status_code, nonsense.json()["error"]["code"]) == (400, "invalid_json")
        assert (await http.get("/nowhere")).status_code == 404


async def test_nobody_reaches_another_keys_conversation_through_the_front(tmp_path: Path) -> None:
    """The same messages of Bob have another key, are read by him, and go on apart."""
    async with front(tmp_path) as (of, http):
        talk: list[Any] = []
        await say(http, talk, "One")
        his = list(talk)
        http.headers["Authorization"] = f"Bearer {serving.KEYS[1]}"
        assert not (await say(http, his, "Two"))["continued"]
        assert len({key for key, _ in of.asked}) == 2


async def test_a_client_that_leaves_ends_its_turn(tmp_path: Path) -> None:
    """Streamed or not, the replica's turn is ended and the conversation is idle again."""
    async with front(tmp_path) as (of, http):
        for streams in (False, True):
            long = serving.chat("x", stream=streams, max_tokens=3000)
            asking = asyncio.create_task(http.post(CHAT, json=long))
            await until(lambda: any(turn._usage.reply > 2 for each in of.servers for turn in each.turns))
            asking.cancel()
            await asyncio.wait([asking])
            await until(lambda: not any(each.turns for each in of.servers))
            assert not any(each.busy for server in of.servers for each in server.conversations)


@pytest.mark.parametrize("how", ["leaves", "does not read"])
@pytest.mark.parametrize("streams", [True, False])
async def test_a_connection_that_is_given_up_ends_its_turn(tmp_path: Path, how: str, streams: bool) -> None:
    """A client that closes it, or that does not read for as long as a server would wait: the replica's turn ends."""
    async with front(tmp_path, send_seconds=0.05) as (of, _):
        app = create_front(of.call, (DiedError,), of.servers[0].settings, of.servers[0].keys, 2)
        tokens = 3000 if streams or how == "leaves" else 3
        given = json.dumps(serving.chat("x", stream=streams, max_tokens=tokens)).encode()
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode()}
        scope |= {"query_string": b"", "headers": [(b"content-type", b"application/json")]}
        scope["headers"] += [(b"authorization", f"Bearer {serving.KEYS[0]}".encode())]
        requests: list[Any] = [{"type": "http.request", "body": given}]

        async def receive() -> Any:
            if requests:
                return requests.pop()
            if how == "leaves":
                await until(lambda: any(turn._usage.reply > 2 for each in of.servers for turn in each.turns))
                return {"type": "http.disconnect"}
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if how == "does not read" and message["type"] == "http.response.body":
                await asyncio.Event().wait()

        async with asyncio.timeout(LIMIT):
            await app(scope, receive, send)  # type: ignore[arg-type]  # plain dicts
        assert not any(each.turns for each in of.servers)
        (held,) = [each for server in of.servers for each in server.conversations]
        assert not held.busy
        assert held.session is not None
        assert len(held.session.ids) < 2000
