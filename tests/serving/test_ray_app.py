"""The server on Ray Serve: what is refused without Ray, and with it a replica's death in mid-conversation."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agentmem.errors import SettingsRefused
from support import serving
from support.shell import save_model

MODULE = "agentmem.serving.ray_app"


def test_the_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray the module says what to install."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsRefused, match=r"ray.* not installed.*agentmem-runtime\[ray\]"):
        import_module(MODULE)


def test_settings_are_refused_before_anything_is_deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder, with an unknown setting or with a key file that is none."""
    pytest.importorskip("ray")
    module = import_module(MODULE)
    monkeypatch.delenv("AGENTMEM_STATE", raising=False)
    with pytest.raises(SettingsRefused, match="state"):
        _ = module.app
    with pytest.raises(SettingsRefused, match="caps"):
        module.build({"state": str(tmp_path), "caps": "1MiB"})
    with pytest.raises(SettingsRefused, match="api key file"):
        module.build({"state": str(tmp_path), "api_key_file": str(tmp_path / "none")})
    monkeypatch.setenv("AGENTMEM_STATE", str(tmp_path))
    assert module.app is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Two replicas of a tiny model behind a front."""
    ray = pytest.importorskip("ray")
    from ray import serve

    (tmp_path / "model").mkdir()
    (tmp_path / "keys").write_text("\n".join(serving.KEYS), encoding="utf-8")
    given = {"model": save_model(tmp_path / "model"), "state": str(tmp_path / "state"), "cap": "4MiB"}
    given |= {"keep_recent": "8", "api_key_file": str(tmp_path / "keys")}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(import_module(MODULE).build(given), name="agentmem")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def say(http: httpx2.Client, messages: list[Any], text: str) -> dict[str, Any]:
    """One turn of a chat; what the answer has under ``agentmem``."""
    messages.append({"role": "user", "content": text})
    answer = http.post("/v1/chat/completions", json=serving.chat(model="model") | {"messages": messages})
    assert answer.status_code == 200, answer.text
    messages.append(answer.json()["choices"][0]["message"])
    facts: dict[str, Any] = answer.json()["agentmem"]
    return facts


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_conversation_goes_on_when_its_replica_is_killed(url: str) -> None:
    """Both replicas hold conversations; one is killed: all of them go on, and what was read is not read again."""
    from benchmarks.replicas import replicas

    headers = {"Authorization": f"Bearer {serving.KEYS[0]}"}
    with httpx2.Client(base_url=url, headers=headers, timeout=120) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").json() == {"status": "ready"}
        wrong = http.post("/v1/chat/completions", json={}, headers={"Authorization": "Bearer wrong-key"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        talks: list[list[Any]] = [[] for _ in range(6)]
        for at, talk in enumerate(talks):
            assert not say(http, talk, f"Conversation {at}")["continued"]
        os.kill(replicas()[0], signal.SIGKILL)
        for _ in range(2):
            assert all(say(http, talk, "More")["continued"] for talk in talks)
