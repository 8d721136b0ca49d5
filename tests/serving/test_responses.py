"""Responses: the shapes and the order of events of the SDK, storing, going on, calls of tools, cancelling."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response, ResponseItemList

from support import serving
from support.responses import CALL, ROUTE, TOOL, body, events, respond
from support.serving import MODEL
from support.waiting import LIMIT, until


async def test_a_response_is_what_chat_writes() -> None:
    """The same text as a chat completion of the same words; a cut reply is incomplete, and says why."""
    async with serving.client(serving.server()) as http:
        made = await respond(http, "Hello there", metadata={"a": "b"}, instructions=None)
        chat = await http.post("/v1/chat/completions", json=serving.chat("Hello there"))

        assert made.output_text == chat.json()["choices"][0]["message"]["content"]
        assert (made.status, made.metadata) == ("incomplete", {"a": "b"})
        assert made.incomplete_details is not None
        assert made.incomplete_details.reason == "max_output_tokens"
        assert made.usage is not None
        assert (made.usage.input_tokens, made.usage.output_tokens) == (30, 6)


async def test_the_events_of_a_stream_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Created, in progress, item, part, deltas, and everything closed again; the parts together are the response."""
    serving.dictated(monkeypatch, "Fine.")
    async with serving.client(serving.server()) as http:
        found = await events(http, "How are you?", max_output_tokens=50)

    kinds = [each.type.removeprefix("response.") for each in found]
    deltas = [each for each in found if each.type == "response.output_text.delta"]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * len(deltas),
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(each.delta for each in deltas) == found[-4].text == found[-1].response.output_text == "Fine."
    assert len({each.item_id for each in deltas} | {found[-2].item.id}) == 1
    assert found[0].response.status == "in_progress"
    assert found[-1].response.usage is not None


async def test_a_response_is_gone_on_from_by_its_id() -> None:
    """Only what is new is read, as often as its id is named; a branch from an older one is read from the start."""
    of = serving.server(serving.runtime(3, slots=512))
    async with serving.client(of) as http:
        first = await respond(http, "One")
        second = await respond(http, "Two", previous_response_id=first.id)
        branch = await respond(http, "Two", previous_response_id=first.id)
        whole = [{"role": "user", "content": "One"}, *(each.model_dump() for each in first.output)]
        again = await respond(http, [*whole, {"role": "user", "content": "Two"}], prompt_cache_key="x")

        cached = [each.usage.input_tokens_details.cached_tokens for each in (second, branch, again) if each.usage]
        assert cached == [first.usage and first.usage.total_tokens, 0, 0]
        assert second.output_text == branch.output_text == again.output_text
        assert second.previous_response_id == first.id


async def test_instructions_come_first_and_are_not_inherited() -> None:
    """They are the system message of one response; the next one has its own, or none."""
    of = serving.server(serving.runtime(3, slots=512))
    async with serving.client(of) as http:
        first = await respond(http, "One", instructions="Be brief.")
        same = await respond(http, "Two", instructions="Be brief.", previous_response_id=first.id)
        none = await respond(http, "Two", previous_response_id=first.id)
        system = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "One"}]
        written = await respond(http, system, prompt_cache_key="x")

        assert written.output_text == first.output_text
        assert [bool(each.usage and each.usage.input_tokens_details.cached_tokens) for each in (same, none)] == [
            True,
            False,
        ]
        assert same.usage is not None
        assert none.usage is not None
        assert same.usage.input_tokens > none.usage.input_tokens


async def test_responses_are_stored_got_listed_and_deleted() -> None:
    """As the one that was answered; unless ``store`` is false, and only until it is deleted."""
    async with serving.client(serving.server()) as http:
        made = await respond(http, "One")
        other = await respond(http, "One", store=False)
        got = await http.get(f"{ROUTE}/{made.id}")
        listed = await http.get(f"{ROUTE}/{made.id}/input_items")

        assert Response.model_validate(got.json(), strict=True) == made
        items = ResponseItemList.model_validate(listed.json())
        assert [item.content[0].text for item in items.data] == ["One"]  # type: ignore[union-attr]
        assert (await http.get(f"{ROUTE}/{other.id}")).status_code == 404
        assert (await http.delete(f"{ROUTE}/{made.id}")).json()["deleted"]
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
            gone = await http.request(method, f"{ROUTE}/{made.id}{path}")
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")
        after = await http.post(ROUTE, json=body("Two", previous_response_id=made.id))
        assert (after.status_code, after.json()["error"]["code"]) == (404, "previous_response_not_found")


async def test_another_key_sees_no_response() -> None:
    """Bob guesses Alice's id on every route and gets what he gets for an id that never was."""
    of = serving.server(serving.runtime(3), keys=serving.KEYS)
    async with serving.client(of, serving.KEYS[0]) as http:
        made = await respond(http, "One")
        bob = {"Authorization": f"Bearer {serving.KEYS[1]}"}
        calls: list[tuple[str, str, Any]] = [
            ("GET", f"{ROUTE}/ID", None),
            ("GET", f"{ROUTE}/ID/input_items", None),
            ("DELETE", f"{ROUTE}/ID", None),
            ("POST", f"{ROUTE}/ID/cancel", {}),
            ("POST", ROUTE, body("Two", previous_response_id="ID")),
            ("POST", f"{ROUTE}/compact", {"model": MODEL, "previous_response_id": "ID"}),
        ]
        for method, path, sent in calls:
            answers = []
            for name in (made.id, "resp_never"):
                data = None if sent is None else json.loads(json.dumps(sent).replace("ID", name))
                answer = await http.request(method, path.replace("ID", name), json=data, headers=bob)
                answers.append((answer.status_code, answer.text.replace(name, "ID")))
            assert answers[0] == answers[1]
            assert answers[0][0] == 404
        assert (await http.get(f"{ROUTE}/{made.id}")).status_code == 200


async def test_calls_of_tools_and_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is an item with events of its own; its result goes on from the same memory."""
    serving.dictated(monkeypatch, f"Wait. {CALL}", "Sunny.", CALL)
    async with serving.client(serving.server(serving.runtime(2, tools=True, slots=1024))) as http:
        found = await events(http, "And in Paris?", tools=[TOOL], max_output_tokens=200)
        made = found[-1].response
        message, call = made.output

        assert (message.content[0].text, call.name, json.loads(call.arguments)) == (
            "Wait.",
            "weather",
            {"city": "Paris"},
        )
        kinds = [each.type.removeprefix("response.") for each in found if "delta" not in each.type]
        assert kinds[-4:] == ["output_item.added", "function_call_arguments.done", "output_item.done", "completed"]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"}
        more = await respond(http, [result], previous_response_id=made.id, tools=[TOOL], max_output_tokens=50)
        assert more.output_text == "Sunny."
        assert more.usage is not None
        assert more.usage.input_tokens_details.cached_tokens == made.usage.total_tokens

        echoed = [{"role": "user", "content": "And in Paris?"}, *(each.model_dump() for each in made.output), result]
        again = await respond(http, echoed, tools=[TOOL], max_output_tokens=200, prompt_cache_key="x")
        assert [item.type for item in again.output] == ["function_call"]


async def test_a_strict_tool_is_called_as_its_schema_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit the schema is text; a tool that is not strict takes it."""
    wrong = CALL.replace("city", "town")
    serving.dictated(monkeypatch, wrong, wrong)
    async with serving.client(serving.server(serving.runtime(2, tools=True, slots=1024))) as http:
        strict = await respond(http, "x", tools=[TOOL], max_output_tokens=200)
        loose = await respond(http, "x", tools=[TOOL | {"strict": False}], max_output_tokens=200)

    assert strict.output_text == wrong
    assert [item.type for item in loose.output] == ["function_call"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0]"),
        ({"input": [{"type": "compaction_trigger"}, {"role": "user", "content": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]}, "input[0]"),
        ({"input": [{"type": "compaction", "encrypted_content": "gAAAAAB"}]}, "encrypted_content"),
        ({"input": [{"role": "user", "content": "x", "colour": "red"}]}, "input[0]"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [TOOL | {"parameters": {"type": 3}}]}, "tools"),
        ({"tools": [TOOL | {"parameters": {"type": "array"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True, "store": False}, "background"),
        ({"context_management": [{"type": "truncation"}]}, "context_management[0].type"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"previous_response_id": "resp_never"}, "previous_response_id"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    """A 4xx with the error object and the field or the place in the input."""
    async with serving.client(serving.server()) as http:
        answer = await http.post(ROUTE, json=body("x") | fields)
        assert 400 <= answer.status_code < 500
        assert answer.json()["error"]["param"] == param


async def test_a_response_in_the_background_can_be_got_and_cancelled() -> None:
    """It is in progress at once, complete later; cancelled, its turn ends and it stays cancelled."""
    of = serving.server(serving.runtime(2, slots=512))
    async with serving.client(of) as http:
        made = await respond(http, "One", background=True)
        assert (made.status, made.background) == ("in_progress", True)
        async with asyncio.timeout(LIMIT):
            while (await http.get(f"{ROUTE}/{made.id}")).json()["status"] == "in_progress":  # noqa: ASYNC110  # as clients do
                await asyncio.sleep(0.01)
        done = Response.model_validate((await http.get(f"{ROUTE}/{made.id}")).json(), strict=True)
        assert len(done.output_text) == 6
        finished = await http.post(f"{ROUTE}/{made.id}/cancel")
        assert (finished.status_code, finished.json()["error"]["code"]) == (400, "response_not_in_progress")

        long = await respond(http, "Two", background=True, max_output_tokens=3000)
        await until(lambda: bool(of.turns))
        stopped = await http.post(f"{ROUTE}/{long.id}/cancel")
        assert Response.model_validate(stopped.json(), strict=True).status == "cancelled"
        assert of.runtime.stats.active == 0
        await asyncio.sleep(0.05)
        assert (await http.get(f"{ROUTE}/{long.id}")).json()["status"] == "cancelled"


async def test_responses_outlive_their_server(tmp_path: Path) -> None:
    """With a folder they are got and gone on from after a restart; a damaged file is left out."""
    async with serving.client(serving.server(state=tmp_path)) as http:
        first, second = await respond(http, "One"), await respond(http, "Other")
    newest = max((tmp_path / "responses").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    newest.write_text("{", encoding="utf-8")
    async with serving.client(serving.server(state=tmp_path)) as http:
        assert (await http.get(f"{ROUTE}/{first.id}")).json() == first.model_dump(exclude_unset=True)
        assert (await http.get(f"{ROUTE}/{second.id}")).status_code == 404
        more = await respond(http, "Two", previous_response_id=first.id)
        assert more.usage is not None
        assert more.usage.input_tokens_details.cached_tokens == (first.usage and first.usage.total_tokens)
