"""What of a session is neither tensors nor the row's: its dialogue, its pending ids, whose tokens are whose."""

from __future__ import annotations

import base64
import json
from array import array
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, NonNegativeInt, ValidationError

from agentmem.errors import SnapshotRefused
from agentmem.sessions.dialogue import Dialogue
from agentmem.sessions.transcript import Entry
from agentmem.sessions.turn import Reply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentmem.sessions.session import Session


class Saved(BaseModel):
    """The state of one session beside its memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ids: tuple[NonNegativeInt, ...]
    dialogue: Dialogue
    entries: tuple[Entry, ...]
    open_reply: tuple[NonNegativeInt, str] | None
    """How many of the last ids belong to an open reply, and its text."""
    sampling: str | None
    """State of the sampling generator, base64."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Read it out of a snapshot's state.

        Raises:
            ValueError: there is none, or it is none.

        """
        try:
            return cls.model_validate_json(json.dumps(state["session"]))
        except (KeyError, ValidationError) as error:
            raise ValueError(f"the session's state cannot be read: {error}") from error


def saved(session: Session) -> Saved:
    """The state of a session beside its memory, as a value."""
    drawn = None if session.generator is None else base64.b64encode(bytes(session.generator.get_state().tolist()))
    return Saved(
        ids=tuple(session.ids),
        dialogue=session.dialogue,
        entries=tuple(session.entries),
        open_reply=None if session.reply is None else (len(session.reply.ids), session.reply.text),
        sampling=None if drawn is None else drawn.decode(),
    )


def restore(session: Session, state: Saved) -> None:
    """Put a state into a session that has read nothing."""
    session.ids = array("q", state.ids)
    session.dialogue, session.entries = state.dialogue, list(state.entries)
    if state.open_reply is not None:
        count, text = state.open_reply
        session.reply = Reply(list(session.ids[len(session.ids) - count :]), text)
        session.reply_start = len(session.ids) - count
    if state.sampling is not None and session.generator is not None:
        session.generator.set_state(torch.tensor(list(base64.b64decode(state.sampling)), dtype=torch.uint8))


class Made(BaseModel):
    """How a session was made, as its manifest says it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    policy: str
    settings: dict[str, JsonValue]

    @classmethod
    def of(cls, settings: Mapping[str, JsonValue], where: str) -> Self:
        """Read it.

        Raises:
            SnapshotRefused: it is not what a session writes there.

        """
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise SnapshotRefused(
                f"{where}: the manifest's settings are no session's ({error.error_count()} faults); nothing of it was "
                "used: load another snapshot"
            ) from None


def session_of(session: Session) -> dict[str, Any]:
    """What the manifest says of how a session was made; see :class:`Made`."""
    memory = session.memory
    settings = memory.settings.model_dump(mode="json")
    del settings["cap"]
    return {
        "name": session.name,
        "policy": memory.policy.name,
        "settings": {**settings, **session.settings.model_dump(mode="json")},
    }
