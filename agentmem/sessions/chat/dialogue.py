"""A conversation as a value: its messages, which of them the model wrote, and what of them a memory has been fed.

Nothing here holds ids or renders text: the ids in the memory are the state, and
:class:`agentmem.sessions.chat.template.ChatTemplate` finds the ids that go on from a dialogue.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, ValidationError, model_validator

from agentmem.errors import SettingsRefused
from agentmem.sessions.arguments import check_encodable
from agentmem.sessions.chat.message_shapes import plain
from agentmem.untrusted.texts import did_you_mean, faults, shown

__all__ = ["ROLES", "Delta", "Dialogue", "Message", "Role", "Span"]

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


class Message(BaseModel):
    """One message, in the shape that chat templates read.

    ``tool_calls`` are OpenAI's: ``{"type": "function", "id": …, "function": {"name": …, "arguments": {…}}}``.

    Raises:
        SettingsRefused: through :meth:`of`, with the field, the value and what is allowed.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    content: str = ""
    name: str | None = None
    """Who speaks: the tool's name in a tool message, or a participant's."""
    tool_calls: Annotated[tuple[dict[str, JsonValue], ...], Field(fail_fast=True)] | None = None
    """Calls that an assistant's message makes."""
    reasoning_content: str | None = None
    """What an assistant thought before the content, for templates that write it."""
    tool_call_id: str | None = None
    """Which call a tool's message answers."""

    @model_validator(mode="after")
    def _encodable(self) -> Self:
        for name in type(self).model_fields:
            check_encodable(name, getattr(self, name))
        return self

    @classmethod
    def of(cls, **fields: object) -> Message:
        """Build a message of any shape that :mod:`agentmem.sessions.chat.message_shapes` reads.

        Raises:
            SettingsRefused: every violation, with the field.

        """
        fields = plain(fields)
        role = fields.get("role")
        if role not in ROLES:
            hint = did_you_mean(str(role), ROLES)
            raise SettingsRefused(f"role {shown(role)} is unknown; {hint}Roles are: {', '.join(ROLES)}")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            raise SettingsRefused(f"message: {faults(error, fields)}. A message has: {known}") from None

    @classmethod
    def each(cls, given: Iterable[Message | Mapping[str, Any]]) -> list[Message]:
        """Messages of what was given; see :meth:`of`."""
        if isinstance(given, str | Mapping | Message) or not isinstance(given, Iterable):
            raise SettingsRefused(
                f"messages: {shown(given)} is no list of them; write [{{'role': 'user', 'content': ...}}]"
            )
        return [one if isinstance(one, Message) else cls._of(one) for one in given]

    @classmethod
    def _of(cls, given: object) -> Message:
        if isinstance(given, BaseModel):  # an SDK's own class
            given = given.model_dump()
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise SettingsRefused(
                f"message {shown(given)} is none; write {{'role': 'user', 'content': ...}}, or a Message"
            )
        return cls.of(**given)


class Dialogue(BaseModel):
    """A conversation so far. A value: growing it makes another, so forks share it and never disturb one another.

    Invariants: ``fed ≤ len(messages)``; every generated message is an assistant's and fed; the messages from ``fed`` on
    are deferred system messages (the template writes them into the next message).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: Annotated[tuple[Message, ...], FailFast()] = ()
    generated: Annotated[tuple[int, ...], FailFast()] = ()
    """Ascending indices of the messages that the model wrote: the memory holds them as sampled."""
    fed: int = Field(default=0, ge=0)
    """How many messages the memory holds, but for ``owed`` or a generated reply's closing markup."""
    owed: str = ""
    """The last characters of the last given message, which depend on what follows and go to the next delta."""
    open: bool = False
    """Whether the generation prompt was fed and its reply has not been closed."""
    end: int | None = None
    """The id that ended the last message, if that was generated and not cut: its closing markup is in the memory."""
    rewrites: bool = False
    """Whether the memory holds something that the template would have rewritten since (old thinking, for example)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fed > len(self.messages):
            raise ValueError(f"fed is {self.fed}, but there are {len(self.messages)} messages")
        wrong = [at for at in self.generated if not 0 <= at < self.fed or self.messages[at].role != "assistant"]
        if wrong or list(self.generated) != sorted(set(self.generated)):
            raise ValueError(f"generated {self.generated} must be ascending indices of an assistant's fed messages")
        if any(message.role != "system" for message in self.messages[self.fed :]):
            raise ValueError(f"only system messages may wait, but of {len(self.messages)} only {self.fed} were fed")
        return self


@dataclass(frozen=True, slots=True)
class Span:
    """Ids ``start .. stop`` of a delta that belong to one message: its content and the template's markup around it.

    ``message`` is the index in the dialogue, ``None`` for what the template writes by itself before the first message
    (a default system prompt, tools in a block of their own), which has the role system.
    """

    role: Role
    message: int | None
    start: int
    stop: int
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What to feed next: new ids, and the spans that tile them in order. Both are empty if nothing is to be fed."""

    ids: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
