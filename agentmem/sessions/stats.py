"""Statistics of a session or of a runtime at one moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict

from agentmem.memory.pins import size

if TYPE_CHECKING:
    from agentmem.sessions.conversation import Conversation

State = Literal["active", "idle", "on disk", "closed"]


class SessionStats(BaseModel):
    """Statistics of one session at one moment. Byte counts are those of the allocated tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    state: State
    policy: str
    tokens: int
    """Number of tokens read and written so far."""
    pending: int
    """Number of these tokens that the memory has not consumed yet. Between turns this is usually the last token."""
    next_position: int
    total_slots: int
    """Slots that the memory holds, over all layers and KV heads; 0 while it is on disk."""
    capacity: int
    """Slots per KV head when the memory is full."""
    room: int
    """Number of tokens that fit before the next compaction; 0 while the memory is on disk."""
    pinned_tokens: int
    """Number of tokens that are pinned until they are unpinned."""
    request_tokens: int
    """Tokens of the newest request while it is pinned, else 0; see :attr:`SessionSettings.pin_request`."""
    lease_bytes: int
    charged_bytes: int
    """Bytes of the runtime's cap charged for the session's memory: the lease until the memory is preempted, then the
    bytes that it holds, and 0 while it is on disk. Sessions that share the memory, such as forks, are charged once."""
    peak_bytes: int
    compactions: int
    rebases: int
    shared_with: int
    """Number of other sessions that share this session's memory, such as forks."""
    history_rewritten: bool
    """True if the chat template would now write older messages differently; the memory keeps its own version."""

    @classmethod
    def of(cls, session: Conversation) -> Self:
        """Collect the statistics of a session."""
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
            total_slots=0 if sequence is None else sequence.held,
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
    """Statistics of a runtime at one moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cap_bytes: int
    charged_bytes: int
    """Bytes of the cap that are charged: the sum of the next four fields."""
    running_bytes: int
    """Bytes held by memories whose sessions are in a turn."""
    running_room_bytes: int
    """Rest of the leases of these sessions, in bytes: room for further tokens and for compactions."""
    idle_bytes: int
    """Bytes held by idle memories."""
    idle_room_bytes: int
    """Further bytes charged for idle memories, which are taken from them when other sessions need bytes."""
    active: int
    idle: int
    on_disk: int
    waiting: int
    """Number of turns that wait for a lease."""
    feeding: int
    """Number of turns that wait for the next forward. This field and all that follow cover every runtime of the
    model."""
    sequences_per_forward: float
    """Average number of sessions fed by one forward, over the newest forwards."""
    tokens_per_second: float
    """Tokens read and written in the newest forwards, divided by the duration of these forwards."""
    fed_tokens: int
    """Number of tokens read and written so far."""
    pause_p50_seconds: float
    """Median duration of the newest compactions, in seconds; no session is fed during a compaction."""
    pause_p95_seconds: float
    """95th percentile of these durations."""
    pause_max_seconds: float
    """Longest of these durations."""
