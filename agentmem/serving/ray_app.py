"""The server as a Ray Serve application: a front, and replicas that share a state folder.

``serve run agentmem.serving.ray_app:app`` takes the settings of :class:`agentmem.serving.replica.ReplicaSettings` from
the environment (AGENTMEM_STATE, AGENTMEM_CAP and so on); ``serve run agentmem.serving.ray_app:build state=/mnt/state``
takes them from its arguments first. Needs the extra ``ray``.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI

from agentmem.errors import SettingsRefused
from agentmem.serving.front import create_front
from agentmem.serving.gate import Scope
from agentmem.serving.inprocess import Message
from agentmem.serving.replica import Replica, ReplicaSettings

try:
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.config import RequestRouterConfig
except ModuleNotFoundError as error:
    raise SettingsRefused(
        f"Ray Serve needs {error.name}, which is not installed; install the extra: pip install 'agentmem-runtime[ray]'"
    ) from None

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_MORE = 2
"""Ray admits so many times the requests that a replica does, so that it is the replica that refuses them."""
_GRACE = 60.0
"""Seconds that a replica has to end its turns and to save its conversations."""


class ModelReplica:
    """The deployment that holds the model."""

    async def __init__(self, settings: ReplicaSettings) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load the model."""
        self._replica = Replica(settings)
        await self._replica.start()

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        """Yield the ASGI messages of the answer to a request."""
        async with aclosing(self._replica.answer(scope, body)) as messages:
            async for message in messages:
                yield message

    async def __del__(self) -> None:
        """Save all conversations; Ray calls this at a graceful end."""
        await self._replica.close()


class Front:
    """The deployment that clients reach, which passes their requests on."""

    def __init__(self, settings: ReplicaSettings, replicas: Any) -> None:
        """Set the handle of the deployment that holds the model."""
        self._settings, self._replicas = settings, replicas

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application of this deployment."""
        given = self._settings
        return create_front(self._call, (RayActorError,), given.server(), given.keys(), given.replicas)

    async def _call(self, key: str, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        answer = self._replicas.options(stream=True, session_id=key).answer.remote(scope, body)
        try:
            async for message in answer:
                yield message
        finally:
            answer.cancel()


def build(given: dict[str, str]) -> Any:
    """Return the Ray Serve application; settings that are not ``given`` come from the environment.

    Raises:
        UnknownPolicy, SettingsRefused: a setting is wrong.

    """
    settings = ReplicaSettings.of_environment(os.environ, **given)
    settings.check()
    replicas = serve.deployment(ModelReplica).options(
        name="model",
        num_replicas=settings.replicas,
        max_ongoing_requests=_MORE * settings.max_requests,
        graceful_shutdown_timeout_s=_GRACE,
        ray_actor_options={"num_cpus": settings.cpus},
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
    )
    front = serve.deployment(serve.ingress()(Front)).options(
        name="front",
        max_ongoing_requests=_MORE * settings.max_requests * settings.replicas,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(settings, replicas.bind(settings))


def __getattr__(name: str) -> Any:
    """Build ``app`` when Ray asks for it, so that importing this module needs no settings."""
    if name == "app":
        return build({})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
