"""Immutable records of a conversation's messages: which the model wrote, and which were fed to the memory.

These records contain no ids, and nothing in this module renders text. The session holds the ids, and
:class:`agentmem.sessions.chat.template.ChatTemplate` finds the ids that continue a dialogue.
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
    """One message, in the shape that chat templates read; build it with :meth:`of`.

    ``tool_calls`` have the shape of OpenAI's interface:
    ``{"type": "function", "id": …, "function": {"name": …, "arguments": {…}}}``.

    Raises:
        SettingsRefused: :meth:`of` found an invalid field; the message names the field, the value and what is allowed.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    content: str = ""
    name: str | None = None
    """Name of the speaker: of the tool in a tool's message, else of a participant."""
    tool_calls: Annotated[tuple[dict[str, JsonValue], ...], Field(fail_fast=True)] | None = None
    """Tool calls of an assistant's message."""
    reasoning_content: str | None = None
    """Text of an assistant's reasoning before the content, for templates that write it."""
    tool_call_id: str | None = None
    """Id of the call that a tool's message answers."""

    @model_validator(mode="after")
    def _encodable(self) -> Self:
        for name in type(self).model_fields:
            check_encodable(name, getattr(self, name))
        return self

    @classmethod
    def of(cls, **fields: object) -> Message:
        """Build a message from fields in any shape that :mod:`agentmem.sessions.chat.message_shapes` reads.

        Raises:
            SettingsRefused: some fields are invalid; the message names all of them.

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
        """Return a message for each item, which is a Message, a mapping of fields, or an SDK's message object.

        Raises:
            SettingsRefused: ``given`` is not a list of messages, or a message is invalid.

        """
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
    """An immutable record of a conversation so far: its messages, and how many of them the memory was fed.

    Adding a message makes a new dialogue, so forks can share a dialogue.

    The first ``fed`` messages were fed to the memory. All messages that the model generated are among these, and have
    the role assistant. Messages that were not fed yet are system messages that wait for the next message, because the
    template writes their text into that message.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: Annotated[tuple[Message, ...], FailFast()] = ()
    generated: Annotated[tuple[int, ...], FailFast()] = ()
    """Ascending indices of the messages that the model wrote; the memory holds their ids as they were sampled."""
    fed: int = Field(default=0, ge=0)
    """Number of messages that the memory was fed. The last of them may still lack its closing markup or ``owed``."""
    owed: str = ""
    """Text at the end of the last given message that is not fed yet, since it depends on the next message. The next
    delta begins with this text or with the text that the template writes instead."""
    open: bool = False
    """True if a reply is open: its generation prompt was fed, and the reply has not been closed."""
    end: int | None = None
    """The end token of the last message, which the memory holds; ``None`` if the model did not write that message or
    the message was cut."""
    rewrites: bool = False
    """True if the memory holds text that the template would now write differently or leave out, such as old
    reasoning."""

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
    """The ids ``start .. stop`` of a delta that belong to one message: its content and the template's markup around it.

    ``message`` is the index of the message in the dialogue. ``message`` is ``None`` for text that the template itself
    writes before the first message, such as a default system prompt or a separate block of tools. Such text has the
    role system.
    """

    role: Role
    message: int | None
    start: int
    stop: int
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """The ids to feed next, and the spans that cover these ids in order; both are empty if there is nothing to feed."""

    ids: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
