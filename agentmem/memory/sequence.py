"""One sequence of a memory: its stores (each keeps the slots of one layer), and the tokens that it has consumed.

Every change is one assignment, so an interrupt leaves either the old or the new value. A :class:`Consumed` object
holds the numbers of tokens that all sequences of a memory have consumed; the commit of a forward replaces this object.
A compaction or a re-basing replaces the :class:`SequenceState` of its sequence. Ids and positions of new tokens are
appended to those of the consumed tokens, but the new tokens do not count until the commit.

A token is *promoted* in a layer if it was pinned and its slots were moved to the front of each head, directly after the
prefix.
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
    from agentmem.reporting.report import CompactionReport, RebaseReport, SummaryReport


class Consumed(NamedTuple):
    """The numbers of tokens and positions that the sequences of a memory have consumed in committed forwards.

    To commit a forward means to replace this object as a whole.
    """

    tokens: tuple[int, ...] = ()
    """The number of tokens that each sequence has consumed."""
    positions: tuple[int, ...] = ()
    """The next position of each sequence as its caller counts positions; re-basing does not change this count."""
    columns: int = 0
    """The number of batch columns fed so far, padding included."""
    prompt_tokens: int = 0
    """The number of tokens fed in forwards in which at least one sequence had more than one token."""
    new_tokens: int = 0
    """The number of tokens fed in all other forwards, which had at most one token per sequence."""


@dataclass(slots=True)
class Progress:
    """How many tokens the sequences of a memory have consumed so far; the memory and its sequences share this object.

    The commit of a forward replaces ``consumed`` by a new object with the new numbers; see :class:`Consumed`.
    """

    consumed: Consumed = field(default_factory=Consumed)


@dataclass(frozen=True, slots=True)
class SequenceState:
    """The part of a sequence's state that compactions and re-basings change."""

    full_at: int
    """The number of consumed tokens at which the sequence must be compacted."""
    tail: array[int] = field(default_factory=lambda: array("i"))
    """The positions of the tokens consumed since the last compaction."""
    headroom_at: int | None = None
    """How many tokens the sequence had consumed when its last compaction finished; ``None`` before the first one.

    The last step of a compaction gives every head *headroom*: free slots for new tokens.
    """
    intact: int = 0
    """The index of the first token after all segments that compactions have reduced or begun to reduce.

    From this token on, every token still has its original slot in every head.
    """
    compactions: int = 0
    job: Job | None = None
    """The unfinished compaction, if there is one."""
    summary: SummaryReport | None = None
    """The report of the newest summary, until the report of a compaction includes it."""
    report: CompactionReport | RebaseReport | None = None
    """The report of a compaction or re-basing that has just finished, until the memory has recorded it."""
    shift: int = 0
    """The number of positions by which all re-basings together have lowered the next position."""
    moves: int = 0
    """The number of finished re-basings."""
    moving: Move | None = None
    """The unfinished re-basing, if there is one."""


class TokenSequence:
    """One sequence: its stores (each keeps the slots of one layer), its state, and the tokens that it has consumed."""

    def __init__(self, index: int, layers: int, room: int, seed: int, progress: Progress) -> None:
        """Create an empty sequence with room for ``room`` tokens before it must be compacted.

        ``seed`` is for the sequence's own random generator.
        """
        self.index = index
        self.state = SequenceState(full_at=room)
        self._progress = progress
        self._stores: tuple[LayerStore | None, ...] = (None,) * layers
        self._ids: array[int] = array("q")
        self.samples: list[tuple[QuerySample, ...]] = [()] * layers
        """For each layer, one sample for each stored part of the policy's queries."""
        self.marks: dict[str, Marks] = {}
        """For each pattern, the matches found so far in the text of the tokens."""
        self.pins = Pins()
        """The tokens that must not be compacted; each store records which tokens it holds at its front."""
        self.generator = torch.Generator().manual_seed(seed)

    # ---- changes

    def change(self, **changes: Any) -> None:
        """Replace several fields of the state in one assignment."""
        self.state = replace(self.state, **changes)

    def replace(self, layer: int, store: LayerStore | None) -> None:
        """Replace a layer's store by ``store`` and free the old store; nothing else replaces a sequence's stores."""
        old = self._stores[layer]
        self._stores = (*self._stores[:layer], store, *self._stores[layer + 1 :])
        if old is not None:
            old.free()

    def write(self, ids: Sequence[int], positions: Sequence[int]) -> None:
        """Write the ids and positions of new tokens after those of the consumed tokens.

        The new tokens do not count until the commit of their forward; see :class:`Consumed`.
        """
        del self._ids[self.seen :]
        self._ids.extend(ids)
        del self.state.tail[self._tail_length() :]
        self.state.tail.extend(positions)

    def take_back(self) -> None:
        """Drop the slots of tokens that were appended but not committed, and what they added to scores."""
        for store in self._stores:
            if store is not None:
                store.take_back(self.seen)

    def forget_scores(self) -> None:
        """Drop the scores that the stores had before a forward, which has been committed."""
        for store in self._stores:
            if store is not None:
                store.forget_scores()

    def measured(self, capacity: int, scratch: int) -> int:
        """Return the number of tokens, those already read included, after which the sequence must be compacted.

        The number is computed from the slots that the sequence has now. Every further token takes one slot in each
        head. A compaction is due when some head has only ``scratch`` free slots left. Before the first compaction, a
        head may get up to ``capacity`` slots, as many as the plan allows. Later, a head has only the slots that are
        allocated for it.
        """
        full = [store for _, store in self.full()]
        if self.headroom_at is not None:
            return self.seen + min((store.room for store in full), default=0) - scratch
        return self.seen + capacity - scratch - max((max(store.lengths) for store in full), default=0)

    # ---- what it holds

    @property
    def stores(self) -> tuple[LayerStore | None, ...]:
        """The store of each layer; ``None`` for a layer that holds no slots."""
        return self._stores

    def full(self) -> list[tuple[int, LayerStore]]:
        """Return the index and the store of each layer with full attention (not sliding) that holds slots."""
        stores = enumerate(self._stores)
        return [(index, store) for index, store in stores if store is not None and store.spec.shape.window is None]

    def mean_slots(self) -> int:
        """Return the average number of slots per head in the layers with full attention."""
        lengths = [length for _, store in self.full() for length in store.lengths]
        return sum(lengths) // max(1, len(lengths))

    @property
    def promoted(self) -> Spans:
        """The tokens whose slots were moved to the front of each head because the tokens were pinned.

        These tokens are called *promoted*; their slots directly follow the prefix. All layers with full attention
        usually have the same promoted tokens. They differ if an interrupt stopped the move after some of the layers;
        :attr:`arranged` is then false. In this case, the tokens of the first layer with full attention are returned.
        """
        return next((store.promoted for _, store in self.full()), ())

    @property
    def arranged(self) -> bool:
        """True if the slots of the same pinned tokens are at the front of the heads in all layers with full attention.

        False means that an interrupt stopped the move of such slots after some of these layers.
        """
        return len({store.promoted for _, store in self.full()}) < 2  # noqa: PLR2004  # one kind, or no store

    def front(self, prefix: int) -> int:
        """Return how many slots at the front of every head are not compacted.

        These are the slots of the prefix, and slots that were moved there because their tokens were pinned.
        """
        return min(prefix, self.seen) + size(self.promoted)

    def behind(self, token: int) -> int:
        """Return how many slots at the end of every head hold the token ``token`` and all later tokens.

        Slots of pinned tokens that were moved to the front of the head are not counted. The caller makes sure that none
        of the tokens has been compacted.
        """
        return self.seen - token - size(within(self.promoted, token, self.seen))

    def compactable(self, start: int, prefix: int) -> int:
        """Return the first index, at least ``start``, of a token after the prefix and after all compacted segments."""
        return max(start, self.intact, min(prefix, self.seen))

    @property
    def quiet(self) -> bool:
        """True if the sequence has no unfinished compaction and no unfinished re-basing."""
        return self.state.job is None and self.state.moving is None

    @property
    def held(self) -> int:
        """The number of filled slots in all layers and heads."""
        return sum(sum(store.lengths) for store in self._stores if store is not None)

    # ---- what it has consumed

    @property
    def seen(self) -> int:
        """The number of tokens that the sequence has consumed."""
        return self._progress.consumed.tokens[self.index]

    @property
    def ids(self) -> array[int]:
        """The ids of the tokens that the sequence has consumed."""
        ids, seen = self._ids, self.seen
        return ids if len(ids) == seen else ids[:seen]

    @property
    def tail(self) -> array[int]:
        """The positions of the tokens consumed since the last compaction."""
        tail, length = self.state.tail, self._tail_length()
        return tail if len(tail) == length else tail[:length]

    def _tail_length(self) -> int:
        return self.seen - (self.headroom_at or 0)

    @property
    def next_position(self) -> int:
        """The position of the next token in the model, after all re-basings."""
        return self._progress.consumed.positions[self.index] - self.shift

    @property
    def room(self) -> int:
        """The number of tokens that can be appended before the sequence must be compacted."""
        return self.state.full_at - self.seen

    # ---- parts of the state, by their names

    @property
    def headroom_at(self) -> int | None:
        """How many tokens the sequence had consumed when its last compaction finished; ``None`` before the first."""
        return self.state.headroom_at

    @property
    def intact(self) -> int:
        """The index of the first token after all compacted segments; see :attr:`SequenceState.intact`."""
        return self.state.intact

    @property
    def compactions(self) -> int:
        """The number of compactions of this sequence."""
        return self.state.compactions

    @property
    def job(self) -> Job | None:
        """The unfinished compaction, or ``None``."""
        return self.state.job

    @property
    def shift(self) -> int:
        """The number of positions by which all re-basings together have lowered the next position."""
        return self.state.shift

    @property
    def moves(self) -> int:
        """The number of finished re-basings."""
        return self.state.moves

    @property
    def moving(self) -> Move | None:
        """The unfinished re-basing, or ``None``."""
        return self.state.moving
