"""The agent runtime: conversations whose memory stays within a cap, and that can be forked, saved and loaded."""

from agentmem.sessions.chat.dialogue import Message
from agentmem.sessions.conversation import Reply
from agentmem.sessions.events import (
    CompactionFinished,
    CompactionStarted,
    Event,
    Rebased,
    TextEvent,
    TokenEvent,
    TurnFailed,
    TurnFinished,
)
from agentmem.sessions.hooks import CompactionContext
from agentmem.sessions.runtime import Runtime
from agentmem.sessions.session import Session
from agentmem.sessions.settings import SessionSettings
from agentmem.sessions.stats import RuntimeStats, SessionStats
from agentmem.sessions.transcript import Entry, Transcript

__all__ = [
    "CompactionContext",
    "CompactionFinished",
    "CompactionStarted",
    "Entry",
    "Event",
    "Message",
    "Rebased",
    "Reply",
    "Runtime",
    "RuntimeStats",
    "Session",
    "SessionSettings",
    "SessionStats",
    "TextEvent",
    "TokenEvent",
    "Transcript",
    "TurnFailed",
    "TurnFinished",
]
