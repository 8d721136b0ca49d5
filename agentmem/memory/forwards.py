"""The objects through which a forward of the model uses a memory, one class for each kind of forward.

:class:`Append` keeps the forward's tokens, and :class:`Transient` does not. :class:`Packed` feeds several memories at
once. Two classes are for compactions: with :class:`Scratch` the model writes a text whose slots are dropped afterwards,
and :class:`Adopt` replaces a segment by a summary. Each layer of the model calls ``attend`` once per forward, with the
model's own queries, keys and values (RoPE applied).
"""

from __future__ import annotations

import operator
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from agentmem.attention import decode
from agentmem.attention.ragged import attend
from agentmem.attention.runs import Fresh
from agentmem.memory.sequence import Consumed
from agentmem.memory.slot_spec import SlotSpec
from agentmem.memory.store import LayerStore
from agentmem.planning.pricing import grown, window_slots
from agentmem.reference_queries.stored import QuerySample
from agentmem.reporting import log_events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from agentmem.memory.jobs import Slots
    from agentmem.memory.memory import Memory
    from agentmem.memory.sequence import TokenSequence


class Arriving(NamedTuple):
    """The tokens of one forward that belong to one sequence: their ids, positions, and columns in the batch.

    ``positions`` are the positions that the tokens would have if the sequence had never been re-based.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    columns: slice | torch.Tensor


class Forwards(Protocol):
    """A protocol for running one model.

    The methods that run the model get a ``step``, an object of a class below. In each layer, the model calls
    ``step.attend`` instead of its own attention.
    """

    def check(self) -> None:
        """Check that the model can be run now; raise UnsupportedModel if it is in training mode."""

    def run(self, ids: Sequence[int], start: int, step: Adopt | Transient) -> None:
        """Run the decoder, without logits, over ``ids`` at the positions ``start, start + 1, …``."""

    def next_logits(self, ids: Sequence[int], start: int, step: Scratch) -> torch.Tensor:
        """Run the whole model over ``ids``, as :meth:`run` does; return the logits ``[V]`` after the last id."""

    def logits(self, ids: Sequence[int], start: int, step: Transient) -> torch.Tensor:
        """Run the whole model over ``ids``, as :meth:`run` does; return the logits ``[n, V]`` after each id."""

    def packed(self, ids: Sequence[int], positions: Sequence[int], ends: Sequence[int], step: Packed) -> torch.Tensor:
        """Run the whole model once over the ids of several sequences, which are concatenated to one row.

        Return the logits ``[n, V]`` after the ids whose indices are listed in ``ends``.
        """


class Append:
    """A forward whose tokens are kept if :meth:`commit` is called after it."""

    def __init__(self, memory: Memory, arriving: Sequence[Arriving]) -> None:
        """Prepare the forward; the caller must have made room for its tokens."""
        self.memory, self.arriving, self.memories = memory, arriving, (memory,)
        self.parts = [(memory, sequence) for sequence in memory.sequences]
        self.whole = all(isinstance(each.columns, slice) and each.columns == slice(None) for each in arriving)
        self.columns = 0
        """The number of batch columns of the forward, padding included; set by the caller before :meth:`commit`."""

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append the tokens' slots in one layer and attend: ``queries [B, Hq, q, d]`` → output ``[B, q, Hq, dv]``."""
        memory = self.memory
        if self.whole and queries.shape[2] == 1:
            asked, key, value = _tokens(queries, keys, values)
            return append_each(self.parts, layer, asked, key, value, scale, sinks).unsqueeze(1)
        if len(self.arriving) == 1 and self.whole:
            output = append_one(memory, memory.sequences[0], layer, queries[0], keys[0], values[0], scale, sinks)
            return output.transpose(0, 1).contiguous().unsqueeze(0)
        output = queries.new_zeros(queries.shape[0], queries.shape[2], queries.shape[1], values.shape[-1])
        for sequence, arriving in zip(memory.sequences, self.arriving, strict=True):
            if arriving.ids:
                index, columns = sequence.index, arriving.columns
                asked, key, value = (each[index][:, columns] for each in (queries, keys, values))
                part = append_one(memory, sequence, layer, asked, key, value, scale, sinks)
                output[index, columns] = part.transpose(0, 1)
        return output

    def commit(self) -> None:
        """Record that the sequences have consumed the tokens; call this after the forward has succeeded."""
        memory, before = self.memory, [sequence.next_position for sequence in self.memory.sequences]
        for sequence, each in zip(memory.sequences, self.arriving, strict=True):
            sequence.write(each.ids, [position - sequence.shift for position in each.positions])
        memory.progress.consumed = self._consumed(memory.progress.consumed)
        if memory.policy.scores == "received":
            for sequence in memory.sequences:
                sequence.forget_scores()
        for sequence, position in zip(memory.sequences, before, strict=True):
            _warn_of_positions(memory, sequence, position, memory.shape.positions)

    def _consumed(self, past: Consumed) -> Consumed:
        """Return the memory's counts of tokens after this forward; ``past`` has the counts before this forward."""
        counts = [len(each.ids) for each in self.arriving]
        prompt, new = (sum(counts), 0) if max(counts) > 1 else (0, sum(counts))
        ends = zip(self.arriving, past.positions, strict=True)
        return Consumed(
            tuple(map(operator.add, past.tokens, counts)),
            tuple(each.positions[-1] + 1 if each.positions else place for each, place in ends),
            past.columns + self.columns,
            past.prompt_tokens + prompt,
            past.new_tokens + new,
        )


def _warn_of_positions(memory: Memory, sequence: TokenSequence, before: int, limit: int | None) -> None:
    if limit is not None and before <= limit < sequence.next_position:
        log_events.positions_passed(memory.names, row=sequence.index, tokens_seen=sequence.seen, positions=limit)


class Packed:
    """One forward over tokens of several memories that have one sequence each; the tokens are kept.

    To commit the tokens, call ``commit`` of each memory's :class:`Append`. A token attends to the slots of its own
    memory and, causally, to this forward's tokens of that memory.
    """

    def __init__(self, appends: Sequence[Append]) -> None:
        """Prepare the forward; the caller must have made room for the tokens.

        The tokens are concatenated in the order of ``appends``. Put memories with a single new token first. They share
        one attention call per layer, unless a memory with more new tokens comes before them.
        """
        self.attended = 0
        """The number of layers whose attention has begun."""
        counts = [len(arriving.ids) for append in appends for arriving in append.arriving]
        parts = [(append.memory, append.memory.sequences[0]) for append in appends]
        self.memories = tuple(append.memory for append in appends)
        singles = next((at for at, count in enumerate(counts) if count > 1), len(counts))
        self._singles = parts[:singles]
        spans = (slice(*span) for span in pairwise(accumulate(counts[singles:], initial=singles)))
        self._texts = list(zip(parts[singles:], spans, strict=True))

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append the tokens' slots in one layer and attend: ``queries [1, Hq, q, d]`` → output ``[1, q, Hq, dv]``."""
        self.attended += 1
        output = queries.new_empty(1, queries.shape[2], queries.shape[1], values.shape[-1])
        if self._singles:
            span = slice(len(self._singles))
            asked, key, value = (each[0, :, span].transpose(0, 1) for each in (queries, keys, values))
            output[0, span] = append_each(self._singles, layer, asked, key, value, scale, sinks)
        for (memory, sequence), span in self._texts:
            asked, key, value = (each[0, :, span] for each in (queries, keys, values))
            output[0, span] = append_one(memory, sequence, layer, asked, key, value, scale, sinks).transpose(0, 1)
        return output


class Scratch:
    """Forwards over one sequence that append slots only until :meth:`rollback`.

    Compactions use such forwards to let the model write questions, facts and summaries. The tokens of these texts fill
    slots that the plan keeps free for this purpose (``scratch``). Scores, query samples and consumed tokens do not
    change.
    """

    def __init__(self, memory: Memory, sequence: TokenSequence) -> None:
        """Prepare forwards of ``sequence``; append nothing yet."""
        self.memory, self.sequence, self.memories = memory, sequence, (memory,)

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append scratch slots in one layer and attend: ``queries [1, Hq, q, d]`` → output ``[1, q, Hq, dv]``."""
        if queries.shape[2] == 1:
            parts, (asked, key, value) = [(self.memory, self.sequence)], _tokens(queries, keys, values)
            return append_each(parts, layer, asked, key, value, scale, sinks, scratch=True).unsqueeze(1)
        output = append_one(
            self.memory, self.sequence, layer, queries[0], keys[0], values[0], scale, sinks, scratch=True
        )
        return output.transpose(0, 1).contiguous().unsqueeze(0)

    def rollback(self) -> None:
        """Drop, in every layer, all slots that were appended through this object."""
        self.sequence.take_back()


class Adopt:
    """A forward over a summary, in which the slots of the summary replace the segment, layer by layer.

    The summary's tokens attend to the slots of the prefix, to the slots of pinned tokens directly after the prefix
    and, causally, to each other. Each layer's store is replaced as a whole after the layer has attended. The sequence
    therefore stays usable if the forward ends early.
    """

    def __init__(
        self, memory: Memory, sequence: TokenSequence, begins: Slots, recent: int, positions: torch.Tensor
    ) -> None:
        """Prepare the forward.

        ``begins[layer][head]`` is the index of the segment's first slot in a head, and ``recent`` is the number of
        slots after the segment. ``positions [n]`` (int32) are the positions of the new slots.
        """
        self.memories = (memory,)
        self.memory, self.sequence, self.begins, self.recent, self.positions = (
            memory,
            sequence,
            begins,
            recent,
            positions,
        )

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend in one layer, then put the slots of the summary's ``n`` tokens in the place of the layer's segment.

        ``queries [1, Hq, n, d]`` → output ``[1, n, Hq, dv]``.
        """
        memory, store = self.memory, self.sequence.stores[layer]
        assert store is not None  # noqa: S101  # a sequence that is rewritten has a store in every layer
        memory.boundary()
        memory.ledger.touch(memory.plan.forward_bytes, "attention of a summary")
        queries, keys, values = _as_stored(store, queries, keys, values)
        front = store.front(min(self.begins[layer]))
        output, _ = attend(queries[0], front, Fresh(keys[0], values[0]), scale, sinks=sinks)
        new = store.rewritten(self.begins[layer], self.recent, keys[0], values[0], self.positions)
        self.sequence.replace(layer, new)
        return output.transpose(0, 1).contiguous().unsqueeze(0)


class Transient:
    """A forward whose tokens are not kept; they attend to one sequence's slots and, causally, to each other.

    ``visit(layer, queries [Hq, q, d])`` is called before a layer attends; if it replaces the layer's store, the layer
    attends to the new store.
    """

    def __init__(
        self,
        memory: Memory,
        sequence: TokenSequence,
        visit: Callable[[int, torch.Tensor], None] = lambda _layer, _queries: None,
    ) -> None:
        """Prepare the forward; allocate nothing."""
        self.memory, self.sequence, self.visit, self.memories = memory, sequence, visit, (memory,)

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend in one layer without appending: ``queries [1, Hq, q, d]`` → output ``[1, q, Hq, dv]``."""
        self.visit(layer, queries[0])
        shape = self.memory.shape.layers[layer]
        store = self.sequence.stores[layer]
        if store is not None:
            queries, keys, values = _as_stored(store, queries, keys, values)
        runs = [] if store is None else store.runs(shape.window and shape.window - 1, scored=False)
        self.memory.ledger.touch(self.memory.plan.forward_bytes, "attention of a probe")
        output, _ = attend(queries[0], runs, Fresh(keys[0], values[0]), scale, window=shape.window, sinks=sinks)
        return output.transpose(0, 1).contiguous().unsqueeze(0)


def append_each(
    parts: Sequence[tuple[Memory, TokenSequence]],
    layer: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None = None,
    *,
    scratch: bool = False,
) -> torch.Tensor:
    """Append one token in one layer to each of ``n`` sequences, and return the attention of these tokens.

    ``queries [n, Hq, d]``, ``keys [n, Hkv, d]``, ``values [n, Hkv, dv]`` → output ``[n, Hq, dv]``. A token attends only
    to the slots of its own sequence. The sequences must be distinct; they may belong to several memories of one model.
    One compiled call serves all sequences that it supports. With ``scratch``, the slots will be dropped later:
    attention does not change their scores, and queries are not sampled.

    Raises:
        MemoryCapExceeded: a layer needs more slots than fit under the cap. After this or any other error, call
            :meth:`agentmem.memory.memory.Memory.take_back`, because only some of the sequences may hold the token.

    """
    output = queries.new_empty(queries.shape[0], queries.shape[1], values.shape[2])
    bits = parts[0][0].shape.layers[layer].bits
    form = None if sinks is not None else decode.form_of(queries, keys, values, bits)
    served = [_served(memory, sequence, layer, keys, form, scratch=scratch) for memory, sequence in parts]
    steps = [(index, each[1], each[0].extent.lengths, each[0].biased) for index, each in enumerate(served) if each]
    if steps:
        for memory in dict.fromkeys([memory for memory, _ in parts]):
            memory.scales[layer] = scale
            memory.ledger.touch(memory.plan.forward_bytes, "attention")
        decode.attend_each(queries, steps, scale, output, (keys, values), parts[0][0].shape.layers[layer].window)
        for each in served:
            if each:
                each[0].appended(1)
    for index, (memory, sequence) in enumerate(parts):
        if not served[index]:
            asked, key, value = (each[index].unsqueeze(1) for each in (queries, keys, values))
            output[index] = append_one(memory, sequence, layer, asked, key, value, scale, sinks, scratch=scratch)[:, 0]
        elif memory.plan.stored and not scratch:
            _sample(memory, sequence, layer, queries[index].unsqueeze(1))
    return output


def _tokens(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """Return views ``[B, h, d]`` of tensors ``[B, h, 1, d]``, which have one token per sequence."""
    return (tensor[:, :, 0] for tensor in tensors)


def _served(
    memory: Memory, sequence: TokenSequence, layer: int, like: torch.Tensor, form: decode.Form | None, *, scratch: bool
) -> tuple[LayerStore, decode.Layout] | None:
    """Make room for one more slot per head in a layer, and return what the compiled decode step needs of the layer.

    The compiled decode step is C code that computes attention for one new token per sequence. It needs the object that
    keeps the layer's slots (the store), and the addresses of the slots (the layout). ``form`` is the dtype, number of
    heads and dims with which the step will be called; ``None`` if it cannot be called. ``like`` is a tensor with the
    dtype and device of a new store.

    The result is ``None`` if the step cannot be used for this layer: ``form`` is ``None`` or does not match the store.
    The result is also ``None`` if the forward must update scores, because the step does not update them; see
    :func:`_scored`.
    """
    if form is None or _scored(memory, layer, scratch=scratch):
        return None
    store = sequence.stores[layer]
    if store is None or store.room < 1:
        store = _roomy(memory, sequence, layer, like, 1)
    layout = store.layout
    return (store, layout) if layout is not None and layout.form == form else None


def append_one(
    memory: Memory,
    sequence: TokenSequence,
    layer: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None = None,
    *,
    scratch: bool = False,
) -> torch.Tensor:
    """Append tokens to one sequence in one layer and attend: ``queries [Hq, q, d]`` → output ``[Hq, q, dv]``.

    With ``scratch``, the slots will be dropped later: scores do not change, and queries are not sampled.
    """
    shape, count = memory.shape.layers[layer], keys.shape[1]
    memory.scales[layer] = scale
    store = _roomy(memory, sequence, layer, keys, count)
    queries, keys, values = _as_stored(store, queries, keys, values)
    scored = _scored(memory, layer, scratch=scratch)
    memory.ledger.touch(memory.plan.forward_bytes, "attention")
    with torch.no_grad():
        if scored:
            store.keep_scores(sequence.seen)
        if count == 1:
            store.append(keys, values)
            output, _ = attend(
                queries, store.runs(shape.window, scored=scored), None, scale, explicit=scored, sinks=sinks
            )
        else:
            fresh = Fresh(keys, values)
            runs = store.runs(shape.window and shape.window - 1, scored=scored)
            output, received = attend(queries, runs, fresh, scale, window=shape.window, explicit=scored, sinks=sinks)
            store.append(keys, values, received if scored else None)
        if memory.plan.stored and not scratch:
            _sample(memory, sequence, layer, queries)
    return output


def _scored(memory: Memory, layer: int, *, scratch: bool) -> bool:
    """Return whether a forward updates the scores of a layer's slots.

    To update a score is to add the attention that the slot receives. This is done if the policy asks for such scores,
    except in scratch forwards and in sliding layers. The scores before the forward are kept until its commit.
    """
    return memory.policy.scores == "received" and memory.shape.layers[layer].window is None and not scratch


def _as_stored(store: LayerStore, *tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors, converted to the store's dtype if they differ.

    The first keys have set that dtype; later tensors differ if autocast has been switched since.
    """
    return (tensor.to(store.spec.dtype) for tensor in tensors)


def _roomy(memory: Memory, sequence: TokenSequence, layer: int, like: torch.Tensor, count: int) -> LayerStore:
    """Return the object that keeps a layer's slots (its store), after making room for ``count`` more slots per head.

    If the layer has no store yet, a new one is made with the dtype and device of ``like``. If a layer with a sliding
    window is full, all slots of a head except the newest ``window - 1`` are dropped. If there is still too little room,
    a larger store replaces the old one.
    """
    store, window = sequence.stores[layer], memory.shape.layers[layer].window
    limit = memory.plan.capacity if window is None else window_slots(window, memory.plan.chunk)
    if store is not None and window is not None and store.lengths[0] + count > limit:
        store = store.slid(window - 1)
        sequence.replace(layer, store)
    if store is not None and store.room >= count:
        return store
    if store is None:
        scores = memory.policy.scores != "none" and window is None
        spec = SlotSpec(memory.shape.layers[layer], like.dtype, like.device, scores)
        store = LayerStore(spec, [grown(count, limit)] * spec.shape.kv_heads, memory.ledger)
        store.moves = sequence.moves
    else:
        store = store.resized([grown(max(store.lengths) + count, limit)] * len(store.lengths))
    sequence.replace(layer, store)
    return store


@torch.no_grad()
def _sample(memory: Memory, sequence: TokenSequence, layer: int, queries: torch.Tensor) -> None:
    """Offer ``queries [Hq, q, d]`` to the samples of a layer; create the samples at the first call.

    A sample (:class:`QuerySample`) stores some of the queries for later compactions. Sliding layers have no samples.
    """
    if memory.shape.layers[layer].window is not None:
        return
    if not sequence.samples[layer]:
        parts = zip(memory.policy.queries.stored, memory.plan.stored, strict=True)
        sequence.samples[layer] = tuple(
            QuerySample(part, memory.shape.layers[layer], size, queries, memory.ledger) for part, size in parts
        )
    for sample in sequence.samples[layer]:
        sample.offer(queries, sequence.seen)
