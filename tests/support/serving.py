"""Servers of a tiny chat model: in this process, or on a loopback port for the real OpenAI client."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx2
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from agentmem import Runtime
from agentmem.serving.app import create_app
from agentmem.serving.keys import ApiKeys
from agentmem.serving.server import Server
from agentmem.serving.settings import ServerSettings
from agentmem.serving.turns import Sampling
from support import tiny_chat
from support.talk import Dictated
from support.waiting import join, wait_until

KEYS = ("key-of-alice", "key-of-bob")
MODEL = "tiny"
TOOLS = (
    "{% if tools %}<|im_start|>system\n<tool_call>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template with a place for tools, which teaches calls as Qwen's does."""


def runtime(sessions: float = 2, *, tools: bool = False, **options: Any) -> Runtime:
    """A tiny runtime; with ``tools`` its chat template has a place for them."""
    made = tiny_chat.runtime(sessions, **{"policy": "window"} | options)
    if tools:
        made.tokenizer = tiny_chat.tokenizer(TOOLS)
    return made


def server(made: Runtime | None = None, keys: tuple[str, ...] = (), **settings: Any) -> Server:
    """A server of a tiny runtime."""
    given = {"models": (MODEL, "gpt-4o-tiny"), "reply_tokens": 8, "shutdown_seconds": 1.0} | settings
    return Server(made or runtime(), ServerSettings.of(**given), ApiKeys(keys))


@asynccontextmanager
async def client(of: Server, key: str | None = None) -> AsyncIterator[httpx2.AsyncClient]:
    """A client in this process; the server and its runtime are closed at the end."""
    app = create_app(of)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    made = httpx2.AsyncClient(transport=transport, base_url="http://server", headers=headers)
    async with made, app.router.lifespan_context(app):
        yield made
    of.runtime.close()


@contextmanager
def listening(app: FastAPI, of: Server) -> Iterator[str]:
    """A server on a loopback port in a thread; yields its base URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=5)
    running = uvicorn.Server(config)
    threads = torch.get_num_threads()

    def run() -> None:
        torch.set_num_threads(threads)  # memories are planned by it, and it is kept per thread
        running.run()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: running.started or not thread.is_alive())
        assert running.started
        port = running.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        running.should_exit = True
        join(thread)
        of.runtime.close()


@contextmanager
def sdk(of: Server, key: str = KEYS[0]) -> Iterator[OpenAI]:
    """The real client against a server on a loopback port."""
    with listening(create_app(of), of) as url, OpenAI(base_url=url, api_key=key, max_retries=0) as made:
        yield made


def dictated(patch: pytest.MonkeyPatch, *replies: str) -> None:
    """Have the model write these replies, one after the other, each with its end; then go on by itself."""
    waiting = [[*tiny_chat.tokenizer().encode(reply, add_special_tokens=False), 4] for reply in replies]
    plain = Sampling.options

    def options(self: Sampling) -> dict[str, Any]:
        own = plain(self)
        if waiting:
            own |= {"logits_processor": [Dictated(waiting.pop(0))], "do_sample": False}
            own["generation_config"] = ending()
        return own

    patch.setattr(Sampling, "options", options)


def ending() -> Any:
    """A generation config with the end of the tiny chat template."""
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=4)


def said(*texts: str) -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn."""
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat completion, greedy."""
    return {"model": MODEL, "messages": said(*texts), "temperature": 0, "max_tokens": 6} | fields
