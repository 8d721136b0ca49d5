"""What goes wrong before a model is asked: each request gets its status and OpenAI's error object."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import RequestRefused, RuntimeBusy, SettingsRefused
from agentmem.serving import refusals
from agentmem.serving.gate import Gate
from agentmem.serving.keys import LOCAL, ApiKeys
from agentmem.serving.settings import ServerSettings, is_loopback
from support import serving

ROUTE = "/v1/chat/completions"


def fault(answer: Any) -> dict[str, Any]:
    """The error object of an answer, which has nothing else."""
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b'{"model": "ti', "invalid_json", None),
        (b"", "invalid_json", None),
        (b"[]", "invalid_json", None),
        (b"[" * 100_000, "invalid_request", None),
        (b"{}", "missing_required_parameter", "model"),
        (json.dumps(serving.chat("x") | {"model": 3}).encode(), "invalid_type", "model"),
        (json.dumps(serving.chat("x") | {"messages": []}).encode(), "invalid_type", "messages"),
        (json.dumps(serving.chat("x") | {"temperature": 3}).encode(), "invalid_type", "temperature"),
        (b'{"model": "tiny", "messages": [{"role": "user"}], "temperature": NaN}', "invalid_type", "temperature"),
        (json.dumps(serving.chat("x", temperature=1e-300)).encode(), "invalid_request", "temperature"),
        (json.dumps(serving.chat("x", max_tokens=0)).encode(), "invalid_type", "max_tokens"),
        (json.dumps(serving.chat("x", n=2)).encode(), "unsupported_parameter", "n"),
        (json.dumps(serving.chat("x", n=True)).encode(), "unsupported_parameter", "n"),
        (json.dumps(serving.chat("x", logprobs=True)).encode(), "unsupported_parameter", "logprobs"),
        (json.dumps(serving.chat("x", frequency_penalty=0.5)).encode(), "unsupported_parameter", "frequency_penalty"),
        (json.dumps(serving.chat("x", logit_bias={"3": 9})).encode(), "unsupported_parameter", "logit_bias"),
        (
            json.dumps(serving.chat("x", response_format={"type": "json_object"})).encode(),
            "unsupported_parameter",
            "response_format",
        ),
        (json.dumps(serving.chat("x", tool_choice="required")).encode(), "invalid_request", "tool_choice"),
        (json.dumps(serving.chat("x", stop=[""])).encode(), "invalid_request", "stop"),
        (json.dumps(serving.chat("x", stop=["a"] * 5)).encode(), "invalid_request", "stop"),
        (json.dumps(serving.chat("x", stream_options={})).encode(), "invalid_request", "stream_options"),
        (json.dumps(serving.chat("x", temprature=1)).encode(), "unknown_parameter", "temprature"),
        (json.dumps(serving.chat("x", **{"\ud800": 1})).encode(), "unknown_parameter", "\\ud800"),
        (json.dumps(serving.chat("x", agentmem={"polcy": "x"})).encode(), "invalid_type", "agentmem.polcy"),
        (json.dumps(serving.chat("x", agentmem={"policy": "am-halvin"})).encode(), "unknown_policy", None),
        (json.dumps(serving.chat("x", agentmem={"keep_recent": 10**6})).encode(), "cap_too_small", None),
        (
            json.dumps(serving.chat("x", messages=[{"role": "usr", "content": ""}])).encode(),
            "invalid_request",
            "messages[0]",
        ),
        (
            json.dumps(
                serving.chat("x", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
            ).encode(),
            "invalid_request",
            "messages[0]",
        ),
        (json.dumps(serving.chat("\ud800")).encode(), "invalid_request", "messages[0]"),
        (
            json.dumps(serving.chat("x", tools=[{"type": "function", "function": {"name": "f g"}}])).encode(),
            "invalid_type",
            "tools[0].function.name",
        ),
    ],
)
async def test_a_body_that_cannot_be_served_is_refused_by_name(body: bytes, code: str, param: str | None) -> None:
    """The answer is 400 with a code, the field, and a message of bounded length."""
    async with serving.client(serving.server()) as http:
        answer = await http.post(ROUTE, content=body, headers={"Content-Type": "application/json"})

        error = fault(answer)
        assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
        assert error["type"] == "invalid_request_error"
        assert 0 < len(error["message"]) < 1100


async def test_an_unknown_model_a_route_and_a_method_are_named() -> None:
    """404 for a model and a route, 405 for a method, each with the error object."""
    async with serving.client(serving.server()) as http:
        unknown = await http.post(ROUTE, json=serving.chat("x", model="gpt-9"))
        listed = await http.get("/v1/models/gpt-9")
        nowhere = await http.get("/v1/nothing")
        method = await http.get(ROUTE)

    assert [fault(each)["code"] for each in (unknown, listed)] == ["model_not_found"] * 2
    assert serving.MODEL in fault(unknown)["message"]
    assert (fault(nowhere)["code"], fault(method)["code"]) == ("unknown_url", "method_not_allowed")
    assert [each.status_code for each in (unknown, listed, nowhere, method)] == [404, 404, 404, 405]


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong-key-here", f"Basic {serving.KEYS[0]}"])
async def test_a_wrong_key_opens_nothing(header: str | None) -> None:
    """Every route but health and readiness answers 401 without one of the keys, unknown routes included."""
    async with serving.client(serving.server(keys=serving.KEYS)) as http:
        headers = {} if header is None else {"Authorization": header}
        for method, path in (("POST", ROUTE), ("GET", "/v1/models"), ("GET", "/v1/nothing")):
            answer = await http.request(method, path, headers=headers, content=b"no json")
            assert (answer.status_code, fault(answer)["code"]) == (401, "invalid_api_key")
        assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [200, 200]


async def test_every_key_of_the_server_opens_it() -> None:
    """Each of the keys is accepted."""
    of = serving.server(keys=serving.KEYS)
    async with serving.client(of) as http:
        for key in serving.KEYS:
            answer = await http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert [each["id"] for each in answer.json()["data"]] == list(of.settings.models)


async def test_a_body_beyond_the_limit_is_413_whether_it_says_so_or_not() -> None:
    """The length is refused by its header, and a body without one when it has grown too large."""
    async with serving.client(serving.server(max_body_bytes=100)) as http:

        async def stream() -> Any:
            for _ in range(30):
                yield b"x" * 10

        for content in (b"x" * 101, stream()):
            answer = await http.post(ROUTE, content=content)
            assert (answer.status_code, fault(answer)["code"]) == (413, "request_too_large")


async def test_a_half_sent_body_is_408() -> None:
    """A client that stops sending is answered after the body's seconds."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not sent_once:
            sent_once.append(True)
            return {"type": "http.request", "body": b"{", "more_body": True}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*_: Any) -> None:
        raise AssertionError

    sent_once: list[bool] = []
    gate = Gate(never, ServerSettings.of(models=("x",), body_seconds=0.01), ApiKeys())
    await gate({"type": "http", "method": "POST", "path": ROUTE, "headers": []}, receive, send)

    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"
    assert gate.requests == 0


async def test_more_requests_than_may_wait_are_429_with_retry_after() -> None:
    """The one beyond the bound is answered at once and asked to come later; the others are served."""
    async with serving.client(serving.server(max_requests=2, retry_after=7)) as http:
        answers = await asyncio.gather(*(http.post(ROUTE, json=serving.chat(f"{at}")) for at in range(4)))

        assert sorted(each.status_code for each in answers) == [200, 200, 429, 429]
        late = next(each for each in answers if each.status_code == 429)
        assert (late.headers["Retry-After"], fault(late)["code"]) == ("7", "rate_limit_exceeded")


async def test_a_cap_that_is_leased_out_is_429() -> None:
    """A turn that waits in vain for its lease ends as RuntimeBusy, which is 429 with Retry-After."""
    made = serving.runtime(1, wait=0.05, pressure=())
    of = serving.server(made)
    async with serving.client(of) as http:
        with made.turn(made.session()):
            answer = await http.post(ROUTE, json=serving.chat("x"))
        assert (answer.status_code, fault(answer)["code"]) == (429, "rate_limit_exceeded")
        assert int(answer.headers["Retry-After"]) >= 1


async def test_a_failure_of_the_server_tells_no_inside() -> None:
    """An unforeseen exception is 500 with the name of its class, and without its text or a traceback."""
    of = serving.server()
    of.model = lambda name: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    async with serving.client(of) as http:
        answer = await http.post(ROUTE, json=serving.chat("x"))

    assert (answer.status_code, fault(answer)["code"], fault(answer)["type"]) == (500, "server_error", "server_error")
    assert "ZeroDivisionError" in answer.text
    assert "division by zero" not in answer.text


def test_errors_of_the_library_have_their_status() -> None:
    """A refusal of settings is the client's fault, a leased-out cap is nobody's."""
    assert refusals.refusal(SettingsRefused("x")).status == 400
    busy = refusals.refusal(RuntimeBusy("x"), retry_after=3)
    assert (busy.status, busy.retry_after) == (429, 3)


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    """One key a line, comments left out; a file without a key, or with a short one, is refused."""
    file = tmp_path / "keys"
    file.write_text("# of alice\nkey-of-alice\n\n  key-of-bob  \n", encoding="utf-8")
    keys = ApiKeys.of_file(file)
    owners = {keys.owner(f"Bearer {key}") for key in serving.KEYS}
    assert len(owners) == 2
    assert LOCAL not in owners
    assert not any(key in owner for owner in owners for key in serving.KEYS)
    with pytest.raises(RequestRefused):
        keys.owner("Bearer # of alice")

    for text in ("# nothing\n", "short\n", "two words of a key\n"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(SettingsRefused):
            ApiKeys.of_file(file)
    with pytest.raises(SettingsRefused, match="cannot read"):
        ApiKeys.of_file(tmp_path / "none")


def test_only_loopback_is_loopback() -> None:
    """Addresses that others can reach are none, whatever they are written like."""
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.9.9.9")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "")))  # noqa: S104  # nothing is bound
