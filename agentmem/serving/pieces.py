"""The pieces in which a turn sends its results to the route that serves the request, and the turn's token counts."""

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
"""Reason for the end of a turn; ``read`` means that no reply was asked for."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The first piece of a turn, sent when the turn has found its conversation and read all new messages."""

    conversation: str
    """Id of the conversation."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the reply's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Made:
    """The piece that reports a new compaction item; ``token`` is the item's ``encrypted_content``."""

    id: str
    token: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The last piece of a turn, with the whole reply."""

    reason: End
    text: str
    calls: tuple[ToolCall, ...]
    usage: Usage
    facts: dict[str, Any]
    """Numbers that the answer carries under ``agentmem``."""


Piece = Begun | Text | Made | Ended


@dataclass(slots=True)
class Usage:
    """Token counts of one turn."""

    prompt: int = 0
    """Number of tokens of the whole conversation before the reply."""
    cached: int = 0
    """Number of the ``prompt`` tokens that the memory held before this turn, and that were not read again."""
    reply: int = 0
    """Number of tokens of the reply."""

    def chat(self) -> dict[str, Any]:
        """Return the counts as the ``usage`` object of a chat completion."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.reply,
            "total_tokens": self.prompt + self.reply,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def responses(self) -> dict[str, Any]:
        """Return the counts as the ``usage`` object of a response."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": self.prompt - self.cached},
            "output_tokens": self.reply,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.reply,
        }


@dataclass(slots=True)
class Log:
    """The reports of all compactions of one turn."""

    reports: list[CompactionReport] = field(default_factory=list)

    def facts(self, conversation: str, stats: SessionStats, usage: Usage) -> dict[str, Any]:
        """Return the content of the field ``agentmem`` of an answer, such as numbers of tokens, slots and bytes."""
        return {
            "session": conversation,
            "continued": usage.cached > 0,
            "read_tokens": usage.prompt - usage.cached,
            "policy": stats.policy,
            "total_slots": stats.total_slots,
            "capacity": stats.capacity,
            "lease_bytes": stats.lease_bytes,
            "peak_bytes": stats.peak_bytes,
            "total_compactions": stats.compactions,
            "compactions": compactions(self.reports),
        }


def compactions(reports: Sequence[CompactionReport]) -> list[dict[str, Any]]:
    """Return compaction reports as JSON objects for an answer; the numbers of single layers are left out."""
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
    """Return a finite number unchanged, and ``None`` for NaN and infinity, which JSON cannot express."""
    return value if value is not None and math.isfinite(value) else None
