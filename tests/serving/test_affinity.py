"""Routing keys: one for all requests of a conversation, others for other conversations and owners, never an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from starlette.datastructures import Headers

from agentmem.serving.affinity import ANY, parsed, routing_key
from support import serving
from support.responses import respond

CHAT, RESPONSES, COMPACT = "/v1/chat/completions", "/v1/responses", "/v1/responses/compact"
NAME = {"X-Agentmem-Session": "mine"}


def key(
    body: object,
    path: str = CHAT,
    owner: str = "alice",
    headers: dict[str, str] | None = None,
    stored: dict[str, str] | None = None,
) -> str:
    """The key of a request, where these responses are stored."""
    return routing_key(owner, path, Headers(headers or {}), body, (stored or {}).get)


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    """A chat's body."""
    return {"messages": serving.said(*texts)} | fields


def test_all_requests_of_a_conversation_have_one_key() -> None:
    """However much was said since, and however it is written."""
    first = key(chat("Hello"))
    assert first
    assert first == key(chat("Hello", "Hi", "Go on"))
    assert first == key({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]})
    assert len({first, key(chat("Hallo")), key(chat("Hello"), owner="bob")}) == 3
    system = [{"role": "system", "content": "Be brief."}, *serving.said("Hello")]
    assert first != key({"messages": system}) == key({"messages": [*system, *serving.said("x", "y")[1:]]})


def test_a_response_has_one_key_with_its_conversation_in_either_form() -> None:
    """A text, its item, more items and a compaction that leaves the instructions out agree."""
    first = key({"input": "Hello", "instructions": "Be brief."}, RESPONSES)
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]
    assert first == key({"input": items}, RESPONSES) == key({"input": "Hello"}, COMPACT)
    assert first == key({"input": [*items, {"role": "assistant", "content": "Hi"}, *items]}, RESPONSES)


def test_what_a_client_says_itself_comes_first() -> None:
    """A name, then a cache key, then the response that is continued; each binds messages that differ."""
    stored = {"resp_1": "its key"}
    follow = {"previous_response_id": "resp_1"}
    assert key({"input": "x"} | follow, RESPONSES, stored=stored) == "its key"
    labels = {key(chat(text, prompt_cache_key="a")) for text in ("One", "Two")}
    names = {key(chat(text, prompt_cache_key="a"), headers=NAME) for text in ("One", "Two")}
    assert (len(labels), len(names), len(labels | names)) == (1, 1, 2)
    assert labels == {key({"input": "x", "prompt_cache_key": "a"} | follow, RESPONSES, stored=stored)}
    assert names != {key(chat("One"), owner="bob", headers=NAME)}


def test_an_item_stands_for_what_came_before_it() -> None:
    """The newest one counts, with the first user's message after it."""
    item, other = ({"type": "compaction", "encrypted_content": each} for each in "ab")
    said = serving.said("x", "y", "z")
    first = key({"input": [item, said[0]]}, RESPONSES)
    assert first
    assert first == key({"input": [*said, item, *said]}, RESPONSES) == key({"input": [other, item, said[0]]}, RESPONSES)
    assert first != key({"input": [other, said[0]]}, RESPONSES)


def test_a_stored_response_is_asked_where_it_runs() -> None:
    """To be cancelled it must be found; one that nobody has may be asked for anywhere."""
    stored = {"resp_1": "its key"}
    for path in ("/v1/responses/resp_1", "/v1/responses/resp_1/cancel"):
        assert key(None, path, stored=stored) == "its key"
    assert key(None, "/v1/responses/other", stored=stored) == ANY
    assert key({"previous_response_id": "other"}, RESPONSES, stored=stored) == ANY


def test_what_belongs_to_no_conversation_goes_anywhere_but_a_page_stays_where_it_is() -> None:
    """Raw completions are spread; the dashboard, its state and the metrics are of one server."""
    assert key({"prompt": "x"}, "/v1/completions") == ANY
    pages = {key(None, path) for path in ("/", "/dashboard/state", "/metrics")}
    assert len(pages) == 1
    assert ANY not in pages


JSON = some.recursive(
    some.none() | some.booleans() | some.floats() | some.text(max_size=5),
    lambda inner: (
        some.lists(inner, max_size=3)
        | some.dictionaries(some.sampled_from(["role", "content", "type", "tool_calls", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = ("messages", "input", "prompt_cache_key", "previous_response_id")


@given(
    some.dictionaries(some.sampled_from(FIELDS), JSON, max_size=3) | JSON, some.sampled_from([CHAT, RESPONSES, COMPACT])
)
def test_garbage_has_a_key(body: Any, path: str) -> None:
    """Whatever a client sends."""
    assert isinstance(key(body, path), str)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"messages": [{"role": "user", "content": "\\ud800"}]}']
)
def test_a_body_that_is_no_json_has_a_key(body: bytes) -> None:
    """Half of it, no text, one that is nested too deep, and half a character."""
    assert isinstance(key(parsed(body)), str)


def test_half_characters_and_names_of_parameters_have_a_key() -> None:
    """What pydantic or a call by keyword would raise at."""
    for text in ("\ud800", "x"):
        for path in (CHAT, RESPONSES):
            for field in FIELDS:
                assert isinstance(key({field: text}, path), str)
                assert isinstance(key({field: [{"role": "user", "content": text, "cls": text}]}, path), str)


def test_deep_values_have_a_key() -> None:
    """A cache key, messages and input that nest as deep as JSON can be read."""
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    for field in FIELDS:
        for path in (CHAT, RESPONSES):
            assert isinstance(key({field: deep}, path), str)
            assert isinstance(key({field: [{"role": "user", "content": deep}]}, path), str)


async def test_a_stored_response_carries_the_key_of_its_conversation(tmp_path: Path) -> None:
    """What continues it, by its id, is asked where it was made: the key goes from response to response."""
    of = serving.server(serving.runtime(3, slots=512), state=tmp_path)
    async with serving.client(of) as http:
        first = await respond(http, "Hello")
        second = await respond(http, "More", previous_response_id=first.id)
        third = await respond(http, "More", previous_response_id=second.id)
    found = [json.loads(path.read_text())["route"] for path in (tmp_path / "responses").glob("*.json")]
    assert third.id
    assert found == [key({"input": "Hello"}, RESPONSES, "local")] * 3
