"""One compaction of one row: budgets, then layer by layer fit → check → commit, then headroom.

State *k* of a compaction is "layers before k compacted"; a commit swaps one store for another, so every state decodes
correctly and an interrupted compaction goes on where it was. Failed layers are tried once more, then evicted to their
budgets (or the failure is raised), and the report says so.
"""

from __future__ import annotations

import time
import traceback
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from agentmem import events
from agentmem.contract_check import validate
from agentmem.contracts import BudgetRequest, Compaction, HeadCompaction, Segment, SegmentShape, Survey
from agentmem.dealing import Slots, check_budgets, equal_shares, make_request
from agentmem.errors import CompactionFailed, PolicyContractBroken
from agentmem.held_out import Errors, HeldOut, error_curves, split_references
from agentmem.references import References
from agentmem.report import CompactionReport, LayerReport, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentmem.arena import LayerStore
    from agentmem.contracts import Budgets, Compactor, Reference
    from agentmem.memory import Memory
    from agentmem.row import Row

ATTEMPTS = 2


class RowCompaction:
    """Compacts one row of a memory to its target and deals the freed slots out as headroom."""

    def __init__(self, memory: Memory, row: Row) -> None:
        """Nothing is changed yet."""
        self.memory, self.row, self.plan = memory, row, memory.plan
        self.prefix = min(self.plan.prefix, row.seen)
        self.recent = min(self.plan.recent, row.seen - self.prefix)
        self.pinned = self.prefix + self.recent
        self.references = References(memory, row)
        self.held_out = HeldOut()
        self.layers: dict[int, LayerReport] = {}
        self.faults: list[str] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.outcome: Outcome = "compacted"

    @property
    def worthwhile(self) -> bool:
        """Whether a begun compaction is to be finished, or the heads hold more than the target on average."""
        lengths = [length for _, store in self._stores() for length in store.lengths]
        compacts = self.memory.policy.compactor is not None
        return self.row.budgets is not None or (compacts and sum(lengths) > self.plan.target * len(lengths))

    def run(self) -> CompactionReport:
        """Do it.

        Raises:
            CompactionFailed: a layer, or what comes before the first, failed twice and ``on_failure`` is not ``evict``;
                the memory is valid, and the compaction goes on at the next attempt.
            PolicyContractBroken: the policy returned something that its contract forbids.

        """
        memory, row = self.memory, self.row
        began, slots, resident = time.perf_counter(), row.held, memory.ledger.resident
        events.compaction_started(row=row.index, policy=memory.policy.name, tokens_seen=row.seen, slots=slots)
        outside = memory.ledger.outside() if memory.policy.queries.outside_cap else nullcontext()
        with torch.no_grad(), memory.ledger.watch() as peak, outside:
            if self._prepared():
                self._compact_layers()
            else:
                self._evict_layers()
            with self._stage("deal"):
                self._deal()
        seconds = time.perf_counter() - began
        self.seconds["probe"] = max(0.0, seconds - sum(self.seconds.values()))
        return CompactionReport(
            index=len(memory.compactions),
            row=row.index,
            policy=memory.policy.name,
            tokens_seen=row.seen,
            slots_before=slots,
            slots_after=row.held,
            bytes_before=resident,
            bytes_after=memory.ledger.resident,
            bytes_peak=peak[0],
            queries=str(memory.policy.queries),
            outside_cap=memory.policy.queries.outside_cap,
            probe_tokens=len(self.references.probe.ids),
            seconds=seconds,
            seconds_by_stage=dict(self.seconds),
            layers=tuple(self.layers[index] for index in sorted(self.layers)),
            faults=tuple(self.faults),
            worst_spans=self.held_out.worst_spans(),
        )

    def _prepared(self) -> bool:
        """Find the probe's text and the budgets; ``False`` after two faults, with equal budgets to evict to."""
        for attempt in range(ATTEMPTS):
            try:
                with self._stage("probe text"):
                    self.references.prepare()
                if self.row.budgets is None:
                    self.row.budgets = self._budgets()
            except PolicyContractBroken:
                raise
            except Exception as error:  # noqa: BLE001  # whatever a policy or a probe raises must not cost the memory
                traceback.clear_frames(error.__traceback__)
                fault = error
                self._note_fault(None, error, self._remedy(attempt))
            else:
                return True
        if self.memory.settings.on_failure != "evict":
            self._fail(None, fault)
        if self.row.budgets is None:
            self.row.budgets = self._by_layer(equal_shares(self._request(())))
        return False

    # ---- budgets

    def _budgets(self) -> tuple[tuple[int, ...], ...]:
        """Segment slots per compactable layer and head, indexed like the model's layers (sliding ones are empty)."""
        with self.memory.ledger.borrow(self.plan.survey_bytes, "scores of all layers"):
            request = self._request(self._surveys())
            budgets = self._policy_budgets.deal(request)
        check_budgets(self.memory.policy.name, self._policy_budgets, request, budgets)
        return self._by_layer(budgets)

    def _request(self, surveys: tuple[Survey, ...]) -> BudgetRequest:
        return make_request(self.plan, [store.lengths for _, store in self._stores()], self.pinned, surveys)

    def _by_layer(self, budgets: Slots) -> Slots:
        """Budgets of the compactable layers, indexed like the model's layers."""
        dealt = dict(zip((index for index, _ in self._stores()), budgets, strict=True))
        return tuple(tuple(dealt.get(index, ())) for index in range(len(self.memory.shape.layers)))

    def _surveys(self) -> tuple[Survey, ...]:
        budgets = self._policy_budgets
        if not (budgets.needs_survey or budgets.needs_curves):
            return ()
        surveys: dict[int, Survey] = {}

        def visit(layer: int, references: tuple[Reference, ...]) -> None:
            with self.memory.ledger.borrow(self.plan.fit_bytes + self.plan.check_bytes, "survey"):
                surveys[layer] = self._survey(layer, references)

        with self._stage("survey"):
            self.references.each([index for index, _ in self._stores()], visit)
        return tuple(surveys[index] for index in sorted(surveys))

    def _survey(self, layer: int, references: tuple[Reference, ...]) -> Survey:
        """Scores by all queries; curves by the errors on those that their fits have not seen."""
        store, budgets = self.row.stores[layer], self._policy_budgets
        assert store is not None  # noqa: S101  # only layers with stores are visited
        survey = Survey(layer)
        if budgets.needs_survey:
            survey = self._compactor.survey(self._segment(layer, store, references))
        if budgets.needs_curves:
            held, fitted = split_references(references)
            segment = self._segment(layer, store, fitted)
            curves = error_curves(self._compactor, segment, held, self.plan.most_budget)
            survey = replace(survey, curves=curves)
        return survey

    @property
    def _compactor(self) -> Compactor:
        compactor = self.memory.policy.compactor
        assert compactor is not None  # noqa: S101  # make_room refuses policies that never compact
        return compactor

    @property
    def _policy_budgets(self) -> Budgets:
        budgets = self.memory.policy.budgets
        assert budgets is not None  # noqa: S101  # comes with the compactor, by Policy.__post_init__
        return budgets

    # ---- layers

    def _stores(self) -> list[tuple[int, LayerStore]]:
        return [
            (index, store) for index in self.memory.shape.compactable if (store := self.row.stores[index]) is not None
        ]

    def _todo(self) -> list[int]:
        """Compactable layers of which some head still holds more than its budget."""
        budgets = self.row.budgets or ()
        return [
            index
            for index, store in self._stores()
            if any(held - self.pinned > kept for held, kept in zip(store.lengths, budgets[index], strict=True))
        ]

    def _compact_layers(self) -> None:
        fault: Exception | None = None
        for attempt in range(ATTEMPTS):
            todo = self._todo()
            if not todo:
                return
            try:
                self.outcome = "compacted" if attempt == 0 else "retried"
                self.references.each(todo, self._compact_layer)
            except PolicyContractBroken:
                raise
            except Exception as error:  # noqa: BLE001  # whatever a policy or a probe raises must not cost the memory
                traceback.clear_frames(error.__traceback__)  # they hold views into stores that are about to go
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
        store = self.row.stores[layer]
        assert store is not None  # noqa: S101  # _todo lists such layers only
        with self.memory.ledger.borrow(self._fit_bytes(layer, store, references), "the policy's workspace"):
            compaction, errors = self._fit(layer, store, references)
            self._commit(layer, store, compaction, errors)

    def _fit_bytes(self, layer: int, store: LayerStore, references: Sequence[Reference]) -> int:
        """The workspace of this very segment: heads that hold more than an equal share may need more than planned."""
        assert self.row.budgets is not None  # noqa: S101  # dealt before the first layer
        shape = self.memory.shape.layers[layer]
        segment = SegmentShape(
            heads=shape.kv_heads,
            group=shape.group,
            slots=max(1, max(store.lengths) - self.pinned),
            budget=max(1, *self.row.budgets[layer]),
            queries=sum(each.tokens for each in references),
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
            itemsize=store.spec.dtype.itemsize,
        )
        return max(self.plan.fit_bytes, self._compactor.workspace(segment))

    def _fit(self, layer: int, store: LayerStore, references: tuple[Reference, ...]) -> tuple[Compaction, Errors]:
        """A function of its own, so that no view into the old store outlives it."""
        assert self.row.budgets is not None  # noqa: S101  # dealt before the first layer
        held_out, fitted = split_references(references)
        segment = self._segment(layer, store, fitted if self._compactor.fits else references)
        slots = [min(kept, head.slots) for kept, head in zip(self.row.budgets[layer], segment.heads, strict=True)]
        with self._stage("fit"):
            compaction = self._compactor.compact(segment, slots)
            validate(compaction, segment, slots, policy=self.memory.policy.name)
        with self._stage("check"), self.memory.ledger.borrow(self.plan.check_bytes, "held-out errors"):
            return compaction, self.held_out.measure(segment, compaction, held_out)

    def _evict_layer(self, layer: int) -> None:
        store, budgets = self.row.stores[layer], self.row.budgets
        assert store is not None and budgets is not None  # noqa: S101, PT018  # _todo lists such layers only
        self.outcome = "evicted"
        self._settle(store)
        held = [max(0, length - self.pinned) for length in store.lengths]
        with self.memory.ledger.borrow(self.plan.fit_bytes, "the slots that stay"):
            kept = [
                torch.arange(count - min(slots, count), count, device=store.spec.device)
                for slots, count in zip(budgets[layer], held, strict=True)
            ]
            self._commit(layer, store, Compaction(tuple(HeadCompaction(each) for each in kept)), (None, None))

    def _commit(self, layer: int, store: LayerStore, compaction: Compaction, errors: Errors) -> None:
        with self._stage("commit"):
            replacement = store.compacted(compaction, self.prefix, self.recent, self._headroom())
            self.row.stores[layer] = replacement
            store.free()
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
        self._settle(store)
        shape = self.memory.shape.layers[layer]
        return Segment(
            layer=layer,
            heads=tuple(store.segment(head, self.prefix, self.recent) for head in range(shape.kv_heads)),
            references=references,
            scale=self.memory.scales[layer],
            generator=self.row.generator,
            workspace_bytes=self.plan.fit_bytes,
        )

    def _settle(self, store: LayerStore) -> None:
        store.settle(torch.frombuffer(self.row.tail, dtype=torch.int32) if self.row.tail else torch.empty(0))

    # ---- headroom

    def _headroom(self) -> int:
        """Free slots for every head alike once all layers keep their budgets: as many as the share of R pays for."""
        assert self.row.budgets is not None  # noqa: S101  # dealt before the first layer
        price = kept = 0
        for index, store in self._stores():
            budgets = self.row.budgets[index]
            price += len(store.lengths) * store.spec.slot_bytes
            kept += store.spec.slot_bytes * sum(map(min, store.lengths, (self.pinned + budget for budget in budgets)))
        return (self.plan.capacity * price - kept) // price

    def _deal(self) -> None:
        """Give the headroom to the layers that could not get it when they were committed."""
        headroom = self._headroom()
        for index, store in self._stores():
            self._settle(store)  # a layer that keeps all was not touched, and the tail is about to go
            capacities = [length + headroom for length in store.lengths]
            if tuple(capacities) != store.capacities:
                self.row.stores[index] = store.resized(capacities)
                store.free()
        self.row.budgets = None
        self.row.compactions += 1
        self.row.dealt_at = self.row.seen
        self.row.tail = type(self.row.tail)("i")
        self.row.recount(self.plan.capacity, self.plan.scratch)

    # ---- faults and time

    def _note_fault(self, layer: int | None, error: Exception, remedy: str) -> None:
        self.faults.append(f"{_place(layer)}: {type(error).__name__}: {error} ({remedy})")
        events.compaction_fault(
            row=self.row.index, layer=layer, policy=self.memory.policy.name, error=repr(error), remedy=remedy
        )

    def _remedy(self, attempt: int) -> str:
        if self.row.budgets is not None and not self._todo():  # a probe can fail behind its last layer
            return "every layer was done"
        if attempt + 1 < ATTEMPTS:
            return "tried again"
        return "evicted to budget" if self.memory.settings.on_failure == "evict" else "raised"

    def _fail(self, layer: int | None, fault: Exception) -> None:
        message = (
            f"policy {self.memory.policy.name!r} failed {ATTEMPTS} times at {_place(layer)} "
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
    return "the probe's text or the budgets" if layer is None else f"layer {layer}"
