"""One sequence of a batch: its stores, and what it has consumed.

Nothing here is changed in two places. What a forward changes, for all sequences at once, is one :class:`Consumed`;
what a compaction or a re-basing changes is one :class:`SequenceState`; a layer's slots are one store.
Each is replaced by one assignment, so an interrupt finds the old or the new one. Ids and positions are written behind
the end that those values state, and count once the values include them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from agentmem.memory.pins import Pins, size, within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.memory.jobs import Job, Move
    from agentmem.memory.pins import Spans
    from agentmem.memory.store import LayerStore
    from agentmem.reference_queries.patterns import Marks
    from agentmem.reference_queries.stored import QuerySample
    from agentmem.reporting.report import SummaryReport


class Consumed(NamedTuple):
    """What all sequences of a memory have consumed: a forward is committed by replacing it."""

    tokens: tuple[int, ...] = ()
    """Of each sequence."""
    positions: tuple[int, ...] = ()
    """The next position of each sequence, as whoever feeds it counts: re-basing leaves it alone."""
    columns: int = 0
    """Columns, pads included."""
    prompt_tokens: int = 0
    """Tokens of forwards of more than one token; of those of one: ``new_tokens``."""
    new_tokens: int = 0


@dataclass(slots=True)
class Progress:
    """Where a memory keeps its :class:`Consumed`, for its sequences to read."""

    consumed: Consumed = field(default_factory=Consumed)


@dataclass(frozen=True, slots=True)
class SequenceState:
    """What compactions and re-basings change of a sequence."""

    full_at: int
    """Tokens that the sequence will have consumed when it must be compacted."""
    tail: array[int] = field(default_factory=lambda: array("i"))
    """Positions of the tokens appended since ``headroom_at``."""
    headroom_at: int | None = None
    """Tokens seen when headroom was last allocated; ``None`` while stores still grow towards the capacity."""
    intact: int = 0
    """Tokens from this one on have a slot in every head, as they were appended."""
    compactions: int = 0
    job: Job | None = None
    """A compaction that has begun and not ended."""
    summary: SummaryReport | None = None
    """The newest summary that the slots hold and no report has named yet."""
    shift: int = 0
    """What re-basing took off the positions so far."""
    moves: int = 0
    """Re-basings that have ended."""
    moving: Move | None = None
    """A re-basing that has begun and not ended."""


class TokenSequence:
    """One sequence: its stores, and what it has consumed."""

    def __init__(self, index: int, layers: int, room: int, seed: int, progress: Progress) -> None:
        """An empty sequence with room for so many tokens; its randomness does not depend on the other sequences."""
        self.index = index
        self.state = SequenceState(full_at=room)
        self._progress = progress
        self._stores: tuple[LayerStore | None, ...] = (None,) * layers
        self._ids: array[int] = array("q")
        self.samples: list[tuple[QuerySample, ...]] = [()] * layers
        """Per layer, one sample for each stored part of the policy's queries."""
        self.marks: dict[str, Marks] = {}
        """What was read for each pattern."""
        self.pins = Pins()
        """What is not to be compacted; which of it, and of what was unpinned, is promoted, the stores say."""
        self.generator = torch.Generator().manual_seed(seed)

    # ---- changes

    def change(self, **changes: Any) -> None:
        """Replace parts of the state, all at once."""
        self.state = replace(self.state, **changes)

    def replace(self, layer: int, store: LayerStore | None) -> None:
        """Put a store in the place of a layer's, which is freed: the only way to change what a sequence holds."""
        old = self._stores[layer]
        self._stores = (*self._stores[:layer], store, *self._stores[layer + 1 :])
        if old is not None:
            old.free()

    def write(self, ids: Sequence[int], positions: Sequence[int]) -> None:
        """Write tokens behind the last one; they count once the memory's :class:`Consumed` says so."""
        del self._ids[self.seen :]
        self._ids.extend(ids)
        del self.state.tail[self._tail_length() :]
        self.state.tail.extend(positions)

    def take_back(self) -> None:
        """Drop the slots of tokens that were never committed."""
        for store in self._stores:
            if store is not None and store.seen > self.seen:
                store.drop_tail(store.seen - self.seen)

    def measured(self, capacity: int, scratch: int) -> int:
        """``full_at``, worked out from the stores; ``scratch`` slots stay free."""
        full = [store for _, store in self.full()]
        if self.headroom_at is not None:
            return self.seen + min((store.room for store in full), default=0) - scratch
        return self.seen + capacity - scratch - max((max(store.lengths) for store in full), default=0)

    # ---- what it holds

    @property
    def stores(self) -> tuple[LayerStore | None, ...]:
        """The slots of each layer."""
        return self._stores

    def full(self) -> list[tuple[int, LayerStore]]:
        """Layers of full attention, which are compacted, and their stores; those that hold something."""
        stores = enumerate(self._stores)
        return [(index, store) for index, store in stores if store is not None and store.spec.shape.window is None]

    def mean_slots(self) -> int:
        """Slots of a head of those layers, on average."""
        lengths = [length for _, store in self.full() for length in store.lengths]
        return sum(lengths) // max(1, len(lengths))

    @property
    def promoted(self) -> Spans:
        """Tokens at the front of every store, behind the prefix; while :attr:`arranged` does not hold, of one store."""
        return next((store.promoted for _, store in self.full()), ())

    @property
    def arranged(self) -> bool:
        """Whether all stores have promoted the same tokens, so that no promotion is to be finished."""
        return len({store.promoted for _, store in self.full()}) < 2  # noqa: PLR2004  # one kind, or no store

    def front(self, prefix: int) -> int:
        """Slots at the front of every head that are not compacted: the prefix, and promoted tokens."""
        return min(prefix, self.seen) + size(self.promoted)

    def behind(self, token: int) -> int:
        """Slots in every head that intact tokens from ``token`` on have, promoted ones aside."""
        return self.seen - token - size(within(self.promoted, token, self.seen))

    def compactable(self, start: int, prefix: int) -> int:
        """The first token from ``start`` on that a span may begin with: behind the prefix, and never compacted."""
        return max(start, self.intact, min(prefix, self.seen))

    @property
    def quiet(self) -> bool:
        """Whether no compaction and no re-basing is under way."""
        return self.state.job is None and self.state.moving is None

    @property
    def held(self) -> int:
        """Slots physically occupied, over all layers and heads."""
        return sum(sum(store.lengths) for store in self._stores if store is not None)

    # ---- what it has consumed

    @property
    def seen(self) -> int:
        """Tokens that the sequence has consumed."""
        return self._progress.consumed.tokens[self.index]

    @property
    def ids(self) -> array[int]:
        """Their ids."""
        ids, seen = self._ids, self.seen
        return ids if len(ids) == seen else ids[:seen]

    @property
    def tail(self) -> array[int]:
        """Positions of the tokens appended since the last compaction."""
        tail, length = self.state.tail, self._tail_length()
        return tail if len(tail) == length else tail[:length]

    def _tail_length(self) -> int:
        return self.seen - (self.headroom_at or 0)

    @property
    def next_position(self) -> int:
        """The position of the next token."""
        return self._progress.consumed.positions[self.index] - self.shift

    @property
    def room(self) -> int:
        """Tokens that can be appended before the sequence must be compacted."""
        return self.state.full_at - self.seen

    # ---- parts of the state, by their names

    @property
    def headroom_at(self) -> int | None:
        """See :class:`SequenceState`."""
        return self.state.headroom_at

    @property
    def intact(self) -> int:
        """See :class:`SequenceState`."""
        return self.state.intact

    @property
    def compactions(self) -> int:
        """See :class:`SequenceState`."""
        return self.state.compactions

    @property
    def job(self) -> Job | None:
        """See :class:`SequenceState`."""
        return self.state.job

    @property
    def shift(self) -> int:
        """See :class:`SequenceState`."""
        return self.state.shift

    @property
    def moves(self) -> int:
        """See :class:`SequenceState`."""
        return self.state.moves

    @property
    def moving(self) -> Move | None:
        """See :class:`SequenceState`."""
        return self.state.moving
