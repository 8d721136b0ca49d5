"""The memory: rows of slots under one cap. It makes room, runs the policy layer by layer, checks and commits.

It knows no model: a forward reaches it as :class:`Append` (tokens that stay) or :class:`Transient` (tokens that leave
nothing behind), whose ``attend`` is called once a layer; and it asks for a transient forward through ``run_transient``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from agentmem import events
from agentmem.arena import LayerStore, SlotSpec
from agentmem.attention import Fresh, attend
from agentmem.budget import grown, make_plan, window_slots
from agentmem.compaction import RowCompaction
from agentmem.errors import MemoryCapExceeded, MemoryClosed, SettingsRefused, UnsupportedGeneration
from agentmem.ledger import Ledger
from agentmem.pins import Pins
from agentmem.queries import MAX_INSTRUCTION
from agentmem.report import CompactionReport, RunReport
from agentmem.row import Row
from agentmem.samples import QuerySample
from agentmem.steps import Append, Arriving, Scratch, Transient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agentmem.contracts import Policy
    from agentmem.probe import Probe, Words
    from agentmem.settings import Settings
    from agentmem.shape import ModelShape


class Usage(NamedTuple):
    """A moment of a memory, summed over its rows."""

    tokens_seen: int
    held_slots: int
    resident_bytes: int
    used_bytes: int
    peak_bytes: int


class Memory:
    """Slots of all rows under one cap.

    Raises:
        CapTooSmall: at construction or when rows are bound, with the cap that would do.

    """

    def __init__(
        self,
        shape: ModelShape,
        settings: Settings,
        policy: Policy,
        *,
        words: Words | None = None,
        read: Callable[[Sequence[int]], list[str]] | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        """Plan for one row; :meth:`bind` plans again for more.

        ``words`` are the ids of the probe's own texts, ``read`` gives the text of each id (for patterns), ``ends`` are
        the ids that end a text that the model writes.
        """
        self.shape, self.settings, self.policy = shape, settings, policy
        self.words: Words = words or {}
        self.read, self.ends = read, tuple(ends)
        self.plan = make_plan(shape, settings, policy)
        self.ledger = Ledger(settings.cap)
        self.rows: list[Row] = []
        self.compactions: list[CompactionReport] = []
        self.scales = [1.0] * len(shape.layers)
        """Logit scale of each layer, as the model last used it."""
        self.run_transient: Callable[[Sequence[int], int, Transient], None] | None = None
        """Runs the decoder over ids from a position on, set by the adapter."""
        self.run_scratch: Callable[[Sequence[int], int, Scratch], int] | None = None
        """Runs the whole model likewise and returns the most likely next id."""
        self.stopped: str | None = None
        self._closed = False
        self._subscribers: list[Callable[[CompactionReport | Usage], None]] = []
        self._prompt_tokens = self._new_tokens = 0
        self._pending: Append | None = None

    # ---- rows and room

    def bind(self, rows: int) -> None:
        """Fix the number of rows at the first forward and share the cap among them.

        Raises:
            CapTooSmall: the cap cannot serve that many rows.
            UnsupportedGeneration: the memory already holds another number of rows.

        """
        if self.rows:
            if rows != len(self.rows):
                raise UnsupportedGeneration(
                    f"a batch of {rows} row(s) was given to a memory of {len(self.rows)}; a memory serves the batch it "
                    "began with: open another one, or repeat the prompt as often as before"
                )
            return
        if rows != self.plan.rows:
            self.plan = make_plan(self.shape, self.settings, self.policy, rows)
        events.memory_planned(
            cap_bytes=self.plan.cap_bytes, capacity=self.plan.capacity, rows=rows, policy=self.policy.name
        )
        room, layers, seed = self.plan.capacity - self.plan.scratch, len(self.shape.layers), self.settings.seed
        self.rows = [Row(index, layers, room, seed) for index in range(rows)]

    def piece(self, arriving: Sequence[Sequence[bool]], limit: int) -> int:
        """Columns of a batch that can be fed now: as many as no row has to be compacted for, ``limit`` at most.

        Rows that are full are compacted first, so the result is never 0. Cutting exactly where a row fills up makes
        the moments of compaction a function of the tokens alone, however a prompt was cut.
        """
        for row, valid in zip(self.rows, arriving, strict=True):
            if row.room < 1 and any(valid):
                self.make_room(row, 1)
        limit = min(limit, self.slack())
        return max(1, min(_columns(valid, row.room, limit) for row, valid in zip(self.rows, arriving, strict=True)))

    def slack(self) -> int:
        """Most tokens of one forward: ``chunk``, or what the sliding layers have room for."""
        slacks = [
            window_slots(layer.window, self.plan.chunk) - layer.window + 1
            for layer in self.shape.layers
            if layer.window
        ]
        return min([self.plan.chunk, *slacks])

    def make_room(self, row: Row, tokens: int) -> None:
        """Compact the row if it cannot take ``tokens`` more.

        Raises:
            MemoryCapExceeded: the policy never compacts, or compaction is not automatic, or too many tokens at once.
            CompactionFailed: see :class:`agentmem.compaction.RowCompaction`.

        """
        if row.room >= tokens and row.budgets is None:
            return
        if row.budgets is None and (self.policy.compactor is None or self.settings.mode != "auto"):
            raise MemoryCapExceeded(self._full(row, tokens))
        self.compact(row)
        if row.room < tokens:
            raise MemoryCapExceeded(
                f"a forward of {tokens} tokens does not fit: a row of {self.plan.capacity} slots per head has room "
                f"for {row.room} after a compaction; feed at most that many at once (generate does so), or raise cap"
            )

    def compact(self, row: Row) -> CompactionReport | None:
        """Compact one row now; ``None`` when there is nothing to reclaim.

        Raises:
            SettingsRefused: ``mode="off"``.
            CompactionFailed: see :class:`agentmem.compaction.RowCompaction`.

        """
        self.open_or_raise()
        self.abandon()
        if self.settings.mode == "off":
            raise SettingsRefused("mode='off' never compacts; open the memory with mode='manual' to compact by hand")
        job = RowCompaction(self, row)
        if not job.worthwhile:
            return None
        report = job.run()
        self.compactions.append(report)
        events.compaction_finished(report)
        self._publish(report)
        return report

    def probe(self, row: Row, probe: Probe, visit: Callable[[int, torch.Tensor], None]) -> None:
        """Run a probe's tokens at the following positions; ``visit(layer, queries)`` before a layer attends."""
        assert self.run_transient is not None  # noqa: S101  # the adapter sets it before the first forward
        self.run_transient(probe.ids, row.next_position, Transient(self, row, visit))

    def write(self, row: Row, instruction: Sequence[int], most: int) -> tuple[int, ...]:
        """What the model writes after an instruction (its start, if long), greedily: at most ``most`` tokens with it.

        It is written in scratch slots at the following positions and taken back, so nothing of it stays. It ends
        early at a token that ends a text.
        """
        assert self.run_scratch is not None  # noqa: S101  # the adapter sets it before the first forward
        told = instruction[:MAX_INSTRUCTION]
        step, written, fed = Scratch(self, row), list(told), 0
        try:
            while len(written) < most and (fed < len(told) or written[-1] not in self.ends):
                piece = written[fed : fed + self.plan.chunk]
                token = self.run_scratch(piece, row.next_position + fed, step)
                fed += len(piece)
                if fed == len(written):
                    written.append(token)
        finally:
            step.rollback()
        return tuple(written)

    def pins(self, row: Row) -> list[tuple[int, int]]:
        """The spans of a row's transcript that the policy's pattern names."""
        pattern = self.policy.queries.pattern
        if not pattern or self.read is None:
            return []
        if row.pins is None:
            row.pins = Pins(pattern, self.read)
        return row.pins.spans(row.ids)

    def begin(self, arriving: Sequence[Arriving]) -> Append:
        """Start a forward whose tokens stay; makes room for all of them."""
        self.open_or_raise()
        self.abandon()
        for row, each in zip(self.rows, arriving, strict=True):
            if each.ids:
                self.make_room(row, len(each.ids))
        self._pending = Append(self, arriving)
        return self._pending

    def abandon(self) -> None:
        """Take back a forward that neither ended nor failed: an interrupt ended it between two layers."""
        if self._pending is not None:
            self._pending.rollback()
            self._pending = None

    def appended(self, longest: int, tokens: int) -> None:
        """Account a committed forward."""
        self._pending = None
        if longest > 1:
            self._prompt_tokens += tokens
        else:
            self._new_tokens += tokens
        if self._subscribers:
            self._publish(self.usage())

    def append_row(
        self,
        row: Row,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        *,
        scratch: bool = False,
    ) -> torch.Tensor:
        """Append one row's slots of one layer and attend: ``queries [Hq, q, d]`` → ``[Hq, q, dv]``.

        ``scratch`` slots are neither scored nor sampled: they will be taken back.
        """
        shape, count = self.shape.layers[layer], keys.shape[1]
        self.scales[layer] = scale
        store = self._roomy(row, layer, keys, count)
        scored = self.policy.scores == "received" and shape.window is None and not scratch
        self.ledger.touch(self.plan.forward_bytes, "attention")
        with torch.no_grad():
            if count == 1:
                store.append(keys, values)
                output, _ = attend(queries, store.runs(shape.window, scored=scored), None, scale, explicit=scored)
            else:
                fresh = Fresh(keys, values)
                runs = store.runs(shape.window and shape.window - 1, scored=scored)
                output, received = attend(queries, runs, fresh, scale, window=shape.window, explicit=scored)
                store.append(keys, values, received if scored else None)
            if self.plan.stored and shape.window is None and not scratch:
                self._sample(row, layer, queries)
        return output

    def _roomy(self, row: Row, layer: int, like: torch.Tensor, count: int) -> LayerStore:
        """The store of a layer, with allocated room for ``count`` more slots."""
        store, window = row.stores[layer], self.shape.layers[layer].window
        limit = self.plan.capacity if window is None else window_slots(window, self.plan.chunk)
        if store is not None and window is not None and store.lengths[0] + count > limit:
            store.slide(window - 1)
        if store is not None and store.room >= count:
            return store
        if store is None:
            scores = self.policy.scores != "none" and window is None
            spec = SlotSpec(self.shape.layers[layer], like.dtype, like.device, scores)
            store = LayerStore(spec, [grown(count, limit)] * spec.shape.kv_heads, self.ledger)
        else:
            old, store = store, store.resized([grown(max(store.lengths) + count, limit)] * len(store.lengths))
            row.stores[layer] = store
            old.free()
        row.stores[layer] = store
        return store

    def _sample(self, row: Row, layer: int, queries: torch.Tensor) -> None:
        if not row.samples[layer]:
            parts = zip(self.policy.queries.stored, self.plan.stored, strict=True)
            row.samples[layer] = tuple(
                QuerySample(part, self.shape.layers[layer], size, queries, self.ledger) for part, size in parts
            )
        for sample in row.samples[layer]:
            sample.offer(queries, row.seen)

    def _full(self, row: Row, tokens: int) -> str:
        why = (
            f"policy {self.policy.name!r} never compacts"
            if self.policy.compactor is None
            else f"mode={self.settings.mode!r} does not compact by itself"
        )
        by_hand = ", or call memory.compact()" if self.settings.mode == "manual" else ""
        return (
            f"row {row.index} holds {self.plan.capacity - row.room} of {self.plan.capacity} slots per head under a cap "
            f"of {self.plan.cap_bytes} bytes and cannot take {tokens} more token(s): {why}; raise cap, or choose "
            f"another policy or mode{by_hand}"
        )

    # ---- what happened

    def usage(self) -> Usage:
        """The memory now."""
        stores = [store for row in self.rows for store in row.stores if store is not None]
        return Usage(
            tokens_seen=sum(row.seen for row in self.rows),
            held_slots=sum(sum(store.lengths) for store in stores),
            resident_bytes=self.ledger.resident,
            used_bytes=sum(store.used_bytes for store in stores),
            peak_bytes=self.ledger.peak,
        )

    def report(self) -> RunReport:
        """Everything so far."""
        return RunReport(
            model=self.shape.name,
            policy=self.policy.name,
            cap_bytes=self.plan.cap_bytes,
            peak_bytes=self.ledger.peak,
            resident_bytes=self.ledger.resident,
            held_slots=sum(row.held for row in self.rows),
            capacity=self.plan.capacity,
            rows=len(self.rows),
            num_compactions=len(self.compactions),
            num_prompt_tokens=self._prompt_tokens,
            num_new_tokens=self._new_tokens,
            seconds_compacting=sum(report.seconds for report in self.compactions),
            stopped=self.stopped,
            compactions=tuple(self.compactions),
        )

    def subscribe(self, callback: Callable[[CompactionReport | Usage], None]) -> None:
        """Call ``callback`` with a :class:`Usage` after every forward and with every compaction's report."""
        self._subscribers.append(callback)

    def _publish(self, event: CompactionReport | Usage) -> None:
        for callback in self._subscribers:
            callback(event)

    # ---- the end

    @property
    def closed(self) -> bool:
        """Whether the memory was closed."""
        return self._closed

    @property
    def used(self) -> bool:
        """Whether a forward ever reached the memory."""
        return bool(self.rows)

    def open_or_raise(self) -> None:
        """Refuse work on a closed memory.

        Raises:
            MemoryClosed: the block that owned the memory has ended.

        """
        if self._closed:
            raise MemoryClosed(
                "this memory was closed when its block ended and holds no slots; open another with agentmem.capped(...)"
            )

    def close(self) -> None:
        """Free all slots; the reports stay readable."""
        for row in self.rows:
            for store in row.stores:
                if store is not None:
                    store.free()
            for sample in (sample for layer in row.samples for sample in layer):
                self.ledger.release(sample.held_bytes)
            row.stores = [None] * len(row.stores)
            row.samples = [()] * len(row.samples)
        self._closed = True


def _columns(valid: Sequence[bool], room: int, limit: int) -> int:
    """The longest start of ``valid`` with at most ``room`` true entries, ``limit`` at most."""
    count = 0
    for column, present in enumerate(valid[:limit]):
        count += present
        if count > room:
            return column
    return min(limit, len(valid))
