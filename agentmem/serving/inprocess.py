"""One request to an ASGI application in this process: what it answers as an iterator, without a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

from agentmem.serving.gate import Application, Scope
from agentmem.sessions import aio

Message = MutableMapping[str, Any]


async def answer(app: Application, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
    """Pass a request with its whole body to ``app``, and yield the ASGI messages of the answer as they come.

    If the iterator is closed or cancelled before its end, the application is told that the client disconnected; its
    request has ended when the closing has. An error of the application is raised where it sent nothing.
    """
    queue: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        queue.put_nowait(message)

    async def run() -> None:
        try:
            await app(scope, receive, send)
        finally:
            queue.put_nowait(None)

    task, begun = asyncio.create_task(run()), False
    try:
        while (message := await queue.get()) is not None:
            begun = True
            yield message
    finally:
        left.set()
        await aio.ended(task)
    if not begun:
        task.result()
