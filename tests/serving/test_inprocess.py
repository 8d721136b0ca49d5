"""A request to an application in this process: its answer as it comes, and an end that the application is told of."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentmem.serving.inprocess import answer

SCOPE: dict[str, Any] = {"type": "http"}


async def test_the_answer_comes_as_it_is_sent() -> None:
    """The body arrives whole; each message is yielded before the next is sent."""
    go_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope is SCOPE
        assert await receive() == {"type": "http.request", "body": b"given", "more_body": False}
        await send({"number": 1})
        await go_on.wait()
        await send({"number": 2})

    messages = answer(app, SCOPE, b"given")
    assert await anext(messages) == {"number": 1}
    go_on.set()
    assert [message async for message in messages] == [{"number": 2}]


@pytest.mark.parametrize("how", ["closed", "cancelled", "thrown"])
async def test_an_application_is_told_of_the_end_and_awaited(how: str) -> None:
    """However the iterator is given up, the request has come to its own end before that is done."""
    told: list[str] = []

    async def app(_: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"number": 1})
        told.append((await receive())["type"])
        await asyncio.sleep(0.01)
        told.append("ended")

    messages = answer(app, SCOPE, b"")
    await anext(messages)
    if how == "closed":
        await messages.aclose()
    elif how == "cancelled":
        waiting = asyncio.ensure_future(anext(messages))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    else:
        with pytest.raises(asyncio.CancelledError):
            await messages.athrow(asyncio.CancelledError())
    assert told == ["http.disconnect", "ended"]


@pytest.mark.parametrize("begun", [False, True])
async def test_an_error_is_raised_where_nothing_was_sent(begun: bool) -> None:
    """Where something was sent, the answer ends there: the application has told its client what there is to tell."""

    async def app(_: Any, __: Any, send: Any) -> None:
        if begun:
            await send({"number": 1})
        raise ValueError("broken")

    messages = answer(app, SCOPE, b"")
    if begun:
        assert [message async for message in messages] == [{"number": 1}]
    else:
        with pytest.raises(ValueError, match="broken"):
            await anext(messages)
