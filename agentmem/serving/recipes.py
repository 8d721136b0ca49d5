"""Recipes: the arguments of a conversation's session, made from the tools and the field ``agentmem`` of a request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from agentmem import contracts, plugins, specs
from agentmem.errors import RequestRefused
from agentmem.sessions.chat.dialogue import Role


class Extension(BaseModel):
    """The object ``agentmem`` in a request's body. For a missing field, the server's own setting holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str | None = Field(default=None, max_length=500)
    """Name of an installed policy, possibly with options; options must not contain file names or patterns."""
    keep_first: int | None = Field(default=None, ge=0)
    keep_recent: int | None = Field(default=None, ge=0)
    target: float | int | None = Field(default=None, gt=0)
    """Size of the memory after a compaction: a fraction of its capacity, or a number of slots per KV head."""
    pin_roles: tuple[Role, ...] | None = None
    """Roles whose messages are never compacted."""
    pin_names: tuple[str, ...] | None = None
    pin_request: Annotated[bool, Field(strict=True)] | None = None
    """True to keep the newest request uncompacted until it is answered."""
    template_options: dict[str, JsonValue] | None = None
    """Variables for the chat template, such as ``enable_thinking``."""
    compact: Literal["after"] | None = None
    """``"after"`` to compact the new messages of this request right after they were read."""
    focus: str = Field(default="", max_length=4000)
    """Text that the memory must still be able to recall after compactions during this request."""


_SETTINGS = ("keep_first", "keep_recent", "target", "pin_roles", "pin_names", "pin_request")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The arguments of a session: policy, settings, tools and template options.

    A request for a reply can continue a conversation only if the recipes of both are equal. A request that only
    compacts can continue a conversation with any recipe.
    """

    policy: str | None = None
    settings: str = "{}"
    """Settings as JSON text. ``tools`` and ``options`` are JSON text too, so that recipes can be compared and saved."""
    tools: str = "null"
    options: str = "null"

    @classmethod
    def of(cls, extension: Extension, tools: list[dict[str, Any]] | None) -> Recipe:
        """Return the recipe (the arguments of a session) that a request asks for.

        Raises:
            RequestRefused: the policy's options contain a search pattern.
            UnknownPolicy, SettingsRefused: the policy does not exist, or its options are wrong.

        """
        check_policy(extension.policy)
        given = {name: getattr(extension, name) for name in _SETTINGS}
        settings = {name: value for name, value in given.items() if value is not None}
        return cls(extension.policy, _json(settings), _json(tools), _json(extension.template_options))

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for :meth:`agentmem.Runtime.session` and ``load``, without the policy."""
        return {
            "tools": json.loads(self.tools),
            "template_options": json.loads(self.options),
            **json.loads(self.settings),
        }

    def made_policy(self) -> contracts.Policy | None:
        """Return a new instance of the policy, or ``None`` if the runtime's own policy holds.

        Options that name a file are refused, so that a client cannot make the server open files.
        """
        if self.policy is None:
            return None
        with contracts.without_files():
            return plugins.policy(self.policy)


def check_policy(spec: str | None) -> None:
    """Refuse a policy that is unknown, or whose options contain a search pattern or name a file.

    Raises:
        RequestRefused: the options contain a search pattern (a regular expression that the server would have to run).
        UnknownPolicy, SettingsRefused: the policy does not exist, or its options are wrong or name a file.

    """
    if spec is None:
        return
    with contracts.without_files():
        made, plain = plugins.policy(spec), plugins.policy(specs.plain_name(spec))
    if made.queries.pattern not in ("", plain.queries.pattern):
        raise RequestRefused(
            f"agentmem.policy: {spec[:80]!r} brings a pattern, which a client cannot have this server search for; "
            "leave it out",
            param="agentmem.policy",
        )


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
