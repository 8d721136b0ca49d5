"""What is under way in a sequence: a compaction, or a re-basing, that has begun and not ended. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentmem.contracts import Policy
    from agentmem.memory.store import LayerStore
    from agentmem.planning.pricing import Plan

Slots = tuple[tuple[int, ...], ...]
"""A number of slots for each layer and KV head; layers that are not compacted have none."""


@dataclass(frozen=True, slots=True)
class Job:
    """One compaction of one sequence, worked out; it stays the same when an interrupted one goes on.

    ``begins[layer][head]`` is the first slot of a segment, whose end is ``recent`` slots before the head's; sliding
    layers have none. ``each`` and ``most`` are the slots per head to leave: on average, and at most if adaptive.
    """

    policy: Policy
    plan: Plan
    begins: Slots
    recent: int
    each: int
    most: int
    first: int
    """The first token whose text may be run again for its queries."""
    focus: tuple[int, ...] = ()
    text: tuple[int, ...] = ()
    whole: bool = True
    """Whether the segment is all between prefix and recent."""
    budgets: Slots = ()
    """Segment slots per layer and head, once they are known; from then on the compaction has begun."""

    def held(self, layer: int, store: LayerStore) -> tuple[int, ...]:
        """Slots of each head's segment now."""
        pairs = zip(store.lengths, self.begins[layer], strict=True)
        return tuple(max(0, length - begin - self.recent) for length, begin in pairs)


@dataclass(frozen=True, slots=True)
class Move:
    """A re-basing that has begun: the recent block goes from ``start`` to ``end``; no head's ``gap`` is smaller."""

    start: int
    end: int
    gap: int
    turned: set[int] = field(default_factory=set)
    """Layers whose stored queries have been turned."""
