"""Replicas: servers of one model that share a state folder; each has a model, a cap and an application of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from agentmem import Runtime, models, plugins
from agentmem.serving import launch
from agentmem.serving.app import create_app
from agentmem.serving.gate import Scope
from agentmem.serving.inprocess import Message, answer
from agentmem.serving.keys import ApiKeys
from agentmem.serving.server import Server
from agentmem.serving.settings import ServerSettings
from agentmem.settings import Described, Settings

_PREFIX = "AGENTMEM_"


class ReplicaSettings(Described):
    """What all replicas have in common.

    Raises:
        SettingsRefused: :meth:`of` got a wrong value; the error names the field, the value and the limit.

    """

    state: Path
    """Folder that all replicas share, on whatever machines they run."""
    model: str | None = None
    """Folder or Hugging Face id of the model; without it, the default model."""
    cap: str = "64MiB"
    """Hard limit on the bytes of each replica's KV memory."""
    policy: str = "am-halving"
    """Policy of conversations that choose none."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Part of the cap that one running conversation may use."""
    keep_recent: int = Field(default=96, ge=0)
    """Number of last tokens that are never compacted."""
    replicas: int = Field(default=2, ge=1)
    """Number of replicas."""
    cpus: float = Field(default=1, gt=0)
    """Number of CPUs that Ray reserves for a replica, and of threads that its model computes with."""
    api_key_file: Path | None = None
    """File with the API keys, one per line; without it no key is asked for."""
    chat_template: str | None = None
    """Jinja file in place of the tokenizer's template, or ``chatml-tools``."""
    max_tokens: int = Field(default=1024, ge=1)
    """Maximum number of tokens of a reply if the request sets no limit."""
    max_requests: int = Field(default=64, ge=1)
    """Maximum number of requests that run or wait at a replica; further requests get status 429."""

    @classmethod
    def of_environment(cls, environment: Mapping[str, str], **given: str) -> Self:
        """Return settings from the variables AGENTMEM_STATE, AGENTMEM_CAP and so on; ``given`` ones come first.

        Raises:
            SettingsRefused: a value is wrong, or no state folder is given.

        """
        found = {name: environment.get(_PREFIX + name.upper()) for name in cls.model_fields}
        made = cls.of(**{name: value for name, value in found.items() if value} | given)
        folders = {name: path.expanduser().absolute() for name, path in made if isinstance(path, Path)}
        return made.model_copy(update=folders)  # a replica has another working directory

    def server(self) -> ServerSettings:
        """Return the settings of each replica's server."""
        name = self.model or models.DEFAULT.name
        return ServerSettings.of(
            models=(Path(name).name if Path(name).exists() else name,),
            state=self.state,
            shared=True,
            reply_tokens=self.max_tokens,
            max_requests=self.max_requests,
        )

    def check(self) -> None:
        """Refuse what can be told to be wrong without a model, before any replica is started.

        Raises:
            UnknownPolicy, SettingsRefused: a setting is wrong, or a file cannot be read.

        """
        Settings.of(cap=self.cap, keep_recent=self.keep_recent)
        plugins.policy(self.policy)
        self.keys()
        self.template()

    def template(self) -> str | None:
        """Return the text of the chat template that replaces the tokenizer's, or ``None``.

        Raises:
            SettingsRefused: the file cannot be read.

        """
        return None if self.chat_template is None else launch.read_template(self.chat_template)

    def keys(self) -> ApiKeys:
        """Return the accepted API keys.

        Raises:
            SettingsRefused: the file cannot be read, or holds no valid key.

        """
        return ApiKeys() if self.api_key_file is None else ApiKeys.of_file(self.api_key_file)


class Replica:
    """A server in this process that is asked without a connection."""

    def __init__(self, settings: ReplicaSettings) -> None:
        """Only store the settings; :meth:`start` loads the model."""
        self.settings, self._open = settings, AsyncExitStack()

    async def start(self) -> None:
        """Load the model, and begin to serve on the running event loop.

        Raises:
            AgentmemError: the model cannot be loaded, the cap is too small, or the state folder cannot be used.

        """
        given, server = self.settings, self.settings.server()
        self._open.enter_context(launch.using(server.state, shared=True))
        model, tokenizer = models.load(given.model)
        tokenizer.chat_template = given.template() or tokenizer.chat_template
        runtime = Runtime(
            model,
            tokenizer,
            cap=given.cap,
            policy=given.policy,
            pressure=("trim", "disk"),
            spill=given.state / "idle",
            max_waiting=given.max_requests,
            share=given.share,
            keep_recent=given.keep_recent,
        )
        made = Server(self._open.enter_context(runtime), server, given.keys())
        made.check()
        self._app: Any = create_app(made)
        await self._open.enter_async_context(self._app.router.lifespan_context(self._app))

    def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        """Yield the ASGI messages of the answer to a request; see :func:`agentmem.serving.inprocess.answer`."""
        return answer(self._app, scope, body)

    async def close(self) -> None:
        """End running turns, save all conversations, and free the model's memory."""
        await self._open.aclose()
