"""Clients that misbehave during normal load: nobody else's conversation is lost, and every lease comes back."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from openai import AsyncOpenAI

from agentmem.serving.app import create_app
from agentmem.serving.server import Server
from support import serving
from support.waiting import LIMIT, until

REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer key-of-bob\r\nContent-Length: %d\r\n\r\n%s"
)
STREAM = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"stream":true,"max_tokens":400}'


async def garbage(port: int, seed: int) -> None:
    """One client: nonsense, half a request, half a body, or a stream that is left, at once or after a while."""
    rng = random.Random(seed)  # noqa: S311  # no secret
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = rng.choice(
        [
            rng.randbytes(200),
            b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 200_000,
            REQUEST % (10**9, b"{"),
            REQUEST % (500, b'{"model": "tiny", '),
            REQUEST % (len(STREAM), STREAM),
            REQUEST % (9, b'{"model":'),
        ]
    )
    try:
        writer.write(sent)
        await writer.drain()
        if rng.random() < 0.5:
            await asyncio.wait_for(reader.read(300), rng.random() / 2)
    except (OSError, TimeoutError):
        pass
    finally:
        writer.transport.abort()


async def talk(client: AsyncOpenAI, at: int) -> list[int | None]:
    """A conversation of four turns; how much of each was held already."""
    told, cached = serving.said(f"I am number {at}."), []
    for _ in range(4):
        made = await client.chat.completions.create(
            model=serving.MODEL,
            messages=told,  # type: ignore[arg-type]  # plain dicts
            temperature=0,
            max_tokens=4,
        )
        told += [made.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "more"}]
        assert made.usage is not None
        assert made.usage.prompt_tokens_details is not None
        cached.append(made.usage.prompt_tokens_details.cached_tokens)
    return cached


@pytest.fixture
def of() -> Server:
    """A server that more may use at once than have room."""
    return serving.server(
        serving.runtime(3, slots=256, policy="am-halving"), keys=serving.KEYS, max_requests=300, body_seconds=LIMIT
    )


async def test_two_hundred_bad_clients_harm_nobody(of: Server) -> None:
    """Alice's three conversations go on from their memories all the while; then no turn and no lease is left."""
    with serving.listening(create_app(of), of) as url:
        port = int(url.rsplit(":", 1)[1].split("/")[0])
        async with AsyncOpenAI(base_url=url, api_key=serving.KEYS[0], max_retries=0) as client:
            talks: Any = asyncio.gather(*(talk(client, at) for at in range(3)))
            for start in range(0, 200, 40):
                await asyncio.gather(*(garbage(port, seed) for seed in range(start, start + 40)))
            for first, *rest in await talks:
                assert first == 0
                assert all(rest)
            await until(lambda: not of.turns and not of.runtime.stats.active)
        assert of.runtime.stats.charged_bytes <= of.runtime.cap
        assert all(not each.busy for each in of.conversations)
