"""The types of the hooks that run before and after compactions, with their arguments and answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agentmem.reporting.report import CompactionReport

PROCEED, POSTPONE, VETO = "proceed", "postpone", "veto"


@dataclass(frozen=True, slots=True)
class CompactionContext:
    """The state of the memory that is about to be compacted, given to a ``before_compact`` hook."""

    session: str
    full: bool
    """True if the memory cannot take another token. In this case the answers ``postpone`` and ``veto`` end the turn."""
    tokens_seen: int
    total_slots: int
    room: int
    policy: str
    policies: tuple[str, ...]
    """Names of the policies that the hook may return instead of ``proceed``."""


BeforeCompact = Callable[[CompactionContext], str]
"""Hook that is called before a compaction and decides about it.

It returns ``"proceed"`` to compact now, ``"postpone"`` to be asked again after ``min_reclaim`` more tokens, ``"veto"``
to be asked again only when the memory is full, or the name of one of the session's policies to compact with that
policy."""
AfterCompact = Callable[[CompactionReport], None]
"""Hook that is called after a compaction with its report."""
