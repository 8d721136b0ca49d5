"""The plain values that describe an unfinished compaction or re-basing of a sequence."""

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
    """The parameters of one compaction of one sequence; an interrupted compaction resumes with its job.

    ``begins[layer][head]`` is the index of the first slot of a head's segment; the tuple of a sliding layer is empty.
    The last ``recent`` slots of a head do not belong to its segment. ``each`` is the number of slots to leave in a
    head's segment, on average over all heads. Adaptive budgets may leave more, up to an average of ``most``.
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
    """The number of slots to leave in each segment, by layer and head; empty until the compaction has chosen them."""

    def held(self, layer: int, store: LayerStore) -> tuple[int, ...]:
        """Return the number of slots that each head's segment has in ``store``, the store of ``layer``."""
        pairs = zip(store.lengths, self.begins[layer], strict=True)
        return tuple(max(0, length - begin - self.recent) for length, begin in pairs)


@dataclass(frozen=True, slots=True)
class Move:
    """An unfinished re-basing of a sequence, which moves its slots to lower positions.

    The recent window moves as a whole: it began at position ``start`` and will begin at position ``end``. The older
    slots, which lie between the prefix and the recent window, move closer together. For this, each head has a limit:
    distances between the positions of neighbouring slots shrink to the limit if they are larger. A head's limit is the
    largest with which its older slots fit between the prefix and ``end``. ``gap`` is the smallest limit of all heads;
    it is only reported.
    """

    start: int
    end: int
    gap: int
    turned: set[int] = field(default_factory=set)
    """The layers whose stored queries have already been rotated."""
