"""The memory: rows of slots under one cap. It makes room, runs the policy layer by layer, checks and commits.

It knows no model: a forward reaches it as :class:`Append` (tokens that stay) or :class:`Transient` (tokens that leave
nothing behind), whose ``attend`` is called once a layer; and it asks for a transient forward through ``run_transient``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from agentmem.compaction.request import USUAL, Request
from agentmem.compaction.run import RowCompaction
from agentmem.errors import MemoryCapExceeded, MemoryClosed, SettingsRefused, UnsupportedGeneration
from agentmem.memory.forwards import Adopt, Append, Arriving, Scratch, Transient
from agentmem.memory.ledger import Ledger
from agentmem.memory.owner import Owner
from agentmem.memory.positions import keep_in_reach, rebase
from agentmem.memory.sequence import Consumed, Progress, Row
from agentmem.planning.capacity import make_plans
from agentmem.planning.pricing import window_slots
from agentmem.reference_queries.patterns import Marks
from agentmem.reporting import log_events
from agentmem.reporting.report import CompactionReport, RebaseReport, RunReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from agentmem.contracts import Policy
    from agentmem.language import Language
    from agentmem.memory.positions import Positions
    from agentmem.memory.store import LayerStore
    from agentmem.planning.model_shape import ModelShape
    from agentmem.planning.pricing import Plan
    from agentmem.reference_queries.probe import Probe, Words
    from agentmem.reference_queries.stored import QuerySample
    from agentmem.settings import Settings


class Usage(NamedTuple):
    """A moment of a memory, summed over its rows."""

    tokens_seen: int
    held_slots: int
    resident_bytes: int
    used_bytes: int
    peak_bytes: int


WHOLE_REPORTS = 128
"""The newest reports that are kept whole; older ones say nothing of single layers, or a memory's report would grow."""

Event = CompactionReport | RebaseReport | Usage


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
        extra_policies: Sequence[Policy] = (),
        words: Mapping[str, Words] | None = None,
        language: Language | None = None,
    ) -> None:
        """Plan for one row; :meth:`bind` plans again for more.

        ``extra_policies`` are policies that single compactions may ask for instead. ``words`` are the ids of each policy's own
        texts, by its name; patterns and summaries need a ``language``.
        """
        self.shape, self.settings, self.policy, self.extra_policies = shape, settings, policy, tuple(extra_policies)
        self.words = dict(words or {})
        self.language = language
        self.plan, *self._plans = make_plans(shape, settings, (policy, *self.extra_policies))
        self.ledger = Ledger(settings.cap)
        self.rows: list[Row] = []
        self.compactions: list[CompactionReport] = []
        self.scales = [1.0] * len(shape.layers)
        """Logit scale of each layer, as the model last used it."""
        self.run_transient: Callable[[Sequence[int], int, Adopt | Transient], None] | None = None
        """Runs the decoder over ids from a position on, set by the adapter."""
        self.run_scratch: Callable[[Sequence[int], int, Scratch], torch.Tensor] | None = None
        """Runs the whole model likewise and returns the logits ``[V]`` of the next id."""
        self.run_logits: Callable[[Sequence[int], int, Transient], torch.Tensor] | None = None
        """Runs the whole model over ids that leave nothing and returns all their logits ``[n, V]``."""
        self.positions: Positions | None = None
        """How the model counts positions, where rows are re-based."""
        self.rebases: list[RebaseReport] = []
        self.device = torch.device("cpu")
        """Where the model computes, set by the adapter."""
        self.boundary: Callable[[], None] = unwatched
        """Called before each layer of a compaction; what it raises interrupts there."""
        self.stopped: str | None = None
        self._closed = False
        self._subscribers: list[Callable[[Event], None]] = []
        self.progress = Progress()
        """What the rows have consumed."""
        self.owner = Owner()
        self._pending: Append | None = None

    def empty(self) -> Memory:
        """Another memory of the same kind, that has read nothing."""
        return Memory(
            self.shape,
            self.settings,
            self.policy,
            extra_policies=self.extra_policies,
            words=self.words,
            language=self.language,
        )

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
            self.plan, *self._plans = make_plans(self.shape, self.settings, (self.policy, *self.extra_policies), rows)
        log_events.memory_planned(
            cap_bytes=self.plan.cap_bytes, capacity=self.plan.capacity, rows=rows, policy=self.policy.name
        )
        room, layers, seed = self.plan.capacity - self.plan.scratch, len(self.shape.layers), self.settings.seed
        self.progress.consumed = Consumed((0,) * rows, (0,) * rows)
        self.rows = [Row(index, layers, room, seed, self.progress) for index in range(rows)]

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

    def plan_of(self, policy: Policy) -> Plan:
        """The plan by which one of the memory's policies compacts."""
        return self.plan if policy is self.policy else self._plans[self.extra_policies.index(policy)]

    def named(self, name: str) -> Policy:
        """The policy of that name among those that the memory was opened with.

        Raises:
            SettingsRefused: there is none.

        """
        found = {policy.name: policy for policy in (*self.extra_policies, self.policy)}
        if name not in found:
            raise SettingsRefused(
                f"policy {name!r}: this memory was planned for {', '.join(map(repr, sorted(found)))}; name it when the "
                "memory is opened (extra_policies=...), so that its workspace is counted"
            )
        return found[name]

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
            CompactionFailed: see :class:`agentmem.compaction.run.RowCompaction`.

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

    def compact(self, row: Row, request: Request = USUAL) -> CompactionReport | None:
        """Compact one row now; ``None`` when there is nothing to reclaim.

        What has begun is finished first, and its report returned where nothing is left to reclaim then.

        Raises:
            SettingsRefused: ``mode="off"``.
            CompactionFailed: see :class:`agentmem.compaction.run.RowCompaction`.

        """
        self.open_or_raise()
        self.abandon()
        policy = row.job.policy if row.job is not None else request.policy or self.policy
        plan = self.plan_of(policy)
        keep_in_reach(self, row, plan.probe_tokens + plan.scratch)
        if self.settings.mode == "off":
            raise SettingsRefused("mode='off' never compacts; open the memory with mode='manual' to compact by hand")
        begun = self.compact(row) if row.budgets is not None and request is not USUAL else None
        job = RowCompaction(self, row, request)
        if not job.worthwhile:
            return begun
        report = job.run()
        self.compactions.append(report)
        if len(self.compactions) > WHOLE_REPORTS:
            self.compactions[-1 - WHOLE_REPORTS] = self.compactions[-1 - WHOLE_REPORTS].brief()
        log_events.compaction_finished(report)
        self.publish(report)
        return report

    def probe(self, row: Row, probe: Probe, visit: Callable[[int, torch.Tensor], None]) -> None:
        """Run a probe's tokens at the following positions; ``visit(layer, queries)`` before a layer attends."""
        assert self.run_transient is not None  # noqa: S101  # the adapter sets it before the first forward
        self.run_transient(probe.ids, row.next_position, Transient(self, row, visit))

    def marks(self, row: Row, pattern: str) -> list[tuple[int, int]]:
        """The spans of a row's transcript that a policy's pattern names."""
        if not pattern or self.language is None:
            return []
        if pattern not in row.marks:
            row.marks[pattern] = Marks(pattern, self.language.read)
        return row.marks[pattern].spans(row.ids)

    def finish(self, row: Row) -> None:
        """End what was begun and interrupted on a row: a forward, a compaction, a re-basing.

        Raises:
            CompactionFailed: see :class:`agentmem.compaction.run.RowCompaction`.

        """
        self.abandon()
        if row.budgets is not None:
            self.compact(row)
        if row.moving is not None:
            rebase(self, row)

    @property
    def scored(self) -> bool:
        """Whether slots have scores."""
        return self.policy.scores != "none"

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
        """Take back what was begun and never committed, wherever an interrupt or a fault ended it.

        Everything that is to begin anew calls it first: no forward, no compaction and no loan is under way then.
        """
        self._pending = None
        self.ledger.recover(self._holders())
        for row in self.rows:
            row.take_back()

    def _holders(self) -> Iterator[LayerStore | QuerySample]:
        for row in self.rows:
            yield from (store for store in row.stores if store is not None)
            yield from (sample for layer in row.samples for sample in layer)

    def commit(self) -> None:
        """The forward that has attended in every layer ended well: the rows have consumed its tokens."""
        if self._pending is not None:
            self._pending.commit()

    def appended(self, step: Append) -> None:
        """A forward was committed."""
        if self._pending is step:
            self._pending = None
        if self._subscribers:
            self.publish(self.usage())

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
            num_prompt_tokens=self.progress.consumed.prompt_tokens,
            num_new_tokens=self.progress.consumed.new_tokens,
            seconds_compacting=sum(report.seconds for report in self.compactions),
            stopped=self.stopped,
            compactions=tuple(self.compactions),
            rebases=tuple(self.rebases),
        )

    def subscribe(self, callback: Callable[[Event], None]) -> None:
        """Call ``callback`` with a :class:`Usage` after every forward, and with every compaction or re-basing."""
        self._subscribers.append(callback)

    def publish(self, event: Event) -> None:
        """Tell the subscribers."""
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
        self._closed = True
        for row in self.rows:
            for layer in range(len(row.stores)):
                row.replace(layer, None)
            row.samples = [()] * len(row.samples)
        self.ledger.recover(())


def unwatched() -> None:
    """No boundary is watched."""


def _columns(valid: Sequence[bool], room: int, limit: int) -> int:
    """The longest start of ``valid`` with at most ``room`` true entries, ``limit`` at most."""
    count = 0
    for column, present in enumerate(valid[:limit]):
        count += present
        if count > room:
            return column
    return min(limit, len(valid))
