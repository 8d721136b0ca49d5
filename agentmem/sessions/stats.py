"""A moment of a session or of a runtime, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict

from agentmem.memory.pins import size

if TYPE_CHECKING:
    from agentmem.sessions.conversation import Conversation

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
    """Never compacted until they are unpinned."""
    request_tokens: int
    """Of the newest request, while that is pinned; see :attr:`SessionSettings.pin_request`."""
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

    @classmethod
    def of(cls, session: Conversation) -> Self:
        """Look at a session."""
        holding, memory = session.holding, session.holding.memory  # read once: another thread may move it to disk
        state: State = "active" if session.busy else "idle"
        if memory is None:
            state = "closed" if session.closed else "on disk"
        sequence = None if memory is None else memory.sequences[0]
        return cls(
            name=session.name,
            state=state,
            policy=holding.policy,
            tokens=len(session.ids),
            pending=len(session.ids) - holding.seen,
            next_position=0 if sequence is None else sequence.next_position,
            held_slots=0 if sequence is None else sequence.held,
            capacity=holding.capacity,
            room=0 if sequence is None else sequence.room,
            pinned_tokens=size(holding.pins.spans),
            request_tokens=size(holding.pins.request),
            lease_bytes=holding.lease,
            charged_bytes=holding.charged,
            peak_bytes=holding.peak,
            compactions=holding.compactions,
            rebases=holding.rebases,
            shared_with=len(holding.sessions - {id(session)}),
            history_rewritten=session.dialogue.rewrites,
        )


class RuntimeStats(BaseModel):
    """A moment of a runtime."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cap_bytes: int
    charged_bytes: int
    """Of the cap: the sum of the four that follow."""
    running_bytes: int
    """What memories hold whose turns run."""
    running_room_bytes: int
    """The rest of the leases of these turns: what is still to be read and written, and what compactions work in."""
    idle_bytes: int
    """What idle memories hold."""
    idle_room_bytes: int
    """The rest of what idle memories are charged, which is taken from them when others need it."""
    active: int
    idle: int
    on_disk: int
    waiting: int
    """Turns that wait for a lease."""
    feeding: int
    """Turns that wait for the next forward; this and what follows counts all runtimes of the model."""
    sequences_per_forward: float
    """Sessions that a forward fed, on average over the newest."""
    tokens_per_second: float
    """Tokens that were read and written while the newest forwards ran, per second of theirs."""
    fed_tokens: int
    """Tokens that were read and written so far."""
    pause_p50_seconds: float
    """What one of the newest compactions took, during which no session is fed: the median."""
    pause_p95_seconds: float
    pause_max_seconds: float
