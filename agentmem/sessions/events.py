"""What happens during a turn, as typed values: what :meth:`Session.events` and :meth:`Session.stream` yield."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentmem.reporting.report import CompactionReport, RebaseReport

Reason = Literal["end", "stop", "length", "cancelled", "deadline", "read"]
"""Why a turn ended: an end token, a stopping criterion, the length, a cancelled consumer, a deadline; ``read`` where
nothing was to be written."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenEvent(_Event):
    """The model chose a token."""

    type: Literal["token"] = "token"  # a token of text
    id: int


class TextEvent(_Event):
    """A piece of the reply's text; the pieces of a turn together are the reply."""

    type: Literal["text"] = "text"
    text: str


class CompactionStarted(_Event):
    """The memory is about to be compacted."""

    type: Literal["compaction_started"] = "compaction_started"
    policy: str
    tokens_seen: int
    slots: int
    forced: bool
    """Whether going on needs it: the memory is full."""


class CompactionFinished(_Event):
    """The memory was compacted."""

    type: Literal["compaction_finished"] = "compaction_finished"
    report: CompactionReport


class Rebased(_Event):
    """Slots moved to lower positions."""

    type: Literal["rebased"] = "rebased"
    report: RebaseReport


class TurnFinished(_Event):
    """The turn is over; the session can go on."""

    type: Literal["turn_finished"] = "turn_finished"
    reason: Reason
    text: str
    tokens: int
    """Of the reply, its end included."""


class TurnFailed(_Event):
    """The turn ended with an error; the session is valid. Only :meth:`Session.stream` yields it, then raises."""

    type: Literal["turn_failed"] = "turn_failed"
    error: str
    """The name of its class."""
    message: str


Event = Annotated[
    TokenEvent | TextEvent | CompactionStarted | CompactionFinished | Rebased | TurnFinished | TurnFailed,
    Field(discriminator="type"),
]
