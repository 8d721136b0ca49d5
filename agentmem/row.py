"""One sequence of a batch: its stores, and what it has consumed."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch

from agentmem.pins import Pins

if TYPE_CHECKING:
    from agentmem.arena import LayerStore
    from agentmem.job import Job
    from agentmem.marks import Marks
    from agentmem.rebasing import Move
    from agentmem.report import SummaryReport
    from agentmem.samples import QuerySample


class Row:
    """One sequence: its stores, and what it has consumed."""

    def __init__(self, index: int, layers: int, room: int, seed: int) -> None:
        """An empty row with room for so many tokens; its randomness does not depend on the other rows."""
        self.index = index
        self.stores: list[LayerStore | None] = [None] * layers
        self.samples: list[tuple[QuerySample, ...]] = [()] * layers
        """Per layer, one sample for each stored part of the policy's queries."""
        self.ids: array[int] = array("q")
        self.tail: array[int] = array("i")
        """Positions of the tokens appended since the last compaction."""
        self.next_position = 0
        self.shift = 0
        """What re-basing took off the positions so far."""
        self.moves = 0
        """Re-basings that have ended."""
        self.moving: Move | None = None
        """A re-basing that has begun and not ended."""
        self.marks: dict[str, Marks] = {}
        """What was read for each pattern."""
        self.room = room
        """Tokens that can be appended before the row must be compacted."""
        self.budgets: tuple[tuple[int, ...], ...] | None = None
        """Segment slots per layer and head of a compaction that has begun and not ended."""
        self.job: Job | None = None
        """What that compaction is to do, while it has begun and not ended."""
        self.summary: SummaryReport | None = None
        """The newest summary that the slots hold and no report has told."""
        self.pins = Pins()
        self.promoting: int | None = None
        """Up to which token pins are being promoted, while that has begun and not ended."""
        self.intact = 0
        """Tokens from this one on have a slot in every head, as they were appended."""
        self.compactions = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.dealt_at: int | None = None
        """Tokens seen when headroom was last dealt; ``None`` while stores still grow towards the capacity."""

    def recount(self, capacity: int, scratch: int) -> None:
        """Work out room and tail again from the stores, after something was taken back; ``scratch`` slots stay free."""
        del self.tail[self.seen - (self.dealt_at or 0) :]
        full = [store for _, store in self.full()]
        if self.dealt_at is not None:
            self.room = min((store.room for store in full), default=0) - scratch
        else:
            self.room = capacity - scratch - max((max(store.lengths) for store in full), default=0)

    def full(self) -> list[tuple[int, LayerStore]]:
        """Layers of full attention, which are compacted, and their stores; those that hold something."""
        stores = enumerate(self.stores)
        return [(index, store) for index, store in stores if store is not None and store.spec.shape.window is None]

    def mean_slots(self) -> int:
        """Slots of a head of those layers, on average."""
        lengths = [length for _, store in self.full() for length in store.lengths]
        return sum(lengths) // max(1, len(lengths))

    def front(self, prefix: int) -> int:
        """Slots at the front of every head that are never compacted: the prefix, and promoted pins."""
        prefix = min(prefix, self.seen)
        return prefix + self.pins.count(prefix, self.pins.until)

    def behind(self, token: int, prefix: int) -> int:
        """Slots in every head that intact tokens from ``token`` on have, promoted ones aside."""
        return self.seen - token - self.pins.count(max(token, prefix), self.pins.until)

    def compactable(self, start: int, prefix: int) -> int:
        """The first token from ``start`` on that a span may begin with: behind the prefix, and never compacted."""
        return max(start, self.intact, min(prefix, self.seen))

    @property
    def seen(self) -> int:
        """Tokens that the row has consumed."""
        return len(self.ids)

    @property
    def held(self) -> int:
        """Slots physically occupied, over all layers and heads."""
        return sum(sum(store.lengths) for store in self.stores if store is not None)
