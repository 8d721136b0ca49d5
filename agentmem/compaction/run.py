"""Run one compaction of one sequence.

A compaction first allocates a budget of slots to every head. It then fits, checks and commits the replacement slots of
each layer. At the end it gives every head *headroom*: the same number of free slots for new tokens.

A commit replaces the store of one layer. The sequence decodes correctly after any number of commits, and an interrupted
compaction resumes with the layers that are not compacted yet. If layers fail, they are tried once more. After a second
failure, they are evicted to their budgets (their oldest slots are dropped), or the failure is raised. The report states
what happened.
"""

from __future__ import annotations

import time
import traceback
from array import array
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from agentmem.compaction.budgets import BudgetAllocator
from agentmem.compaction.checks import validate
from agentmem.compaction.held_out import Errors, HeldOut, split_references
from agentmem.compaction.references import References
from agentmem.compaction.request import USUAL, Request, make_job
from agentmem.compaction.summary import Rewriting, SummaryRefused
from agentmem.contracts import Compaction, HeadCompaction, Segment, SegmentShape
from agentmem.errors import CompactionFailed, PolicyContractBroken
from agentmem.memory.pinning import promote, settle
from agentmem.memory.torch_state import own_state
from agentmem.planning.pricing import read_bytes, result_bytes
from agentmem.reporting import log_events
from agentmem.reporting.report import CompactionReport, LayerReport, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentmem.contracts import Compactor, Reference
    from agentmem.memory.forwards import Forwards
    from agentmem.memory.jobs import Job, Slots
    from agentmem.memory.memory import Memory
    from agentmem.memory.sequence import TokenSequence
    from agentmem.memory.store import LayerStore

ATTEMPTS = 2


class SequenceCompaction:
    """Compact one sequence of a memory to its target, and turn the freed bytes into free slots (headroom)."""

    def __init__(self, memory: Memory, forwards: Forwards, sequence: TokenSequence, request: Request = USUAL) -> None:
        """Prepare the compaction; compact nothing yet.

        Pinned slots are moved to the front. If the sequence has an unfinished compaction, its job is resumed instead of
        making a job from ``request``.
        """
        self.memory, self.sequence, self.plan = memory, sequence, memory.plan_of(request.policy or memory.policy)
        self.forwards, self.request = forwards, request
        promote(memory, sequence)
        self.job = sequence.job or self._job(request)
        self.references = References(memory, forwards, sequence, self.job)
        self.held_out = HeldOut()
        self.layers: dict[int, LayerReport] = {}
        self.faults: list[str] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.outcome: Outcome = "compacted"

    def _job(self, request: Request) -> Job:
        policy = request.policy or self.memory.policy
        return make_job(self.sequence, request, policy, self.plan, [index for index, _ in self.sequence.full()])

    @property
    def worthwhile(self) -> bool:
        """Return true if a compaction is unfinished, or if this compaction would remove slots from the segments."""
        held = [slots for index, store in self.sequence.full() for slots in self.job.held(index, store)]
        compacts = self.job.policy.compactor is not None
        return self.sequence.job is not None or (compacts and sum(held) > self.job.each * len(held))

    def run(self) -> CompactionReport:
        """Run the compaction and return its report.

        Raises:
            CompactionFailed: a layer, or a step before the first layer, failed twice and ``on_failure`` is not
                ``evict``; the memory is valid, and the next attempt resumes the compaction.
            PolicyContractBroken: the policy returned a value that its contract forbids.

        """
        memory, sequence, policy = self.memory, self.sequence, self.job.policy
        began, slots, resident = time.perf_counter(), sequence.held, memory.ledger.resident
        log_events.compaction_started(
            memory.names, row=sequence.index, policy=policy.name, tokens_seen=sequence.seen, slots=slots
        )
        outside = memory.ledger.outside() if policy.queries.outside_cap else nullcontext()
        with own_state(), torch.no_grad(), memory.ledger.watch() as peak, outside:
            self._rewrite()
            if self._prepared():
                self._compact_layers()
            else:
                self._evict_layers()
            with self._stage("headroom"):
                self._give_headroom()
        seconds = time.perf_counter() - began
        self.seconds["probe"] = max(0.0, seconds - sum(self.seconds.values()))
        report = CompactionReport(
            index=len(memory.compactions),
            row=sequence.index,
            policy=policy.name,
            tokens_seen=sequence.seen,
            slots_before=slots,
            slots_after=sequence.held,
            bytes_before=resident,
            bytes_after=memory.ledger.resident,
            bytes_peak=peak[0],
            queries=str(self.references.queries),
            outside_cap=policy.queries.outside_cap,
            probe_tokens=len(self.references.probe.ids),
            seconds=seconds,
            seconds_by_stage=dict(self.seconds),
            layers=tuple(self.layers[index] for index in sorted(self.layers)),
            faults=tuple(self.faults),
            summary=sequence.state.summary,
            worst_spans=self.held_out.worst_spans(),
        )
        self._finish(report)
        return report

    def _rewrite(self) -> None:
        """Replace the segment by a summary if the policy asks for one; if that fails, compact without a summary."""
        rewrite, language = self.job.policy.rewrite, self.memory.language
        if rewrite is None or language is None or not self.job.whole or self.sequence.job is not None:
            return
        try:
            with self._stage("summary"):
                request = Rewriting(self.memory, self.forwards, self.sequence, self.job, rewrite, language).run()
            self.job = self._job(replace(request, policy=self.job.policy, focus=self.job.focus))
        except SummaryRefused as refused:
            self._note_fault(None, refused, "matching instead")
        except Exception as error:  # noqa: BLE001  # an error in a forward must not damage the memory
            traceback.clear_frames(error.__traceback__)
            self._note_fault(None, error, "matching instead")
            self.job = self.sequence.state.job or self._job(self.request)
        self.references = References(self.memory, self.forwards, self.sequence, self.job)

    def _prepared(self) -> bool:
        """Choose the probe's text and allocate the budgets; return true if this succeeded within two attempts.

        After two failures, set equal budgets for eviction and return false if ``on_failure`` is ``evict``; otherwise
        raise CompactionFailed.
        """
        for attempt in range(ATTEMPTS):
            try:
                with self._stage("probe text"):
                    self.references.prepare()
                if self.sequence.job is None:
                    self._begin(self._allocator().allocate(self.references, lambda: self._stage("survey")))
            except PolicyContractBroken:
                raise
            except Exception as error:  # noqa: BLE001  # an error in a policy or a probe must not damage the memory
                traceback.clear_frames(error.__traceback__)
                fault = error
                self._note_fault(None, error, self._remedy(attempt))
            else:
                return True
        if self.memory.settings.on_failure != "evict":
            self._fail(None, fault)
        if self.sequence.job is None:
            self._begin(self._allocator().equal())
        return False

    def _begin(self, budgets: Slots) -> None:
        """Begin the compaction: store the job with its budgets in the sequence, and mark older tokens as compacted.

        After an interrupt, the stored job is resumed until it is finished. Only the tokens of the recent window still
        count as intact (never compacted).
        """
        self.job = replace(self.job, budgets=budgets)
        self.sequence.change(job=self.job, intact=self.sequence.seen - self.job.recent)

    def _allocator(self) -> BudgetAllocator:
        def segment(layer: int, references: tuple[Reference, ...]) -> Segment:
            store = self.sequence.stores[layer]
            assert store is not None  # noqa: S101  # only layers with stores are allocated for
            return self._segment(layer, store, references)

        held = {index: self.job.held(index, store) for index, store in self.sequence.full()}
        return BudgetAllocator(self.job, held, self.memory.ledger, segment)

    @property
    def _compactor(self) -> Compactor:
        assert self.job.policy.compactor is not None  # noqa: S101  # make_room refuses policies that never compact
        return self.job.policy.compactor

    # ---- layers

    def _todo(self) -> list[int]:
        """Return the layers in which some head's segment still holds more slots than its budget."""
        job = self.job
        return [
            index
            for index, store in self.sequence.full()
            if any(held > kept for held, kept in zip(job.held(index, store), job.budgets[index], strict=True))
        ]

    def _compact_layers(self) -> None:
        fault: Exception | None = None
        for attempt in range(ATTEMPTS):
            todo = self._todo()
            if not todo:
                return
            try:
                self.outcome = "compacted" if attempt == 0 else "retried"
                self.references.each(todo, self._compact_layer, self.memory.boundary)
            except PolicyContractBroken:
                raise
            except Exception as error:  # noqa: BLE001  # an error in a policy or a probe must not damage the memory
                traceback.clear_frames(error.__traceback__)  # its frames hold views of stores that will be freed
                fault = error
                self._note_fault((self._todo() or todo[-1:])[0], error, self._remedy(attempt))
        todo = self._todo()
        if todo and self.memory.settings.on_failure != "evict" and fault is not None:
            self._fail(todo[0], fault)
        self._evict_layers()

    def _evict_layers(self) -> None:
        for layer in self._todo():
            self._evict_layer(layer)

    def _compact_layer(self, layer: int, references: tuple[Reference, ...]) -> None:
        store = self.sequence.stores[layer]
        assert store is not None  # noqa: S101  # _todo lists such layers only
        ledger, shape = self.memory.ledger, self._shape(layer, store, references)
        with ledger.borrow(self._fit_bytes(layer, shape), "the policy's workspace"):
            compaction = self._fit(layer, store, references)
        result = max(self.plan.result_bytes, result_bytes(self._compactor, shape))
        with ledger.borrow(result, "the slots that stay"):
            errors = self._check(layer, store, references, compaction)
            self._commit(layer, store, compaction, errors)

    def _shape(self, layer: int, store: LayerStore, references: Sequence[Reference]) -> SegmentShape:
        shape = self.memory.shape.layers[layer]
        return SegmentShape(
            heads=shape.kv_heads,
            group=shape.group,
            slots=max(1, *self.job.held(layer, store)),
            budget=max(1, *self.job.budgets[layer]),
            queries=sum(each.tokens for each in references),
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
            itemsize=store.spec.dtype.itemsize,
        )

    def _fit_bytes(self, layer: int, segment: SegmentShape) -> int:
        """Return the temporary bytes to reserve for fitting one layer: as many as planned, or more if needed.

        More are needed if a head holds many more slots than an equal share.
        """
        compactor = self._compactor
        copied = read_bytes(self.memory.shape.layers[layer], compactor, segment.slots, segment.itemsize)
        return max(self.plan.fit_bytes, compactor.workspace(segment)) + max(self.plan.copy_bytes, copied)

    def _fit(self, layer: int, store: LayerStore, references: tuple[Reference, ...]) -> Compaction:
        """Fit one layer with the policy's compactor, and validate the result.

        This is a separate method so that no view of the old store outlives the call.
        """
        _, fitted = split_references(references)
        segment = self._segment(layer, store, fitted if self._compactor.fits else references)
        slots = [min(kept, head.slots) for kept, head in zip(self.job.budgets[layer], segment.heads, strict=True)]
        with self._stage("fit"):
            compaction = self._compactor.compact(segment, slots)
            validate(compaction, segment, slots, policy=self.job.policy.name)
        return compaction

    def _check(
        self, layer: int, store: LayerStore, references: tuple[Reference, ...], compaction: Compaction
    ) -> Errors:
        """Measure a layer's held-out errors; separate from other methods for the same reason as :meth:`_fit`."""
        held_out, _ = split_references(references)
        with self._stage("check"), self.memory.ledger.borrow(self.plan.check_bytes, "held-out errors"):
            return self.held_out.measure(
                self._segment(layer, store, held_out), compaction, held_out, store.spec.rounded
            )

    def _evict_layer(self, layer: int) -> None:
        store, budgets = self.sequence.stores[layer], self.job.budgets
        assert store is not None  # noqa: S101  # _todo lists such layers only
        self.outcome = "evicted"
        settle(self.sequence, store)
        held = self.job.held(layer, store)
        with self.memory.ledger.borrow(self.plan.result_bytes, "the slots that stay"):
            kept = [
                torch.arange(count - min(slots, count), count, device=store.spec.device)
                for slots, count in zip(budgets[layer], held, strict=True)
            ]
            self._commit(layer, store, Compaction(tuple(HeadCompaction(each) for each in kept)), (None, None))

    def _commit(self, layer: int, store: LayerStore, compaction: Compaction, errors: Errors) -> None:
        with self._stage("commit"):
            replacement = store.compacted(compaction, self.job.begins[layer], self.job.recent, self._headroom())
            self.sequence.replace(layer, replacement)
        bias_min, bias_max = replacement.bias_range()
        self.layers[layer] = LayerReport(
            layer=layer,
            slots_before=sum(store.lengths),
            slots_after=sum(replacement.lengths),
            output_error=errors[0],
            log_mass_error=errors[1],
            bias_min=bias_min,
            bias_max=bias_max,
            condition=compaction.numerics.condition,
            fallbacks=compaction.numerics.fallbacks,
            outcome=self.outcome,
        )

    def _segment(self, layer: int, store: LayerStore, references: tuple[Reference, ...]) -> Segment:
        settle(self.sequence, store)
        return Segment(
            layer=layer,
            heads=tuple(
                store.segment(head, begin, self.job.recent) for head, begin in enumerate(self.job.begins[layer])
            ),
            references=references,
            scale=self.memory.scales[layer],
            generator=self.sequence.generator,
            workspace_bytes=self.plan.fit_bytes,
        )

    # ---- headroom

    def _headroom(self) -> int:
        """Return the number of free slots that every head gets once all layers are compacted to their budgets.

        The number is as large as the plan allows: the held and free slots of all heads together take at most the bytes
        of ``plan.capacity`` slots in each head.
        """
        price = kept = 0
        for index, store in self.sequence.full():
            begins, budgets = self.job.begins[index], self.job.budgets[index]
            ends = (begin + budget + self.job.recent for begin, budget in zip(begins, budgets, strict=True))
            price += len(store.lengths) * store.spec.slot_bytes
            kept += store.spec.slot_bytes * sum(map(min, store.lengths, ends))
        return (self.plan.capacity * price - kept) // price

    def _give_headroom(self) -> None:
        """Give headroom (free slots) to each layer that did not get it with its commit."""
        headroom = self._headroom()
        for index, store in self.sequence.full():
            settle(self.sequence, store)  # layers without a commit lack positions, and the tail is reset below
            capacities = [length + headroom for length in store.lengths]
            if tuple(capacities) != store.capacities:
                self.sequence.replace(index, store.resized(capacities))

    def _finish(self, report: CompactionReport) -> None:
        """Finish the compaction in one assignment: the sequence counts it and has its report, or neither."""
        room = min((store.room for _, store in self.sequence.full()), default=0) - self.memory.plan.scratch
        self.sequence.change(
            job=None,
            intact=self.sequence.seen - self.job.recent,
            compactions=self.sequence.compactions + 1,
            headroom_at=self.sequence.seen,
            tail=array("i"),
            full_at=self.sequence.seen + room,  # by the plan of the memory's own policy, whichever policy compacted
            summary=None,
            report=report,
        )

    # ---- faults and time

    def _note_fault(self, layer: int | None, error: Exception, remedy: str) -> None:
        self.faults.append(f"{_place(layer)}: {type(error).__name__}: {error} ({remedy})")
        log_events.compaction_fault(
            self.memory.names,
            row=self.sequence.index,
            layer=layer,
            policy=self.job.policy.name,
            error=repr(error),
            remedy=remedy,
        )

    def _remedy(self, attempt: int) -> str:
        if self.sequence.job is not None and not self._todo():  # a probe can fail after its last layer
            return "every layer was done"
        if attempt + 1 < ATTEMPTS:
            return "tried again"
        return "evicted to budget" if self.memory.settings.on_failure == "evict" else "raised"

    def _fail(self, layer: int | None, fault: Exception) -> None:
        where = _place(layer) if layer is None else f"at {_place(layer)}"
        message = (
            f"policy {self.job.policy.name!r} failed {ATTEMPTS} times {where} "
            f"({type(fault).__name__}: {fault}); on_failure={self.memory.settings.on_failure!r}: the memory is valid "
            "with the layers before it compacted, and the next forward tries again; on_failure='evict' would go on"
        )
        if self.memory.settings.on_failure == "stop":
            self.memory.stopped = message
        raise CompactionFailed(message) from fault

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began


def _place(layer: int | None) -> str:
    return "before the first layer" if layer is None else f"layer {layer}"
