"""Hooks around compactions: what they are called with, and what they may answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agentmem.reporting.report import CompactionReport

PROCEED, POSTPONE, VETO = "proceed", "postpone", "veto"


@dataclass(frozen=True, slots=True)
class CompactionContext:
    """What is about to be compacted.

    ``full``: the memory cannot take another token; ``postpone`` and ``veto`` then end the turn. ``policies`` are the
    names that may be answered instead of ``proceed``.
    """

    session: str
    full: bool
    tokens_seen: int
    held_slots: int
    room: int
    policy: str
    policies: tuple[str, ...]


BeforeCompact = Callable[[CompactionContext], str]
"""``"proceed"``; ``"postpone"``: ask again when another part of the room is used up; ``"veto"``: not before the memory
is full; or the name of one of the session's policies, which then does it."""
AfterCompact = Callable[[CompactionReport], None]
