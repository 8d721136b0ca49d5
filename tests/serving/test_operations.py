"""Running a server: metrics, access logs without prompts, refusals at the start, a graceful end, slow readers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from agentmem import Runtime, models
from agentmem.errors import CapTooSmall, SettingsRefused
from agentmem.serving import launch
from agentmem.serving.event_stream import EventStream
from agentmem.serving.keys import ApiKeys
from agentmem.serving.settings import ServerSettings
from support import forked, serving, tiny_chat
from support.responses import respond
from support.shell import agentmem, refused, save_model
from support.waiting import LIMIT, until

ROUTE = "/v1/chat/completions"
WORDS = "the colour of my door"


async def test_metrics_count_what_happened() -> None:
    """Bytes against the cap, tokens read, found and written, compactions, times and requests by route and status."""
    of = serving.server(serving.runtime(2, policy="am-halving"))
    async with serving.client(of) as http:
        first = await http.post(ROUTE, json=serving.chat("x" * 70))
        told = [*serving.said("x" * 70), first.json()["choices"][0]["message"], *serving.said("more")]
        second = await http.post(ROUTE, json=serving.chat() | {"messages": told})
        await http.get("/v1/models/" + WORDS)
        await http.get("/" + WORDS)
        await http.request("WORDS", "/health")
        text = (await http.get("/metrics")).text

    values = dict(re.findall(r"^(agentmem_\S+(?:\{.*\})?) (\S+)$", text, re.MULTILINE))
    usage = [each.json()["usage"] for each in (first, second)]
    assert float(values["agentmem_cap_bytes"]) == of.runtime.cap >= float(values["agentmem_charged_bytes"]) > 0
    assert float(values['agentmem_tokens_total{kind="written"}']) == sum(each["completion_tokens"] for each in usage)
    assert float(values['agentmem_tokens_total{kind="cached"}']) == usage[0]["total_tokens"]
    assert (
        float(values['agentmem_tokens_total{kind="read"}']) == usage[1]["prompt_tokens"] - usage[0]["completion_tokens"]
    )
    reports = [report for each in (first, second) for report in each.json()["agentmem"]["compactions"]]
    assert float(values['agentmem_compactions_total{policy="am-halving"}']) == len(reports) > 0
    assert float(values["agentmem_first_token_seconds_count"]) == 2
    assert values['agentmem_requests_total{method="POST",route="/v1/chat/completions",status="200"}'] == "2.0"
    assert values['agentmem_sessions{state="idle"}'] == values["agentmem_conversations"] == "1.0"
    assert WORDS not in text
    assert "WORDS" not in text


async def test_metrics_need_the_key() -> None:
    """They tell how much is said, so they are not for everyone."""
    async with serving.client(serving.server(keys=serving.KEYS)) as http:
        assert (await http.get("/metrics")).status_code == 401


async def test_access_logs_have_no_words_of_anyone(caplog: pytest.LogCaptureFixture) -> None:
    """One line a request with its status and bytes; no prompt, no reply, no key."""
    of = serving.server(keys=serving.KEYS)
    with caplog.at_level(logging.INFO, "agentmem.access"):
        async with serving.client(of, serving.KEYS[0]) as http:
            answer = await http.post(ROUTE, json=serving.chat(WORDS))
            await http.post(ROUTE, json=serving.chat(WORDS), headers={"Authorization": "Bearer wrong-key-here"})
    lines = [record for record in caplog.records if record.name == "agentmem.access"]

    assert [(line.status, line.path, line.method) for line in lines] == [(200, ROUTE, "POST"), (401, ROUTE, "POST")]  # type: ignore[attr-defined]
    assert lines[0].sent_bytes == len(answer.content)  # type: ignore[attr-defined]
    said = str([vars(line) for line in lines])
    reply = answer.json()["choices"][0]["message"]["content"]
    assert not any(text in said for text in (WORDS, reply, *serving.KEYS, "wrong-key"))


async def test_a_reader_that_does_not_read_loses_its_stream() -> None:
    """The stream ends after the seconds of one piece, and its events are closed."""
    closed: list[bool] = []

    async def events() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async with asyncio.timeout(LIMIT):
        await EventStream(events(), 0.02, {})({"type": "http"}, receive, send)  # type: ignore[arg-type]  # plain dicts

    assert closed == [True]


async def test_the_end_of_a_server_ends_turns_and_returns_leases() -> None:
    """A turn that is under way has a moment, then it is told; later requests are refused."""
    of = serving.server(serving.runtime(1, slots=512), shutdown_seconds=0.05)
    async with serving.client(of) as http:
        running = asyncio.create_task(http.post(ROUTE, json=serving.chat("x", max_tokens=3000)))
        await until(lambda: bool(of.turns))
        await of.close()
        answer = await running
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert (await http.post(ROUTE, json=serving.chat("x"))).status_code == 503
        assert (await http.get("/ready")).status_code == 503
        assert of.runtime.sessions == []


def test_a_server_that_others_reach_needs_keys() -> None:
    """Only loopback goes without."""
    launch.check_keys("127.0.0.1", ApiKeys())
    launch.check_keys("0.0.0.0", ApiKeys(serving.KEYS))  # noqa: S104  # nothing is bound
    with pytest.raises(SettingsRefused, match="--api-key-file"):
        launch.check_keys("0.0.0.0", ApiKeys())  # noqa: S104  # the same


def test_a_port_or_a_folder_that_is_taken_is_refused(tmp_path: Path) -> None:
    """With what to do, and without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsRefused, match="another port"), launch.listening("127.0.0.1", port):
            pass
    for held, wanted in ((False, False), (False, True), (True, False)):
        refused_as = pytest.raises(SettingsRefused, match="another server's")
        with launch.using(tmp_path, shared=held), refused_as, launch.using(tmp_path, shared=wanted):
            pass
    with launch.using(tmp_path, shared=True), launch.using(tmp_path, shared=True):
        pass
    with launch.using(tmp_path), launch.using(None):
        pass


async def test_a_cap_that_no_conversation_fits_is_refused_at_the_start() -> None:
    """Before any request."""
    with Runtime(tiny_chat.model(), tiny_chat.tokenizer(), cap=10_000) as made:
        server = serving.server(made)
        with pytest.raises(CapTooSmall):
            server.check()
        await server.close()


def test_settings_name_what_is_wrong() -> None:
    """The field and its limit."""
    with pytest.raises(SettingsRefused, match="max_requests"):
        ServerSettings.of(models=("x",), max_requests=0)
    with pytest.raises(SettingsRefused, match="models"):
        ServerSettings.of(models=())


def test_the_command_refuses_before_a_model_is_loaded(tmp_path: Path) -> None:
    """A host without keys, a key file that is none, a policy that there is not."""
    refused(agentmem("serve", "--host", "0.0.0.0"), "--api-key-file")  # noqa: S104  # nothing is bound
    refused(agentmem("serve", "--api-key-file", str(tmp_path / "none")), "cannot read")
    refused(agentmem("serve", "--policy", "am-halvin"), "am-halving")
    refused(agentmem("serve", "--shared"), "give state")


def test_the_command_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the server's packages it says what to install."""
    for name in [name for name in sys.modules if name.startswith("agentmem.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused(agentmem("serve"), "uvicorn", "agentmem-runtime[server]")


@contextmanager
def process(model: str, state: Path) -> Iterator[tuple[subprocess.Popen[str], OpenAI]]:
    """``agentmem serve`` as its own process; yields it and a client made of what it printed."""
    command = [sys.executable, "-c", "import sys; from agentmem.cli import main; sys.exit(main())", "serve"]
    options = ["--model", model, "--cap", "4MiB", "--port", "0", "--state", str(state), "--keep-recent", "8"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with forked.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as run:
        try:
            assert run.stdout is not None
            printed = ""
            while "create(" not in printed:
                line = run.stdout.readline()
                assert line, run.stderr and run.stderr.read()
                printed += line
            (url,) = re.findall(r'OpenAI\(base_url="(.*)", api_key="none"\)', printed)
            with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                yield run, client
        finally:
            run.kill()


async def test_the_command_serves_ends_gracefully_and_goes_on(tmp_path: Path) -> None:
    """Paste what it prints, talk, end it by SIGTERM: a server on its folder still has conversation and item."""
    (tmp_path / "model").mkdir()
    model, state = save_model(tmp_path / "model"), tmp_path / "state"
    with process(model, state) as (run, client):
        fields: dict[str, Any] = {"model": "model", "temperature": 0, "max_output_tokens": 5}
        first = client.responses.create(input="One", **fields)
        item = client.responses.compact(model="model", input="Other words").output[-1].model_dump()
        run.send_signal(signal.SIGTERM)
        _, log = run.communicate(timeout=LIMIT)
    assert [json.loads(line)["status"] for line in log.splitlines() if line.startswith("{")] == [200, 200]
    assert "Traceback" not in log

    made = Runtime(*models.load(model), cap="4MiB", share=0.5, keep_recent=8, pressure=("trim", "disk"))
    async with serving.client(serving.server(made, state=state)) as http:
        second = await respond(http, "Two", previous_response_id=first.id)
        third = await respond(http, [item, {"role": "user", "content": "x"}])
    found = [each.usage and each.usage.input_tokens_details.cached_tokens for each in (second, third)]
    assert found[0] == (first.usage and first.usage.total_tokens)
    assert found[1]
