"""Compute the bytes that a capacity in slots needs, as a plan of one memory. Integers only, no tensors.

A row is one sequence. Resident bytes (R) are the bytes of all stores and stored queries when all rows are full.
Temporary bytes (T) are the most that agentmem allocates in addition at any moment. A plan fits if ``R + T ≤ cap``. The
model's own activations (A) are the bytes that its modules allocate in one forward. A plan states them, but the cap does
not include them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agentmem.attention import explicit, quantised, ragged
from agentmem.contracts import MIN_SUMMARY, SegmentShape
from agentmem.planning.model_shape import SCORE_BYTES
from agentmem.planning.rebasing import layer_scratch
from agentmem.queries import MAX_INSTRUCTION
from agentmem.reference_queries.stored import NORMS, random_bytes
from agentmem.settings import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentmem.contracts import Compactor, Part, Policy
    from agentmem.planning.model_shape import LayerShape, ModelShape
    from agentmem.settings import Settings

MIN_BUDGET = 1
"""The smallest budget that a plan accepts, in slots of a head's segment."""
MAX_PROBE = 1024
STUDY_SHARE = 8
"""Texts that the model writes for reference queries (self-study) may take ``1 / STUDY_SHARE`` of the capacity."""
SUMMARY_SHARE = 6
"""A summary may take ``1 / SUMMARY_SHARE`` of the capacity in slots, unless the policy sets its number of tokens."""
MAX_REQUEST = 96
"""The most tokens of the instruction that asks for a summary."""
PROBE_REACH = 4
"""Reference tokens per slot of the capacity, up to ``MAX_PROBE`` in total; fewer tokens lower the quality."""
HELD_OUT = 8
"""One of every ``HELD_OUT`` reference tokens is not used in the fit, but to measure its error."""
CHECKED = 128
"""The most held-out queries of one KV head, over tokens and query heads of its group, that are compared at once."""
UNBOUNDED = 1 << 40
"""The capacity for a model whose layers all have sliding windows, because such a memory never becomes full."""
STORED_SHARE = 10
"""Stored queries may take ``1 / STORED_SHARE`` of the cap in bytes, unless the policy sets their number of tokens."""
MAX_STORED = 512
HYSTERESIS = 4
"""An adaptive compaction frees at least ``1 / HYSTERESIS`` of the capacity, so that the next compaction is not soon."""
INDEX_BYTES = 8
"""The bytes of the index of a kept slot."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a memory under one cap: its sizes in slots and tokens, and the bytes of each use.

    ``capacity``, ``target`` and ``limit`` are average numbers of slots per KV head and row, prefix and recent window
    included. A full row holds ``capacity`` slots, a compaction leaves ``target`` slots, and an adaptive compaction may
    leave up to ``limit`` slots. ``most_budget`` is the most slots that the segment of a single head may keep.
    ``layer_ceiling`` is the most slots that the heads of one layer may keep together, as a multiple of their equal
    share.
    """

    policy: str
    cap_bytes: int
    rows: int
    capacity: int
    target: int
    limit: int
    most_budget: int
    layer_ceiling: float
    prefix: int
    recent: int
    chunk: int
    probe_tokens: int
    stored: tuple[int, ...]
    """For each stored part of the policy's queries, the number of tokens whose queries are kept."""
    drawn_tokens: int
    scratch: int
    """Slots per head that stay free for texts that the model writes during a compaction."""
    resident_bytes: int
    stored_bytes: int
    draw_bytes: int
    fit_bytes: int
    copy_bytes: int
    """Temporary bytes of one head's quantised keys and values as numbers, as far as a fit reads them."""
    result_bytes: int
    """Bytes of the result of a fit, which is all that is left of the fit while it is checked and committed."""
    check_bytes: int
    """Temporary bytes of measuring held-out errors, including one head's quantised keys and values as numbers."""
    survey_bytes: int
    """Temporary bytes of the scores of all layers, which are compared to choose the heads' budgets."""
    forward_bytes: int
    undo_bytes: int
    """Temporary bytes of the scores of all slots as they were before a forward that adds to them, until its commit."""
    move_bytes: int
    rebase_bytes: int
    """Temporary bytes of rotating a layer's keys in its new store, without that store; 0 without re-basing."""
    activation_bytes: int

    @property
    def workspace_bytes(self) -> int:
        """The temporary bytes (T): the most that a compaction, a re-basing or a forward needs.

        These three never overlap. In a compaction, a layer is fitted, then checked, then moved, one after the other;
        the result of the fit exists until the end. While budgets are allocated, layers are fitted and checked beside
        the scores of all layers. In a forward, a growing layer's new store or attention's bytes exist together with the
        scores before the forward.
        """
        fitting = self.draw_bytes + max(self.survey_bytes + self.fitting_bytes, self.result_bytes + self.move_bytes)
        forward = self.undo_bytes + max(self.forward_bytes, self.move_bytes) if self.undo_bytes else self.forward_bytes
        return max(fitting, self.move_bytes + self.rebase_bytes, forward)

    @property
    def fitting_bytes(self) -> int:
        """The most temporary bytes of fitting a layer, or of checking the result."""
        return max(self.fit_bytes + self.copy_bytes, self.result_bytes + self.check_bytes)

    def _slots_text(self) -> str:
        if self.capacity == UNBOUNDED:
            return f"sliding windows only, {self.rows} row(s): never compacted"
        return f"{self.capacity} per head, {self.target} after a compaction, {self.rows} row(s)"

    def table(self) -> list[tuple[str, int | None, str]]:
        """Return the plan as the rows of a table for display: name, bytes and meaning."""
        return [
            ("cap", self.cap_bytes, "hard limit over R + T"),
            ("R: slots", self.resident_bytes - self.stored_bytes, self._slots_text()),
            ("R: stored queries", self.stored_bytes, f"of {sum(self.stored)} tokens per row"),
            ("T: fit", self.draw_bytes + self.fit_bytes, f"the policy's workspace, {self.probe_tokens} probe tokens"),
            *([("T: copies", self.copy_bytes, "a head's quantised slots as numbers")] if self.copy_bytes else []),
            ("T: survey", self.survey_bytes, "scores of all layers, before anything is moved"),
            ("T: result of a fit", self.result_bytes, "beside the check and the new store, not beside the fit"),
            ("T: held-out check", self.check_bytes, "errors for the report (after the fit)"),
            ("T: moving a layer", self.move_bytes, "a new store beside the old one (after the check)"),
            *([("T: re-basing", self.rebase_bytes, "turning a layer's keys")] if self.rebase_bytes else []),
            ("T: attention", self.forward_bytes, "merging and scratch of one forward (not beside the others)"),
            *([("T: scores", self.undo_bytes, "as they were before a forward, beside it")] if self.undo_bytes else []),
            ("R + T", self.resident_bytes + self.workspace_bytes, "at most, at every moment"),
            ("A (outside the cap)", self.activation_bytes, f"estimate: the model's own forward of {self.chunk} tokens"),
        ]


class Planner:
    """A calculator of the plan of one policy at any capacity.

    With ``frugal`` the plans store as few queries as possible, instead of as many as a share of the cap allows.
    """

    def __init__(
        self, shape: ModelShape, settings: Settings, policy: Policy, rows: int, *, frugal: bool = False
    ) -> None:
        self.shape, self.settings, self.policy, self.rows, self.frugal = shape, settings, policy, rows, frugal

    def at(self, capacity: int) -> Plan:
        """Return the plan at ``capacity`` slots per head, whether or not it fits under the cap."""
        settings, policy = self.settings, self.policy
        target = self._target(capacity)
        limit = self._limit(capacity, target)
        most = math.ceil(self._head_ceiling * max(0, limit - settings.keep_first - settings.keep_recent))
        probe, stored, drawn = self._references(capacity)
        scratch = self._scratch(probe, capacity)
        stored_bytes = self.rows * sum(stored) * self._query_bytes()
        references = probe + sum(stored) + drawn
        return Plan(
            policy=policy.name,
            cap_bytes=settings.cap,
            rows=self.rows,
            capacity=capacity,
            target=target,
            limit=limit,
            most_budget=most,
            layer_ceiling=self._layer_ceiling,
            prefix=settings.keep_first,
            recent=settings.keep_recent,
            chunk=settings.chunk,
            probe_tokens=probe,
            stored=stored,
            drawn_tokens=drawn,
            scratch=scratch,
            resident_bytes=stored_bytes
            + self.rows * sum(self._store_bytes(layer, capacity) for layer in self.shape.layers),
            stored_bytes=stored_bytes,
            draw_bytes=self._most(lambda layer: random_bytes(layer, drawn, self.shape.itemsize)) if drawn else 0,
            fit_bytes=self._most(lambda layer: self._fit(layer, capacity, limit, most, references)),
            copy_bytes=self._most(lambda layer: self._copies(layer, self._fullest(capacity, limit, most))),
            result_bytes=self._most(lambda layer: self._result(layer, capacity, limit, most, references)),
            check_bytes=self._most(
                lambda layer: self._check(layer, self._fullest(capacity, limit, most), max(1, most), references)
            ),
            forward_bytes=max(
                self._forward(layer, self._fullest(capacity, limit, most)) for layer in self.shape.layers
            ),
            undo_bytes=self._undo(capacity),
            survey_bytes=self._survey(self._fullest(capacity, limit, most)),
            move_bytes=max(self._move(layer, capacity, limit, most) for layer in self.shape.layers),
            rebase_bytes=self._rebase(capacity, limit, most) if settings.rebase else 0,
            activation_bytes=self.shape.activation_bytes(max(settings.chunk, probe)),
        )

    def compacted(self, capacity: int) -> tuple[int, int]:
        """Return how many slots per head a compaction of a full row leaves, and how many it frees, on average."""
        target = self._target(capacity)
        return target, capacity - self._scratch(self._references(capacity)[0], capacity) - target

    @property
    def _head_ceiling(self) -> float:
        return 1.0 if self.policy.budgets is None else self.policy.budgets.head_ceiling

    @property
    def _layer_ceiling(self) -> float:
        return 1.0 if self.policy.budgets is None else self.policy.budgets.layer_ceiling

    def _limit(self, capacity: int, target: int) -> int:
        """Return the most slots per head that a compaction may leave, as an average over all heads."""
        if self.policy.budgets is None or not self.policy.budgets.adaptive:
            return target
        free = max(self.settings.min_reclaim, capacity // HYSTERESIS)
        return max(target, capacity - self._scratch(self._references(capacity)[0], capacity) - free)

    def _fullest(self, capacity: int, limit: int, most: int) -> int:
        """Return the most slots that a single head of a full row can hold.

        The three arguments are numbers of slots from the plan. ``capacity`` is the average per head of a full row,
        ``limit`` is the average that a compaction may leave, and ``most`` is the most that one head's segment may keep.
        The result has room for the prefix, ``most`` slots, the recent window, and the tokens that arrive before the row
        is full. If all heads get equal budgets, the result is ``capacity``.
        """
        if self.policy.budgets is None or self._head_ceiling == 1:
            return capacity
        pinned = self.settings.keep_first + self.settings.keep_recent
        least = pinned if self.policy.budgets.adaptive else limit
        return pinned + most + max(0, capacity - least) + 1

    def _move(self, layer: LayerShape, capacity: int, limit: int, most: int) -> int:
        """Return the temporary bytes of a layer's largest new store, which is built before the old store is freed.

        ``capacity``, ``limit`` and ``most`` are as in :meth:`_fullest`.
        """
        encoding = encoding_bytes(layer, min(capacity, quantised.BLOCK))  # head by head
        if layer.window is not None or self._head_ceiling == 1:
            return encoding + self._store_bytes(layer, capacity)
        pinned = self.settings.keep_first + self.settings.keep_recent
        shares = math.ceil(self._layer_ceiling * layer.kv_heads * max(0, limit - pinned))
        kept = min(layer.kv_heads * most, shares)
        headroom = self._fullest(capacity, limit, most) - most
        return encoding + (layer.kv_heads * headroom + kept) * self._slot_bytes(layer)

    def _rebase(self, capacity: int, limit: int, most: int) -> int:
        """Return the most temporary bytes that re-basing any one layer needs, besides the layer's new store.

        These bytes are for computing the new positions and for rotating the keys. ``capacity``, ``limit`` and ``most``
        are as in :meth:`_fullest`.
        """
        fullest, itemsize = self._fullest(capacity, limit, most), self.shape.itemsize
        return max(layer_scratch(layer, self.slots(layer, fullest), itemsize) for layer in self.shape.layers)

    def slots(self, layer: LayerShape, capacity: int) -> int:
        """Return the most slots per head that the store of ``layer`` may have.

        For a layer with full attention the result is ``capacity``. For a layer with a sliding window the result depends
        only on the window and on the number of tokens that one forward may feed.
        """
        return capacity if layer.window is None else window_slots(layer.window, self.settings.chunk)

    def _target(self, capacity: int) -> int:
        target = self.settings.target
        if self.policy.compactor is None:
            return capacity - self.settings.min_reclaim
        if isinstance(target, float):
            return int(capacity * target)
        if isinstance(target, int):
            return target
        per_slot = self.rows * sum(
            layer.kv_heads * self._slot_bytes(layer) for layer in self.shape.layers if layer.window is None
        )
        return parse_bytes(target, "target") // max(1, per_slot)

    def _references(self, capacity: int) -> tuple[int, tuple[int, ...], int]:
        """Return how many reference queries a query head gets from each of the three kinds of sources.

        The policy's reference queries are a mixture of parts. Each part has one source.

        1. From a probe: the number of tokens that it runs; each gives one query.
        2. From the model's own forwards: for each part in ``queries.stored`` the number of tokens whose queries are
           stored, as a tuple.
        3. From a random generator: the number of queries that are drawn for parts with the source ``random``. Such a
           part also counts under 2, because the drawn queries get the norms of stored queries.
        """
        queries = self.policy.queries
        total = queries.tokens or min(PROBE_REACH * capacity, MAX_PROBE)
        share = sum(map(queries.share, queries.probing))
        probe = min(max(1, round(total * share)), self.settings.chunk) if share else 0
        stored = tuple(self._stored_tokens(part, total) for part in queries.stored)
        drawn = sum(max(1, round(total * queries.share(part))) for part in queries.stored if part.source == "random")
        return probe, stored, drawn

    def _scratch(self, probe: int, capacity: int) -> int:
        """Return how many slots per head to keep free for an instruction and the text that the model then writes."""
        return max(self._study(probe, capacity), self._summary(capacity))

    def _summary(self, capacity: int) -> int:
        """Return how many slots a summary and the instruction that asks for it take; 0 if the policy makes none."""
        rewrite = self.policy.rewrite
        if rewrite is None:
            return 0
        share = max(MIN_SUMMARY, capacity // SUMMARY_SHARE)
        return MAX_REQUEST + (share if rewrite.tokens is None else min(rewrite.tokens, capacity // 2))

    def _study(self, probe: int, capacity: int) -> int:
        parts = self.policy.queries.probing
        written = sum(part.share for part in parts if part.source == "self-study")
        if not written:
            return 0
        wanted = math.ceil(probe * written / sum(part.share for part in parts))
        return MAX_INSTRUCTION + min(wanted, capacity // STUDY_SHARE)

    def _stored_tokens(self, part: Part, total: int) -> int:
        if part.source == "random":
            return NORMS
        wanted = max(1, round(total * self.policy.queries.share(part)))
        if self.policy.queries.tokens:
            return wanted
        share = 0 if self.frugal else self.settings.cap // STORED_SHARE
        return max(HELD_OUT, min(wanted, MAX_STORED, share // max(1, self.rows * self._query_bytes())))

    def _query_bytes(self) -> int:
        layers = [layer for layer in self.shape.layers if layer.window is None]
        return sum(layer.query_heads * layer.key_dim for layer in layers) * self.shape.itemsize

    def _slot_bytes(self, layer: LayerShape) -> int:
        return self.shape.slot_bytes(layer, scores=self.policy.scores != "none")

    def _store_bytes(self, layer: LayerShape, capacity: int) -> int:
        return layer.kv_heads * self.slots(layer, capacity) * self._slot_bytes(layer)

    def _most(self, price: Callable[[LayerShape], int]) -> int:
        compactable = [layer for layer in self.shape.layers if layer.window is None]
        if self.policy.compactor is None or not compactable:
            return 0
        return max(price(layer) for layer in compactable)

    @property
    def _compactor(self) -> Compactor:
        assert self.policy.compactor is not None  # noqa: S101  # _most has checked
        return self.policy.compactor

    def _fit(self, layer: LayerShape, capacity: int, limit: int, most: int, references: int) -> int:
        return self._compactor.workspace(self._segment(layer, capacity, limit, most, references))

    def _result(self, layer: LayerShape, capacity: int, limit: int, most: int, references: int) -> int:
        return result_bytes(self._compactor, self._segment(layer, capacity, limit, most, references))

    def _segment(self, layer: LayerShape, capacity: int, limit: int, most: int, references: int) -> SegmentShape:
        """Return the largest sizes of a layer's segment; the arguments are as in :meth:`_fullest`."""
        pinned = self.settings.keep_first + self.settings.keep_recent
        return SegmentShape(
            heads=layer.kv_heads,
            group=layer.group,
            slots=max(1, self._fullest(capacity, limit, most) - pinned),
            budget=max(1, most),
            queries=references,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            itemsize=self.shape.itemsize,
        )

    def _copies(self, layer: LayerShape, fullest: int) -> int:
        segment = max(1, fullest - self.settings.keep_first - self.settings.keep_recent)
        return read_bytes(layer, self._compactor, segment, self.shape.itemsize)

    def _check(self, layer: LayerShape, slots: int, kept: int, references: int) -> int:
        queries = checked_tokens(layer.group, references // HELD_OUT)
        if not queries:
            return 0  # nothing is held out, so nothing is compared
        copies, itemsize = replace(layer, slot_dtype="auto"), self.shape.itemsize
        compared = ragged.local_bytes(copies, queries, slots, kept, itemsize, fused=self._fused(layer))
        return compared + rounding_bytes(layer, kept, itemsize) + copy_bytes(layer, slots, itemsize)

    def _survey(self, slots: int) -> int:
        """Return the temporary bytes of comparing the slots of all layers, to choose the heads' budgets.

        These are one float32 score per slot of every layer, and one boolean per slot of one head.
        """
        if self.policy.budgets is None or not self.policy.budgets.needs_survey:
            return 0
        heads = sum(layer.kv_heads for layer in self.shape.layers if layer.window is None)
        return heads * slots * SCORE_BYTES + slots

    def _undo(self, capacity: int) -> int:
        """Return the temporary bytes of one score for each slot of all rows; 0 if forwards add nothing to scores.

        Heads share the bytes of their slots, so there are most slots if all are in the layer with the smallest slots.
        """
        full = [layer for layer in self.shape.layers if layer.window is None]
        if self.policy.scores != "received" or not full:
            return 0
        held = self.rows * sum(self._store_bytes(layer, capacity) for layer in full)
        return held // min(map(self._slot_bytes, full)) * SCORE_BYTES

    def _fused(self, layer: LayerShape) -> bool:
        return self.shape.fused and layer.key_dim == layer.value_dim

    def _forward(self, layer: LayerShape, fullest: int) -> int:
        slots, chunk = self.slots(layer, fullest), self.settings.chunk
        fused = ragged.fused_bytes(layer, chunk, slots, self.shape.itemsize, self.rows)
        scored = self.policy.scores == "received"
        most = fused if self.shape.fused else max(fused, ragged.cuda_bytes(layer, chunk, slots))
        if scored or layer.sinks or layer.window is not None or not self._fused(layer):
            most = max(most, explicit.explicit_bytes(layer, chunk, slots, self.shape.itemsize))
        # each row of a batch is attended while the output of the whole batch is allocated
        own = layer.query_heads * chunk * layer.value_dim * self.shape.itemsize if self.rows > 1 else 0
        return max(most + own, encoding_bytes(layer, layer.kv_heads * chunk))


def checked_tokens(group: int, tokens: int) -> int:
    """Return how many of ``tokens`` held-out tokens to compare at once, with ``group`` query heads per KV head."""
    return min(tokens, max(1, CHECKED // group))


def read_bytes(layer: LayerShape, compactor: Compactor, slots: int, itemsize: int) -> int:
    """Return the temporary bytes of decoding what ``compactor`` reads of one head of ``slots`` slots.

    ``itemsize`` is the bytes of one decoded number. The result is 0 if the layer is not quantised.
    """
    return copy_bytes(layer, slots, itemsize, keys=compactor.reads_keys, values=compactor.reads_values)


def copy_bytes(layer: LayerShape, slots: int, itemsize: int, *, keys: bool = True, values: bool = True) -> int:
    """Return the temporary bytes of decoded copies of one head's keys and values, for ``slots`` slots.

    ``itemsize`` is the bytes of one decoded number. ``keys`` and ``values`` say which of the two are decoded. The
    result includes the bytes of decoding. The result is 0 if the layer is not quantised.
    """
    if layer.formats is None:
        return 0
    forms = [form for form, read in zip(layer.formats, (keys, values), strict=True) if read]
    decoding = max((form.decode_bytes(min(slots, quantised.READ)) for form in forms), default=0)
    return slots * sum(form.dim for form in forms) * itemsize + decoding


def result_bytes(compactor: Compactor, segment: SegmentShape) -> int:
    """Return the most bytes of the result of fitting one layer.

    They are those of the kept indices and of all that a :class:`agentmem.contracts.HeadCompaction` may replace, in
    float32, but no more than the compactor's workspace, which includes its result. There is always room for the indices
    alone, to which a layer is evicted if its fits fail.
    """
    kept, floats = segment.heads * segment.budget, 2 + segment.key_dim + segment.value_dim
    return max(kept * INDEX_BYTES, min(kept * (INDEX_BYTES + SCORE_BYTES * floats), compactor.workspace(segment)))


def rounding_bytes(layer: LayerShape, slots: int, itemsize: int) -> int:
    """Return the temporary bytes of rounding the fitted keys and values of one head.

    Fitted keys and values are those that a compaction has computed for ``slots`` slots. They are rounded to the numbers
    that quantised slots can store: they are encoded and decoded again. The result includes the rounded keys and values,
    with ``itemsize`` bytes per number. The result is 0 if the layer is not quantised.
    """
    if layer.formats is None:
        return 0
    block = min(slots, quantised.BLOCK)
    coding = max(form.encode_bytes(block) + form.decode_bytes(block) for form in layer.formats)
    return slots * (layer.key_dim + layer.value_dim) * itemsize + coding


def encoding_bytes(layer: LayerShape, rows: int) -> int:
    """Return the temporary bytes of encoding ``rows`` keys or values of a layer, one block at a time.

    The result is 0 if the layer is not quantised.
    """
    if layer.formats is None:
        return 0
    block = min(rows, layer.kv_heads * quantised.BLOCK)
    return max(form.encode_bytes(block) for form in layer.formats)


def window_slots(window: int, chunk: int) -> int:
    """Return the slots per head of a sliding layer's store.

    These are the slots that a query can attend to, plus some more, so that the store need not slide for every token.
    """
    return window - 1 + max(1, min(chunk, window))


def grown(needed: int, limit: int) -> int:
    """Return the capacity to allocate for a store that must hold ``needed`` slots per head and may hold ``limit``.

    The capacity is ``limit``, halved (and rounded up) for as long as the half is at least ``needed``. A growing store
    therefore about doubles its capacity each time. While a store grows, the old and the new store both exist; the plan
    has room under the cap for both.
    """
    capacity = limit
    while capacity > 1 and -(-capacity // 2) >= needed:
        capacity = -(-capacity // 2)
    return capacity
