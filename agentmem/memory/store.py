"""The stores of slots, which are the only objects that keep keys and values.

A :class:`LayerStore` holds one layer of one sequence. The first dimension of its tensors runs over the slots of all
heads. Each KV head owns one contiguous range of slots, with free slots at its end. Attention therefore needs no gather,
and each head takes only the bytes of its own slots. To change old slots, a new store is built and then takes the place
of the old store, so an error leaves the old store in use.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

from agentmem.attention import decode
from agentmem.attention.runs import Run
from agentmem.contracts import HeadSegment
from agentmem.memory.encoded import EncodedHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.attention.quantised import Format
    from agentmem.contracts import Compaction, HeadCompaction
    from agentmem.memory.ledger import Ledger
    from agentmem.memory.pins import Spans
    from agentmem.memory.slot_spec import Part, SlotSpec


class Extent(NamedTuple):
    """The fill state of a store: the filled slots of each head, and the number of tokens ever appended.

    Both change together in one assignment, so an interrupt cannot change one without the other.
    """

    lengths: list[int]
    seen: int


class Earlier(NamedTuple):
    """The scores of a store before a forward that changes them; kept until it is committed or taken back."""

    seen: int
    """The number of tokens that the sequence had consumed before the forward."""
    scores: torch.Tensor


class LayerStore:
    """The slots of one layer of one sequence: ``keys [S, d]``, ``values [S, dv]``, ``bias [S]``, ``positions [S]``.

    Quantised keys and values are bytes, ``[S, row_bytes(d)]``. ``bias`` (β) is float32, ``positions`` int32, ``scores``
    float32.

    ``S`` is the sum of the heads' capacities. Head ``h`` owns the slots ``starts[h] .. starts[h] + capacities[h]`` and
    has filled the first ``lengths[h]`` of them. The slots of the prefix come first, then the slots of promoted tokens
    (pinned tokens whose slots were moved there), then all other slots. Each of these three parts is in ascending
    positions. ``positions`` is valid for the first ``settled[h]`` slots of a head. The later slots have the same
    positions in all heads; the sequence keeps these positions until :meth:`settle` writes them here.
    """

    __slots__ = (
        "_full_at", "_layout", "bias", "biased", "capacities", "earlier", "extent", "held_bytes", "keys", "ledger",
        "moves", "positions", "promoted", "scores", "settled", "spec", "starts", "uniform", "values",
    )  # fmt: skip

    def __init__(self, spec: SlotSpec, capacities: Sequence[int], ledger: Ledger) -> None:
        """Count the store's bytes in the ledger, then allocate its tensors.

        Raises:
            MemoryCapExceeded: the bytes do not fit under the cap.

        """
        self.earlier: Earlier | None = None
        self.spec, self.ledger = spec, ledger
        self.capacities = tuple(capacities)
        self.starts = (0, *accumulate(self.capacities))[:-1]
        self.extent, self._full_at = Extent([0] * len(self.capacities), 0), min(self.capacities)
        self._layout: decode.Layout | None = None
        self.settled = [0] * len(self.capacities)
        self.uniform = len(set(self.capacities)) == 1
        self.biased = False
        self.moves = 0
        """How many times re-basing has moved the slots of this layer."""
        self.promoted: Spans = ()
        """The promoted tokens, whose slots are at the front, directly after the prefix, in the order of the tokens."""
        total = sum(self.capacities)
        self.held_bytes = total * spec.slot_bytes
        ledger.hold(self, self.held_bytes, "a layer's slots")
        try:
            self._allocate(total)
        except BaseException:  # the machine may be out of memory
            self._release()
            raise

    def _allocate(self, total: int) -> None:
        spec, device = self.spec, self.spec.device
        # A tensor that is created under inference_mode cannot be written outside it.
        with torch.inference_mode(mode=False):
            self.keys, self.values = (
                torch.empty(total, size, dtype=spec.row_dtype, device=device) for size in spec.row_sizes
            )
            self.bias = torch.zeros(total, dtype=torch.float32, device=device)
            self.positions = torch.empty(total, dtype=torch.int32, device=device)
            self.scores = torch.zeros(total, dtype=torch.float32, device=device) if spec.scores else None

    @property
    def lengths(self) -> list[int]:
        """The number of filled slots of each head."""
        return self.extent.lengths

    @property
    def seen(self) -> int:
        """The number of tokens ever appended, including those whose slots have been compacted."""
        return self.extent.seen

    @property
    def allocated_bytes(self) -> int:
        """The bytes of the allocated tensors, free slots and scores before an uncommitted forward included."""
        earlier = None if self.earlier is None else self.earlier.scores
        tensors = (self.keys, self.values, self.bias, self.positions, self.scores, earlier)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)

    @property
    def used_bytes(self) -> int:
        """The bytes of the filled slots."""
        return sum(self.lengths) * self.spec.slot_bytes

    @property
    def room(self) -> int:
        """The number of tokens that can be appended before the first head is full."""
        return self._full_at - self.extent.seen

    @property
    def layout(self) -> decode.Layout | None:
        """The addresses of the slots for the compiled decode step; ``None`` if it does not support this store."""
        if self._layout is None and self.spec.device.type == "cpu":
            self._layout = self._laid_out()
        return self._layout

    def _laid_out(self) -> decode.Layout | None:
        shape = self.spec.shape
        form = decode.Form(self.spec.dtype, len(self.capacities), shape.key_dim, shape.value_dim, shape.bits)
        if not form.served or self.keys.shape[0] != sum(self.capacities):  # freed
            return None
        keys, values, bias = self.keys.data_ptr(), self.values.data_ptr(), self.bias.data_ptr()
        key, value = shape.row_bytes(self.spec.dtype.itemsize)
        places = zip(self.starts, self.capacities, strict=True)
        heads = [(keys + start * key, values + start * value, bias + 4 * start, room) for start, room in places]
        return decode.layout(heads, form, self.keys, self.values, self.bias)

    def bias_range(self) -> tuple[float, float]:
        """Return the smallest and the largest β of the filled slots; zeros if no slot is filled."""
        heads = zip(self.starts, self.lengths, strict=True)
        ends = [self.bias[start : start + length].aminmax() for start, length in heads if length]
        return min((float(end.min) for end in ends), default=0.0), max((float(end.max) for end in ends), default=0.0)

    def free(self) -> None:
        """Drop the tensors and remove their bytes from the ledger; the store must not be used afterwards.

        A second call does nothing.
        """
        self._layout = None
        self._release()
        self.keys = self.values = self.bias = self.positions = torch.empty(0)
        self.scores = None

    def _release(self) -> None:
        self.held_bytes = 0
        self.forget_scores()
        self.ledger.release(self)

    def __del__(self) -> None:
        """Remove the store's bytes from the ledger, in case an interrupt prevented :meth:`free`."""
        if getattr(self, "ledger", None) is not None:  # there is none if an interrupt came first
            self._release()

    def append(self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor | None = None) -> None:
        """Append the slots of ``q`` tokens: ``keys [H, q, d]`` and ``values [H, q, dv]``, with β 0.

        ``scores [H, q]`` are the initial scores, zero if ``None``. The caller must have made room in every head.
        """
        count = keys.shape[1]
        if self.uniform:
            heads, start = len(self.capacities), self.lengths[0]
            self.spec.write(keys, self.keys.view(heads, self.capacities[0], -1)[:, start : start + count], "keys")
            self.spec.write(values, self.values.view(heads, self.capacities[0], -1)[:, start : start + count], "values")
            if scores is not None and self.scores is not None:
                self.scores.view(heads, -1)[:, start : start + count] = scores
            self.appended(count)
            return
        for head, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            span = slice(start + length, start + length + count)
            self.spec.write(keys[head], self.keys[span], "keys")
            self.spec.write(values[head], self.values[span], "values")
            if scores is not None and self.scores is not None:
                self.scores[span] = scores[head]
        self.appended(count)

    def appended(self, count: int) -> None:
        """Mark the next ``count`` slots of every head as filled, after they have been written.

        This is the last step of appending, so an error in an earlier step leaves the store unchanged.
        """
        lengths, seen = self.extent
        self.extent = Extent([length + count for length in lengths], seen + count)

    def keep_scores(self, seen: int) -> None:
        """Go on with a copy of the scores, so that :meth:`take_back` can undo what a forward adds to them.

        ``seen`` is the number of tokens that the sequence has consumed before the forward.

        Raises:
            MemoryCapExceeded: the copy does not fit under the cap.

        """
        if self.scores is None or (self.earlier is not None and self.earlier.seen >= seen):
            return
        self.forget_scores()
        self.ledger.hold(self.scores, self.scores.nbytes, "the scores before a forward")
        self.earlier = Earlier(seen, self.scores)
        with torch.inference_mode(mode=False):
            self.scores = self.scores.clone()

    def forget_scores(self) -> None:
        """Drop the scores before a forward that has been committed or taken back."""
        if (earlier := self.earlier) is not None:
            self.earlier = None
            self.ledger.release(earlier.scores)

    def take_back(self, seen: int) -> None:
        """Undo what a forward that was not committed did: its slots, and what it added to the scores of older slots.

        ``seen`` is the number of tokens that the sequence has consumed. An interrupted call can be repeated.
        """
        if self.earlier is not None and self.earlier.seen >= seen:
            self.scores = self.earlier.scores
        if self.seen > seen:
            self.drop_tail(self.seen - seen)
        self.forget_scores()

    def drop_tail(self, count: int) -> None:
        """Remove the last ``count`` slots of every head, and set their scores to zero."""
        for start, length in zip(self.starts, self.lengths, strict=True):
            if self.scores is not None:
                self.scores[start + length - count : start + length] = 0
        lengths = [length - count for length in self.lengths]
        self.settled = list(map(min, self.settled, lengths))
        self.extent = Extent(lengths, self.seen - count)

    def runs(self, last: int | None = None, *, scored: bool = True) -> list[Run]:
        """Return views of the filled slots for attention, as one :class:`Run` for all heads or one for each head.

        One run has all heads if their lengths and capacities are equal, as in a sliding layer. ``last`` limits the
        views to that many newest slots; only use ``last`` for sliding layers. With ``scored=False`` the views have no
        scores, so a forward cannot change the scores.
        """
        if self.uniform:
            heads, stop = len(self.capacities), self.lengths[0]
            span = slice(0 if last is None else max(0, stop - last), stop)
            return [
                Run(
                    0,
                    self.keys.view(heads, self.capacities[0], -1)[:, span],
                    self.values.view(heads, self.capacities[0], -1)[:, span],
                    self.bias.view(heads, -1)[:, span] if self.biased else None,
                    self.scores.view(heads, -1)[:, span] if scored and self.scores is not None else None,
                    self._formats,
                )
            ]
        return [self._run(head, scored=scored) for head in range(len(self.capacities))]

    def front(self, count: int) -> list[Run]:
        """Return views of every head's first ``count`` slots, for a forward that attends to these slots only."""
        cut = slice(count)
        runs = (self._run(head, scored=False) for head in range(len(self.capacities)))
        return [run.part(cut) for run in runs]

    @property
    def _formats(self) -> tuple[Format, Format] | None:
        return self.spec.shape.formats

    def _run(self, head: int, *, scored: bool) -> Run:
        span = slice(self.starts[head], self.starts[head] + self.lengths[head])
        return Run(
            head,
            self.keys[None, span],
            self.values[None, span],
            self.bias[None, span] if self.biased else None,
            self.scores[None, span] if scored and self.scores is not None else None,
            self._formats,
        )

    def settle(self, tail: torch.Tensor) -> None:
        """Write the positions that this store still lacks: those of the newest slots of each head.

        ``tail`` (int32) holds the positions of the sequence's newest tokens. Heads may lack different numbers of
        positions; ``tail`` must have enough for the head that lacks most.
        """
        for head, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            count = length - self.settled[head]
            if count:
                self.positions[start + self.settled[head] : start + length] = tail[tail.shape[0] - count :]
                self.settled[head] = length

    def segment(self, head: int, begin: int, recent: int) -> HeadSegment:
        """Return a head's slots from index ``begin`` on, without its last ``recent`` slots.

        The tensors are views of the store. Quantised keys and values are an exception: they are decoded when they are
        read, to the dtype in which attention computes. Call :meth:`settle` first; it writes missing positions.
        """
        found = self.part(head, begin, recent)
        return EncodedHead(found, self.spec) if self.spec.shape.quantised else found

    def part(self, head: int, begin: int, recent: int) -> HeadSegment:
        """Return views of a head's slots from index ``begin`` on, without its last ``recent`` slots.

        Quantised keys and values remain encoded bytes. Call :meth:`settle` first if you need the positions.
        """
        start, length = self.starts[head], self.lengths[head]
        begin = min(begin, length)
        span = slice(start + begin, start + max(length - recent, begin))
        scores = None if self.scores is None else self.scores[span]
        return HeadSegment(self.keys[span], self.values[span], self.bias[span], self.positions[span], scores)

    def compacted(self, compaction: Compaction, begins: Sequence[int], recent: int, headroom: int = 0) -> LayerStore:
        """Return a new store with each head's segment replaced by the slots of ``compaction``.

        Each head keeps its first ``begins[h]`` slots and its last ``recent`` slots, and gets ``headroom`` free slots at
        its end. If the layer would then have a larger total capacity than this store, no head gets headroom yet. This
        store is not changed.
        """
        heads = zip(begins, compaction.heads, strict=True)
        lengths = [begin + head.kept.shape[0] + recent for begin, head in heads]
        grows = sum(lengths) + headroom * len(lengths) > sum(self.capacities)
        capacities = lengths if grows else [length + headroom for length in lengths]
        store = LayerStore(self.spec, capacities, self.ledger)
        try:
            for head, replacement in enumerate(compaction.heads):
                self._write_compacted(store, head, replacement, begins[head], recent)
        except BaseException:
            store.free()
            raise
        store.biased = self.biased or any(head.bias is not None for head in compaction.heads)
        return store._filled(lengths, lengths, self)

    def _write_compacted(
        self, store: LayerStore, head: int, replacement: HeadCompaction, prefix: int, recent: int
    ) -> None:
        begin, old = store.starts[head], self.starts[head]
        middle = begin + prefix + replacement.kept.shape[0]
        parts: dict[str, Part] = {"keys": "keys", "values": "values"}
        for name in ("keys", "values", "bias", "positions", "scores"):
            source, sink = getattr(self, name), getattr(store, name)
            if sink is None:
                continue
            end = old + self.lengths[head]
            sink[begin : begin + prefix] = source[old : old + prefix]
            fitted = getattr(replacement, name, None)
            if fitted is None:
                torch.index_select(source[old + prefix : end], 0, replacement.kept, out=sink[begin + prefix : middle])
            elif name in parts:
                self.spec.write(fitted, sink[begin + prefix : middle], parts[name])
            else:
                sink[begin + prefix : middle] = fitted
            sink[middle : middle + recent] = source[end - recent : end]

    def rewritten(
        self, begins: Sequence[int], recent: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> LayerStore:
        """Return a new store in which ``n`` new slots replace the segment of every head.

        The new slots are ``keys [H, n, d]``, ``values [H, n, dv]`` and ``positions [n]`` (int32, equal for all heads);
        their β and scores are zero. Each head keeps its first ``begins[h]`` slots and its last ``recent`` slots. Each
        head has the same capacity as in this store, or a larger capacity if its slots need more. This store is not
        changed.
        """
        count = positions.shape[0]
        lengths = [begin + count + recent for begin in begins]
        store = LayerStore(self.spec, list(map(max, lengths, self.capacities)), self.ledger)
        try:
            for head, begin in enumerate(begins):
                middle, end = store.starts[head] + begin, self.lengths[head]
                self._write_spans(store, head, [(0, begin)])
                self.spec.write(keys[head], store.keys[middle : middle + count], "keys")
                self.spec.write(values[head], store.values[middle : middle + count], "values")
                store.positions[middle : middle + count] = positions
                self._write_spans(store, head, [(end - recent, end)], begin + count)
        except BaseException:
            store.free()
            raise
        store.biased = self.biased
        return store._filled(lengths, lengths, self)

    def resized(self, capacities: Sequence[int]) -> LayerStore:
        """Return a new store with the filled slots of this store and new capacities, which must suffice for them."""
        store = LayerStore(self.spec, capacities, self.ledger)
        try:
            for head, length in enumerate(self.lengths):
                self._write_spans(store, head, [(0, length)])
        except BaseException:
            store.free()
            raise
        store.biased = self.biased
        return store._filled(self.lengths, self.settled, self)

    def slid(self, keep: int) -> LayerStore:
        """Return a new store with only the last ``keep`` slots of every head; for sliding layers."""
        store = LayerStore(self.spec, self.capacities, self.ledger)
        lengths = [min(keep, length) for length in self.lengths]
        try:
            for head, (length, kept) in enumerate(zip(self.lengths, lengths, strict=True)):
                self._write_spans(store, head, [(length - kept, length)])
        except BaseException:
            store.free()
            raise
        store.biased = self.biased
        return store._filled(lengths, [0] * len(lengths), self)

    def reordered(self, orders: Sequence[Sequence[tuple[int, int]]], promoted: Spans) -> LayerStore:
        """Return a new store with this store's slots in a new order.

        ``orders`` lists for each head the spans of its slots in the new order. ``promoted`` are the tokens whose slots
        then directly follow the prefix. Call :meth:`settle` first; it writes missing positions.
        """
        store = LayerStore(self.spec, self.capacities, self.ledger)
        try:
            for head, order in enumerate(orders):
                self._write_spans(store, head, order)
        except BaseException:
            store.free()
            raise
        store.biased = self.biased
        return store.fill(self.lengths, self.settled, seen=self.seen, promoted=promoted, moves=self.moves)

    def _write_spans(self, store: LayerStore, head: int, spans: Sequence[tuple[int, int]], at: int = 0) -> None:
        """Copy spans of a head's slots into that head of ``store``, one after the other, beginning at slot ``at``."""
        for name in ("keys", "values", "bias", "positions", "scores"):
            source, sink = getattr(self, name), getattr(store, name)
            if sink is None:
                continue
            end = store.starts[head] + at
            for start, stop in spans:
                old = self.starts[head]
                sink[end : end + stop - start] = source[old + start : old + stop]
                end += stop - start

    def _filled(self, lengths: Sequence[int], settled: Sequence[int], like: LayerStore) -> LayerStore:
        return self.fill(lengths, settled, seen=like.seen, promoted=like.promoted, moves=like.moves)

    def fill(
        self, lengths: Sequence[int], settled: Sequence[int], *, seen: int, promoted: Spans, moves: int
    ) -> LayerStore:
        """Record how far this new store is filled, and return the store; its slots must have been written already.

        Args:
            lengths: the number of filled slots of each head.
            settled: the number of slots of each head, counted from the first, whose positions are written, too. The
                positions of later slots are written by :meth:`settle`.
            seen: the number of tokens ever appended, including those whose slots have been compacted.
            promoted: the tokens whose slots directly follow the prefix because the tokens were pinned.
            moves: how many times re-basing has moved the slots.

        """
        self.extent, self.settled = Extent(list(lengths), seen), list(settled)
        self._full_at = seen + min(capacity - length for capacity, length in zip(self.capacities, lengths, strict=True))
        self.promoted, self.moves = promoted, moves
        self.uniform = len(set(self.capacities)) == 1 and len(set(lengths)) == 1
        return self
