"""One compaction of one row: budgets, then layer by layer fit → check → commit, then headroom.

State *k* of a compaction is "layers before k compacted"; a commit swaps one store for another, so every state decodes
correctly and an interrupted compaction goes on where it was. Failed layers are tried once more, then evicted to their
budgets (or the failure is raised), and the report says so.
"""

from __future__ import annotations

import time
import traceback
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from agentmem import events
from agentmem.attention import local
from agentmem.budget import HELD_OUT
from agentmem.contract_check import validate
from agentmem.contracts import BudgetRequest, Compaction, HeadCompaction, Segment, SegmentShape, Survey
from agentmem.errors import CompactionFailed, PolicyContractBroken
from agentmem.report import CompactionReport, LayerReport, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from agentmem.arena import LayerStore
    from agentmem.contracts import Budgets, Compactor
    from agentmem.memory import Memory
    from agentmem.row import Row

ATTEMPTS = 2

Errors = tuple[float | None, float | None]
"""Of the output and of the log-mass, on held-out queries."""


class RowCompaction:
    """Compacts one row of a memory to its target and deals the freed slots out as headroom."""

    def __init__(self, memory: Memory, row: Row) -> None:
        """Nothing is changed yet."""
        self.memory, self.row, self.plan = memory, row, memory.plan
        self.prefix = min(self.plan.prefix, row.seen)
        self.recent = min(self.plan.recent, row.seen - self.prefix)
        self.layers: dict[int, LayerReport] = {}
        self.faults: list[str] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.outcome: Outcome = "compacted"

    @property
    def worthwhile(self) -> bool:
        """Whether a begun compaction is to be finished, or some head holds more than the target."""
        target = self.plan.target
        held = [max(store.lengths) for _, store in self._stores()]
        compacts = self.memory.policy.compactor is not None
        return self.row.budgets is not None or (compacts and max(held, default=0) > target)

    def run(self) -> CompactionReport:
        """Do it.

        Raises:
            CompactionFailed: a layer failed twice and ``on_failure`` is not ``evict``; the memory is valid, and the
                compaction goes on at the next attempt.
            PolicyContractBroken: the policy returned something that its contract forbids.

        """
        memory, row = self.memory, self.row
        began, slots, resident = time.perf_counter(), row.held, memory.ledger.resident
        events.compaction_started(row=row.index, policy=memory.policy.name, tokens_seen=row.seen, slots=slots)
        with torch.no_grad(), memory.ledger.watch() as peak:
            if row.budgets is None:
                row.budgets = self._budgets()
            self._compact_layers()
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
            probe_tokens=self.plan.probe_tokens,
            seconds=seconds,
            seconds_by_stage=dict(self.seconds),
            layers=tuple(self.layers[index] for index in sorted(self.layers)),
            faults=tuple(self.faults),
        )

    # ---- budgets

    def _budgets(self) -> tuple[tuple[int, ...], ...]:
        """Segment slots per compactable layer and head, indexed like the model's layers (sliding ones are empty)."""
        stores = self._stores()
        held = tuple(tuple(max(0, n - self.prefix - self.recent) for n in store.lengths) for _, store in stores)
        each = max(0, self.plan.target - self.prefix - self.recent)
        request = BudgetRequest(held, each * sum(map(len, held)), 1, self._surveys())
        budgets = self._policy_budgets.deal(request)
        check_budgets(self.memory.policy.name, request, budgets)
        dealt = dict(zip((index for index, _ in stores), budgets, strict=True))
        return tuple(tuple(dealt.get(index, ())) for index in range(len(self.memory.shape.layers)))

    def _surveys(self) -> tuple[Survey, ...]:
        if not self._policy_budgets.needs_survey:
            return ()
        surveys: dict[int, Survey] = {}

        def visit(layer: int, reference: torch.Tensor | None) -> None:
            store = self.row.stores[layer]
            if store is not None:
                with self.memory.ledger.borrow(self.plan.fit_bytes, "survey"):
                    surveys[layer] = self._compactor.survey(self._segment(layer, store, reference))

        self._with_references([index for index, _ in self._stores()], visit)
        return tuple(surveys[index] for index in sorted(surveys))

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
        pinned = self.prefix + self.recent
        return [
            index
            for index, store in self._stores()
            if any(held - pinned > kept for held, kept in zip(store.lengths, budgets[index], strict=True))
        ]

    def _compact_layers(self) -> None:
        fault: Exception | None = None
        for attempt in range(ATTEMPTS):
            todo = self._todo()
            if not todo:
                return
            try:
                self.outcome = "compacted" if attempt == 0 else "retried"
                self._with_references(todo, self._compact_layer)
            except PolicyContractBroken:
                raise
            except Exception as error:  # noqa: BLE001  # whatever a policy or a probe raises must not cost the memory
                traceback.clear_frames(error.__traceback__)  # they hold views into stores that are about to go
                fault = error
                self._note_fault((self._todo() or todo[-1:])[0], error, self._remedy(attempt))
        for layer in self._todo():
            if self.memory.settings.on_failure != "evict" and fault is not None:
                self._fail(layer, fault)
            self._evict_layer(layer)

    def _with_references(self, todo: Sequence[int], visit: Callable[[int, torch.Tensor | None], None]) -> None:
        """Call ``visit(layer, reference queries)`` for the layers in order."""
        queries = self.memory.policy.queries
        if queries.probes:
            wanted = set(todo)

            def on_layer(layer: int, asked: torch.Tensor) -> None:
                if layer in wanted:
                    visit(layer, asked)

            self.memory.probe(self.row, on_layer)
            return
        for layer in todo:
            sample = self.row.live[layer]
            visit(layer, None if sample is None else sample.sample())

    def _compact_layer(self, layer: int, reference: torch.Tensor | None) -> None:
        store = self.row.stores[layer]
        assert store is not None  # noqa: S101  # _todo lists such layers only
        with self.memory.ledger.borrow(self._fit_bytes(layer, store, reference), "the policy's workspace"):
            compaction, errors = self._fit(layer, store, reference)
            self._commit(layer, store, compaction, errors)

    def _fit_bytes(self, layer: int, store: LayerStore, reference: torch.Tensor | None) -> int:
        """The workspace of this very segment: heads that hold more than an equal share may need more than planned."""
        assert self.row.budgets is not None  # noqa: S101  # dealt before the first layer
        shape, pinned = self.memory.shape.layers[layer], self.prefix + self.recent
        segment = SegmentShape(
            heads=shape.kv_heads,
            group=shape.group,
            slots=max(1, max(store.lengths) - pinned),
            budget=max(1, *self.row.budgets[layer]),
            queries=0 if reference is None else reference.shape[1] - reference.shape[1] // HELD_OUT,
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
            itemsize=store.spec.dtype.itemsize,
        )
        return max(self.plan.fit_bytes, self._compactor.workspace(segment))

    def _fit(self, layer: int, store: LayerStore, reference: torch.Tensor | None) -> tuple[Compaction, Errors]:
        """A function of its own, so that no view into the old store outlives it."""
        assert self.row.budgets is not None  # noqa: S101  # dealt before the first layer
        held_out, fitted = split_reference(reference)
        segment = self._segment(layer, store, fitted)
        slots = [min(kept, head.slots) for kept, head in zip(self.row.budgets[layer], segment.heads, strict=True)]
        with self._stage("fit"):
            compaction = self._compactor.compact(segment, slots)
            validate(compaction, segment, slots, policy=self.memory.policy.name)
        with self._stage("check"), self.memory.ledger.borrow(self.plan.check_bytes, "held-out errors"):
            return compaction, held_out_errors(segment, compaction, held_out)

    def _evict_layer(self, layer: int) -> None:
        store, budgets = self.row.stores[layer], self.row.budgets
        assert store is not None and budgets is not None  # noqa: S101, PT018  # _todo lists such layers only
        self.outcome = "evicted"
        self._settle(store)
        held = [max(0, length - self.prefix - self.recent) for length in store.lengths]
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

    def _segment(self, layer: int, store: LayerStore, reference: torch.Tensor | None) -> Segment:
        self._settle(store)
        shape = self.memory.shape.layers[layer]
        return Segment(
            layer=layer,
            heads=tuple(store.segment(head, self.prefix, self.recent) for head in range(shape.kv_heads)),
            reference=reference,
            scale=self.memory.scales[layer],
            generator=self.memory.generator,
            workspace_bytes=self.plan.fit_bytes,
        )

    def _settle(self, store: LayerStore) -> None:
        store.settle(torch.frombuffer(self.row.tail, dtype=torch.int32) if self.row.tail else torch.empty(0))

    # ---- headroom

    def _headroom(self) -> int:
        """Free slots for every head alike once all layers keep their budgets: as many as the share of R pays for."""
        assert self.row.budgets is not None  # noqa: S101  # dealt before the first layer
        price = kept = 0
        pinned = self.prefix + self.recent
        for index, store in self._stores():
            budgets = self.row.budgets[index]
            price += len(store.lengths) * store.spec.slot_bytes
            kept += store.spec.slot_bytes * sum(map(min, store.lengths, (pinned + budget for budget in budgets)))
        return (self.plan.capacity * price - kept) // price

    def _deal(self) -> None:
        """Give the headroom to the layers that could not get it when they were committed."""
        headroom = self._headroom()
        for index, store in self._stores():
            capacities = [length + headroom for length in store.lengths]
            if tuple(capacities) != store.capacities:
                self.row.stores[index] = store.resized(capacities)
                store.free()
        self.row.budgets = None
        self.row.dealt_at = self.row.seen
        self.row.tail = type(self.row.tail)("i")
        self.row.recount(self.plan.capacity)

    # ---- faults and time

    def _note_fault(self, layer: int, error: Exception, remedy: str) -> None:
        self.faults.append(f"layer {layer}: {type(error).__name__}: {error} ({remedy})")
        events.compaction_fault(
            row=self.row.index, layer=layer, policy=self.memory.policy.name, error=repr(error), remedy=remedy
        )

    def _remedy(self, attempt: int) -> str:
        if not self._todo():  # a probe can fail behind its last layer
            return "every layer was done"
        if attempt + 1 < ATTEMPTS:
            return "tried again"
        return "evicted to budget" if self.memory.settings.on_failure == "evict" else "raised"

    def _fail(self, layer: int, fault: Exception) -> None:
        message = (
            f"policy {self.memory.policy.name!r} failed {ATTEMPTS} times at layer {layer} "
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


def split_reference(reference: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Held-out and fitting queries, both views: the oldest part of the reference tokens is held out."""
    if reference is None:
        return None, None
    held = reference.shape[1] // HELD_OUT
    return reference[:, :held], reference[:, held:]


def held_out_errors(segment: Segment, compaction: Compaction, held_out: torch.Tensor | None) -> Errors:
    """Relative L2 error of the local output and mean absolute log-mass error, over all heads of a layer."""
    if held_out is None or not held_out.shape[1]:
        return None, None
    group = held_out.shape[0] // len(segment.heads)
    missed = total = mass = 0.0
    for index, (head, fit) in enumerate(zip(segment.heads, compaction.heads, strict=True)):
        queries = held_out[index * group : (index + 1) * group]
        output, log_mass = local(queries, head.keys, head.values, head.bias, segment.scale)
        keys = head.keys[fit.kept] if fit.keys is None else fit.keys.to(head.keys.dtype)
        values = head.values[fit.kept] if fit.values is None else fit.values.to(head.values.dtype)
        bias = head.bias[fit.kept] if fit.bias is None else fit.bias
        fitted, fitted_mass = local(queries, keys, values, bias, segment.scale)
        missed += float((fitted - output).square().sum())
        total += float(output.square().sum())
        mass += float((fitted_mass - log_mass).abs().mean())
    return (missed / total) ** 0.5 if total else 0.0, mass / len(segment.heads)


def check_budgets(policy: str, request: BudgetRequest, budgets: tuple[tuple[int, ...], ...]) -> None:
    """Refuse budgets that break the laws of :class:`agentmem.contracts.Budgets`.

    Raises:
        PolicyContractBroken: names the policy, the law and the value.

    """
    if [len(layer) for layer in budgets] != [len(layer) for layer in request.held]:
        raise PolicyContractBroken(f"policy {policy!r}: budgets {budgets!r} have not the shape of {request.held!r}")
    pairs = [pair for held, kept in zip(request.held, budgets, strict=True) for pair in zip(held, kept, strict=True)]
    if any(not 0 <= kept <= held for held, kept in pairs):
        raise PolicyContractBroken(
            f"policy {policy!r}: a head's budget lies outside 0..held: {budgets!r} of {request.held!r}"
        )
    wanted = min(request.total, sum(held for held, _ in pairs))
    if sum(kept for _, kept in pairs) != wanted:
        raise PolicyContractBroken(
            f"policy {policy!r}: budgets sum to {sum(kept for _, kept in pairs)} slots instead of {wanted}"
        )
