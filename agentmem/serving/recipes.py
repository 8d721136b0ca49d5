"""How the session of a conversation is made: what a request has under ``agentmem``, its tools, its policy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from agentmem import contracts, plugins, specs
from agentmem.errors import RequestRefused
from agentmem.sessions.chat.dialogue import Role


class Extension(BaseModel):
    """``agentmem`` in a request's body. What is left out is as the server was started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str | None = Field(default=None, max_length=500)
    """An installed policy, or with options. It may name neither files nor patterns."""
    keep_first: int | None = Field(default=None, ge=0)
    keep_recent: int | None = Field(default=None, ge=0)
    target: float | int | None = Field(default=None, gt=0)
    """What a compaction leaves: a fraction, or slots per head."""
    pin_roles: tuple[Role, ...] | None = None
    """Messages of these roles are never compacted."""
    pin_names: tuple[str, ...] | None = None
    pin_request: Annotated[bool, Field(strict=True)] | None = None
    """Whether the newest request is not compacted until it is answered."""
    template_options: dict[str, JsonValue] | None = None
    """The chat template's own variables, such as ``enable_thinking``."""
    compact: Literal["after"] | None = None
    """Compact what this request brings right after it was read."""
    focus: str = Field(default="", max_length=4000)
    """What must stay recallable when this request has something compacted."""


_SETTINGS = ("keep_first", "keep_recent", "target", "pin_roles", "pin_names", "pin_request")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a session is made of. Conversations of different recipes are never continued as one another."""

    policy: str | None = None
    settings: str = "{}"
    """As JSON, like the others: a recipe is a value, and is kept in a file."""
    tools: str = "null"
    options: str = "null"

    @classmethod
    def of(cls, extension: Extension, tools: list[dict[str, Any]] | None) -> Recipe:
        """The recipe that a request asks for.

        Raises:
            RequestRefused: its policy brings a pattern. UnknownPolicy, SettingsRefused: no such policy.

        """
        check_policy(extension.policy)
        given = {name: getattr(extension, name) for name in _SETTINGS}
        settings = {name: value for name, value in given.items() if value is not None}
        return cls(extension.policy, _json(settings), _json(tools), _json(extension.template_options))

    def arguments(self) -> dict[str, Any]:
        """What :meth:`agentmem.Runtime.session` and ``load`` are called with, but for the policy."""
        return {
            "tools": json.loads(self.tools),
            "template_options": json.loads(self.options),
            **json.loads(self.settings),
        }

    def made_policy(self) -> contracts.Policy | None:
        """The policy, made without opening a file that its options name; ``None`` is the runtime's."""
        if self.policy is None:
            return None
        with contracts.without_files():
            return plugins.policy(self.policy)


def check_policy(spec: str | None) -> None:
    """Refuse a policy that a client must not have this machine run.

    Raises:
        RequestRefused: it brings a pattern of its own. UnknownPolicy, SettingsRefused: there is no such policy.

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
