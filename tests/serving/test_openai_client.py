"""The real OpenAI client, blocking and asynchronous, against a server on a loopback port."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from agentmem.serving.server import Server
from support import serving
from support.waiting import wait_until


@pytest.fixture(scope="module")
def of() -> Server:
    """A server with keys and room for two turns at once."""
    return serving.server(serving.runtime(2, slots=256), keys=serving.KEYS)


@pytest.fixture(scope="module")
def client(of: Server) -> Iterator[OpenAI]:
    """Alice's client."""
    with serving.sdk(of) as made:
        yield made


def wait_until_idle(of: Server) -> None:
    """Until no turn runs."""
    wait_until(lambda: (len(of.turns), of.runtime.stats.active) == (0, 0))


def test_models_are_listed(client: OpenAI, of: Server) -> None:
    """All names of the one model."""
    assert tuple(model.id for model in client.models.list()) == of.settings.models
    assert client.models.retrieve(serving.MODEL).owned_by == "agentmem"


def test_chat_streams(client: OpenAI) -> None:
    """The stream's text is the completion's; its helper assembles it."""
    body = serving.chat("Hello there")
    whole = client.chat.completions.create(**body)
    parts = client.chat.completions.create(**body, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == whole.choices[0].message.content
    with client.chat.completions.stream(**body) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(deltas) == whole.choices[0].message.content


async def test_the_asynchronous_client_talks_to_several_conversations_at_once(client: OpenAI) -> None:
    """Four at once under a cap for two: each goes on with its own text."""
    async with AsyncOpenAI(base_url=client.base_url, api_key=serving.KEYS[1], max_retries=0) as other:

        async def talk(at: int) -> list[int | None]:
            told, cached = serving.said(f"I am number {at}."), []
            for _ in range(3):
                made = await other.chat.completions.create(
                    model=serving.MODEL,
                    messages=told,
                    temperature=0,
                    max_tokens=4,  # type: ignore[arg-type]
                )
                told += [made.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "more"}]
                assert made.usage is not None
                assert made.usage.prompt_tokens_details is not None
                cached.append(made.usage.prompt_tokens_details.cached_tokens)
            return cached

        for first, *rest in await asyncio.gather(*map(talk, range(4))):
            assert first == 0
            assert all(rest)


def test_errors_are_the_clients_exceptions(client: OpenAI) -> None:
    """Each status raises the class that clients catch, with the code and the field."""
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(**serving.chat("x", model="gpt-9"))
    assert (found.value.code, found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**serving.chat("x", n=2))
    assert (bad.value.code, bad.value.param) == ("unsupported_parameter", "n")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="somebody-else").models.list()


def test_a_client_that_leaves_ends_its_turn(client: OpenAI, of: Server) -> None:
    """A stream that is closed, and a request that is given up, end within a forward, and leave the cap free."""
    body = serving.chat("x", max_tokens=3000)
    with client.chat.completions.create(**body, stream=True) as stream:
        next(iter(stream))
        assert of.turns
    wait_until_idle(of)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(**body)
    wait_until_idle(of)
    assert client.chat.completions.create(**serving.chat("next")).choices[0].finish_reason == "length"
