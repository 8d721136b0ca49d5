"""What a turn tells a route, piece by piece, and the numbers at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from agentmem.serving.tool_calls import ToolCall

if TYPE_CHECKING:
    from agentmem import CompactionReport
    from agentmem.sessions import SessionStats

End = Literal["stop", "length", "tool_calls", "deadline", "read"]
"""Why a reply ended; ``read``: none was asked for."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The conversation that the turn goes on from has been found, and everything that was new has been read."""

    conversation: str


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the reply."""

    text: str


@dataclass(frozen=True, slots=True)
class Made:
    """A compaction item was made: its id, and what its ``encrypted_content`` is."""

    id: str
    token: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a turn."""

    reason: End
    text: str
    calls: tuple[ToolCall, ...]
    usage: Usage
    facts: dict[str, Any]
    """What a response has under ``agentmem``."""


Piece = Begun | Text | Made | Ended


@dataclass(slots=True)
class Usage:
    """Tokens of one turn."""

    prompt: int = 0
    """Of the whole conversation before the reply."""
    cached: int = 0
    """Of these, what the memory held already."""
    reply: int = 0

    def chat(self) -> dict[str, Any]:
        """As chat completions have it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.reply,
            "total_tokens": self.prompt + self.reply,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def responses(self) -> dict[str, Any]:
        """As responses have it."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": self.prompt - self.cached},
            "output_tokens": self.reply,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.reply,
        }


@dataclass(slots=True)
class Log:
    """What happened to the memory in one turn."""

    reports: list[CompactionReport] = field(default_factory=list)

    def facts(self, conversation: str, stats: SessionStats, usage: Usage) -> dict[str, Any]:
        """The numbers that a response carries under ``agentmem``."""
        return {
            "session": conversation,
            "continued": usage.cached > 0,
            "read_tokens": usage.prompt - usage.cached,
            "policy": stats.policy,
            "held_slots": stats.held_slots,
            "capacity": stats.capacity,
            "lease_bytes": stats.lease_bytes,
            "peak_bytes": stats.peak_bytes,
            "total_compactions": stats.compactions,
            "compactions": compactions(self.reports),
        }


def compactions(reports: Sequence[CompactionReport]) -> list[dict[str, Any]]:
    """Reports as a response carries them: sums and means, nothing of single layers."""
    return [
        {
            "policy": report.policy,
            "tokens_seen": report.tokens_seen,
            "slots_before": report.slots_before,
            "slots_after": report.slots_after,
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "bytes_peak": report.bytes_peak,
            "seconds": round(report.seconds, 6),
            "output_error": _finite(report.output_error),
            "log_mass_error": _finite(report.log_mass_error),
        }
        for report in reports
    ]


def _finite(value: float | None) -> float | None:
    """JSON has no other numbers."""
    return value if value is not None and math.isfinite(value) else None
