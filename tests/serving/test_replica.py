"""A replica: its settings by the environment, and a model that is loaded, asked and put away in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import CapTooSmall, SettingsRefused
from agentmem.serving import launch
from agentmem.serving.replica import Replica, ReplicaSettings
from support import serving
from support.shell import save_model


def test_settings_come_from_the_environment_and_what_is_given_comes_first(tmp_path: Path) -> None:
    """By name; empty ones count as absent, other variables are no settings, and paths become absolute."""
    given = {
        "AGENTMEM_STATE": "~/state",
        "AGENTMEM_CAP": "12MiB",
        "AGENTMEM_REPLICAS": "3",
        "AGENTMEM_MODEL": "",
        "AGENTMEM_HOME": "/x",
    }
    made = ReplicaSettings.of_environment(given, cap="24MiB", api_key_file="keys")
    assert (made.state, made.cap, made.replicas, made.model) == (Path.home() / "state", "24MiB", 3, None)
    assert made.api_key_file == Path.cwd() / "keys"
    assert made.server().shared
    for wrong, said in (({}, "state"), ({"AGENTMEM_REPLICAS": "0"}, "replicas"), ({"AGENTMEM_SHARE": "2"}, "share")):
        with pytest.raises(SettingsRefused, match=said):
            ReplicaSettings.of_environment(wrong | ({"AGENTMEM_STATE": str(tmp_path)} if wrong else {}))
    with pytest.raises(SettingsRefused, match="caps"):
        ReplicaSettings.of_environment(given, caps="1MiB")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cap": "much"}, "much"),
        ({"policy": "am-halvin"}, "am-halving"),
        ({"api_key_file": "/none"}, "cannot read"),
        ({"chat_template": "/none"}, "cannot read"),
    ],
)
def test_what_is_wrong_without_a_model_is_refused_without_one(wrong: dict[str, str], said: str, tmp_path: Path) -> None:
    """Before any replica is started."""
    given = ReplicaSettings.of_environment({"AGENTMEM_STATE": str(tmp_path)}, **wrong)
    with pytest.raises(SettingsRefused, match=said):
        given.check()
    ReplicaSettings.of_environment({"AGENTMEM_STATE": str(tmp_path)}, chat_template="chatml-tools").check()


async def ask(of: Replica, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A chat completion: its status and its JSON."""
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json")]  # type: ignore[assignment]  # as ASGI has it
    first, *rest = [message async for message in of.answer(scope, json.dumps(body).encode())]
    return first["status"], json.loads(b"".join(message["body"] for message in rest))


async def test_a_replica_serves_its_model_and_saves_its_conversations(tmp_path: Path) -> None:
    """What one has said goes on at the next; while one is there, no server can have the folder for itself."""
    (tmp_path / "model").mkdir()
    given = {"model": save_model(tmp_path / "model"), "state": str(tmp_path / "state"), "cap": "4MiB"}
    settings = ReplicaSettings.of_environment({}, keep_recent="8", **given)
    messages = serving.said("One")
    for at in range(2):
        of = Replica(settings)
        await of.start()
        try:
            with pytest.raises(SettingsRefused, match="another server's"), launch.using(settings.state):
                pass
            status, said = await ask(of, serving.chat(model="model") | {"messages": messages})
            assert status == 200, said
            assert said["agentmem"]["continued"] == (at > 0)
            messages += [said["choices"][0]["message"], {"role": "user", "content": "Two"}]
        finally:
            await of.close()
    with launch.using(settings.state):
        pass


async def test_a_cap_that_is_too_small_is_refused_at_the_start(tmp_path: Path) -> None:
    """Before any request, and nothing of it stays open."""
    (tmp_path / "model").mkdir()
    given = {"model": save_model(tmp_path / "model"), "state": str(tmp_path), "cap": "10KiB"}
    of = Replica(ReplicaSettings.of_environment({}, **given))
    with pytest.raises(CapTooSmall):
        await of.start()
    await of.close()
    with launch.using(tmp_path):
        pass
