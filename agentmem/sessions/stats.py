"""A moment of a session or of a runtime, in numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

State = Literal["active", "idle", "on disk", "closed"]


class SessionStats(BaseModel):
    """A moment of one session. Bytes are allocated bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    state: State
    policy: str
    tokens: int
    """Read and written so far; ``pending`` of them are not in the memory yet, the last one between turns."""
    pending: int
    next_position: int
    held_slots: int
    """Over all layers and KV heads; 0 on disk."""
    capacity: int
    room: int
    """Tokens that fit before the next compaction."""
    pinned_tokens: int
    lease_bytes: int
    charged_bytes: int
    """Of the runtime's cap: the lease while active, what is held while idle, 0 on disk; shared with forks."""
    peak_bytes: int
    compactions: int
    rebases: int
    shared_with: int
    """Other sessions that hold the same memory."""
    history_rewritten: bool
    """Whether the chat template would have written older messages otherwise by now; the memory keeps its own."""


class RuntimeStats(BaseModel):
    """A moment of a runtime."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cap_bytes: int
    charged_bytes: int
    active: int
    idle: int
    on_disk: int
    waiting: int
