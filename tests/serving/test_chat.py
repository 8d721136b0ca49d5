"""Chat completions: the same tokens as a session writes, in the shapes of the SDK, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from agentmem.serving.reply_text import ReplyText
from agentmem.serving.server import Server
from support import serving, tiny_chat

ROUTE = "/v1/chat/completions"
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": {"type": "object", "properties": {}}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


async def completion(http: Any, **body: Any) -> ChatCompletion:
    """A completion, checked against the SDK's model."""
    answer = await http.post(ROUTE, json=body)
    assert answer.status_code == 200, answer.text
    return ChatCompletion.model_validate(answer.json(), strict=True)


async def chunks(http: Any, **body: Any) -> list[ChatCompletionChunk]:
    """The chunks of a stream, each checked against the SDK's model; the stream ends with [DONE]."""
    answer = await http.post(ROUTE, json=body | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [ChatCompletionChunk.model_validate(json.loads(line), strict=True) for line in lines[:-1]]


def text_of(found: list[ChatCompletionChunk]) -> str:
    """The text of all chunks."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in found if chunk.choices)


def reply(of: Server, *texts: str, tokens: int = 6, **options: Any) -> str:
    """What a session of the same runtime writes."""
    with of.runtime.session(seed=options.pop("seed", 0)) as session:
        session.extend(serving.said(*texts))
        return session.generate(max_new_tokens=tokens, **({"do_sample": False} | options)).text


async def test_a_completion_is_what_a_session_writes() -> None:
    """Greedy: the text of a plain session, its reason and its tokens."""
    of = serving.server()
    async with serving.client(of) as http:
        made = await completion(http, **serving.chat("Hello there"))

        assert made.choices[0].message.content == reply(of, "Hello there")
        assert (made.choices[0].finish_reason, made.model) == ("length", serving.MODEL)
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (30, 6, 36)


async def test_a_stream_is_the_same_in_pieces() -> None:
    """Role first, then text as it comes, then the reason; the usage at the end only where it is asked for."""
    of = serving.server()
    async with serving.client(of) as http:
        found = await chunks(http, **serving.chat("Hello there"))
        counted = await chunks(http, **serving.chat("Hello there", stream_options={"include_usage": True}))

        assert found[0].choices[0].delta.role == "assistant"
        assert text_of(found) == text_of(counted) == reply(of, "Hello there")
        assert [chunk.choices[0].finish_reason for chunk in found] == [None] * (len(found) - 1) + ["length"]
        assert len({chunk.id for chunk in found}) == 1
        assert all(chunk.usage is None for chunk in found)
        assert counted[-1].choices == []
        assert counted[-1].usage is not None
        assert counted[-1].usage.total_tokens == 36


async def test_sampling_follows_its_seed() -> None:
    """The same seed gives the same text, others give others, and temperature 0 needs none."""
    of = serving.server()
    async with serving.client(of) as http:

        async def text(**fields: Any) -> str | None:
            return (await completion(http, **serving.chat("Hi", max_tokens=12) | fields)).choices[0].message.content

        first, again = await text(temperature=1.0, seed=5), await text(temperature=1.0, seed=5)
        assert first == again == reply(of, "Hi", tokens=12, seed=5, do_sample=True, top_k=0)
        assert len({await text(temperature=1.5, seed=seed) for seed in range(4)}) > 1
        assert await text(temperature=1.0, top_p=1e-6, seed=3) == await text()


async def test_a_stop_sequence_ends_the_reply() -> None:
    """The text ends before it, the reason is ``stop``, and no token after it is paid for."""
    of = serving.server()
    async with serving.client(of) as http:
        whole = reply(of, "Hello there")
        made = await completion(http, **serving.chat("Hello there", stop=[whole[2:4], "never"]))
        streamed = await chunks(http, **serving.chat("Hello there", stop=whole[2:4]))

        assert made.choices[0].message.content == text_of(streamed) == whole[:2]
        assert (made.choices[0].finish_reason, streamed[-1].choices[0].finish_reason) == ("stop", "stop")
        assert made.usage is not None
        assert made.usage.completion_tokens == 4


async def test_an_end_token_ends_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is ``stop``, and the end is no text."""
    serving.dictated(monkeypatch, "Fine.")
    async with serving.client(serving.server()) as http:
        made = await completion(http, **serving.chat("How are you?", max_tokens=20))

    assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("Fine.", "stop")


async def test_max_completion_tokens_comes_before_max_tokens() -> None:
    """Both are taken; without either the server's own length holds."""
    async with serving.client(serving.server(reply_tokens=5)) as http:
        both = await completion(http, **serving.chat("x", max_completion_tokens=3))
        none = await completion(http, **serving.chat("x", max_tokens=None))

    assert [each.usage and each.usage.completion_tokens for each in (both, none)] == [3, 5]


async def test_tools_are_shown_and_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call comes back as ``tool_calls`` with the reason, streamed too; its result goes on from the same memory."""
    serving.dictated(monkeypatch, f"Wait. {CALL}", CALL, "Sunny.")
    async with serving.client(serving.server(serving.runtime(2, tools=True, slots=1024))) as http:
        body = serving.chat("And in Paris?", tools=[TOOL], max_tokens=200)
        made = await completion(http, **body)
        streamed = await chunks(http, **body)

        (call,) = made.choices[0].message.tool_calls or ()
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
        assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("Wait.", "tool_calls")
        deltas = [tool for chunk in streamed for tool in chunk.choices[0].delta.tool_calls or ()]
        assert [(tool.index, tool.function and tool.function.name) for tool in deltas] == [(0, "weather")]
        assert (text_of(streamed), streamed[-1].choices[0].finish_reason) == ("", "tool_calls")

        answer = made.choices[0].message.model_dump(exclude_none=True)
        result = {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}
        more = await completion(http, **body | {"messages": [*body["messages"], answer, result]})
        assert more.choices[0].message.content == "Sunny."
        assert more.usage is not None
        assert more.usage.prompt_tokens_details is not None
        assert more.usage.prompt_tokens_details.cached_tokens == made.usage.total_tokens  # type: ignore[union-attr]


async def test_tool_choice_none_shows_no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model never sees them, and what looks like a call is text."""
    serving.dictated(monkeypatch, CALL)
    async with serving.client(serving.server(serving.runtime(2, tools=True, slots=1024))) as http:
        body = serving.chat("And in Paris?", max_tokens=200)
        made = await completion(http, **body | {"tools": [TOOL], "tool_choice": "none"})

    assert made.choices[0].message.content == CALL
    assert made.choices[0].message.tool_calls is None
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(
        tiny_chat.tokenizer(serving.TOOLS).apply_chat_template(
            body["messages"], add_generation_prompt=True, return_dict=False
        )
    )


async def test_tools_without_a_place_in_the_template_are_refused() -> None:
    """A model that could not see them must not be asked to call them."""
    async with serving.client(serving.server()) as http:
        answer = await http.post(ROUTE, json=serving.chat("x", tools=[TOOL]))

    assert answer.status_code == 400
    assert "template has no place" in answer.json()["error"]["message"]


async def test_a_failure_in_mid_stream_is_the_last_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status was sent, so the error object comes as an event."""
    of = serving.server()
    async with serving.client(of) as http:
        await completion(http, **serving.chat("warm"))

        def fail(self: ReplyText, text: str) -> str:
            raise ValueError("inside")

        monkeypatch.setattr(ReplyText, "push", fail)
        answer = await http.post(ROUTE, json=serving.chat("x", stream=True))

        errors = [json.loads(line[6:]) for line in answer.text.split("\n\n") if '"error"' in line]
        assert [each["error"]["code"] for each in errors] == ["server_error"]
        assert "inside" not in answer.text
        assert len(of.conversations) == 1  # the one that failed is forgotten
        assert of.runtime.stats.active == 0
