"""The events of a turn, as typed values. :meth:`Session.stream` and :meth:`Session.astream` yield them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentmem.reporting.report import CompactionReport, RebaseReport

Reason = Literal["end", "stop", "length", "cancelled", "deadline", "read"]
"""Reason why a turn ended: ``end`` means an end token, ``stop`` a stopping criterion, ``length`` the length limit,
``cancelled`` a consumer that was cancelled, ``deadline`` a deadline, and ``read`` a turn that only reads messages or a
text."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenEvent(_Event):
    """The event that the model has chosen a token."""

    type: Literal["token"] = "token"  # a token of text
    id: int


class TextEvent(_Event):
    """The event that a piece of the reply's text was written.

    The joined pieces of a turn are all the text that was written in this turn.
    """

    type: Literal["text"] = "text"
    text: str


class CompactionStarted(_Event):
    """The event that a compaction of the memory begins."""

    type: Literal["compaction_started"] = "compaction_started"
    policy: str
    tokens_seen: int
    slots: int
    forced: bool
    """True if the turn cannot continue without this compaction, since the memory is full."""


class CompactionFinished(_Event):
    """The event that a compaction of the memory has ended."""

    type: Literal["compaction_finished"] = "compaction_finished"
    report: CompactionReport


class Rebased(_Event):
    """The event that the memory was re-based: its slots moved to lower positions."""

    type: Literal["rebased"] = "rebased"
    report: RebaseReport


class TurnFinished(_Event):
    """The event that a turn has ended without an error."""

    type: Literal["turn_finished"] = "turn_finished"
    reason: Reason
    text: str
    tokens: int
    """Number of tokens of the reply, including its end token."""


class TurnFailed(_Event):
    """The event that a turn has ended with an error; the session is still valid.

    Only :meth:`Session.astream` yields this event, right before it raises the error.
    """

    type: Literal["turn_failed"] = "turn_failed"
    error: str
    """The name of the error's class."""
    message: str


Event = Annotated[
    TokenEvent | TextEvent | CompactionStarted | CompactionFinished | Rebased | TurnFinished | TurnFailed,
    Field(discriminator="type"),
]
