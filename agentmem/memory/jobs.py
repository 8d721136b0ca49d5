"""Plain values that describe an unfinished compaction or re-basing of a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentmem.contracts import Policy
    from agentmem.memory.store import LayerStore
    from agentmem.planning.pricing import Plan

Slots = tuple[tuple[int, ...], ...]
"""A number of slots for each layer and KV head; the tuple of a layer that is not compacted is empty."""


@dataclass(frozen=True, slots=True)
class Job:
    """The parameters of one compaction of one sequence; a compaction that was interrupted resumes with the same job.

    ``begins[layer][head]`` is the first slot of a head's segment, which ends ``recent`` slots before the end of the
    head; the tuple of a sliding layer is empty. ``each`` is the average number of segment slots per head to leave.
    ``most`` is the largest average that adaptive budgets may leave.
    """

    policy: Policy
    plan: Plan
    begins: Slots
    recent: int
    each: int
    most: int
    first: int
    """The first token whose text a probe may run again to obtain reference queries."""
    focus: tuple[int, ...] = ()
    text: tuple[int, ...] = ()
    whole: bool = True
    """True if the segment is everything between the prefix and the recent window."""
    budgets: Slots = ()
    """The slots to leave of each segment, by layer and head; empty until the compaction begins by allocating them."""

    def held(self, layer: int, store: LayerStore) -> tuple[int, ...]:
        """Return the current number of slots in each head's segment."""
        pairs = zip(store.lengths, self.begins[layer], strict=True)
        return tuple(max(0, length - begin - self.recent) for length, begin in pairs)


@dataclass(frozen=True, slots=True)
class Move:
    """An unfinished re-basing, which moves the recent block from position ``start`` to position ``end``.

    ``gap`` is the smallest gap over all heads; see :func:`agentmem.memory.rotation.widest_gap`.
    """

    start: int
    end: int
    gap: int
    turned: set[int] = field(default_factory=set)
    """Layers whose stored queries have been rotated already."""
