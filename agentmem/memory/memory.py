"""The memory: sequences of slots under one cap, with their plans, their ledger and their reports.

A memory does not compact by itself and holds no model: :class:`agentmem.engine.Engine` compacts and runs the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from agentmem.errors import CopyRefused, MemoryClosed, SettingsRefused, UnsupportedGeneration
from agentmem.memory.ledger import Ledger
from agentmem.memory.owner import Owner
from agentmem.memory.reports import Reports
from agentmem.memory.sequence import Consumed, Progress, TokenSequence
from agentmem.planning.capacity import make_plans
from agentmem.reference_queries.patterns import Marks
from agentmem.reporting import log_events
from agentmem.reporting.report import CompactionReport, RebaseReport, RunReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from agentmem.contracts import Policy
    from agentmem.language import Language
    from agentmem.memory.rotation import Positions
    from agentmem.memory.store import LayerStore
    from agentmem.planning.model_shape import ModelShape
    from agentmem.planning.pricing import Plan
    from agentmem.reference_queries.probe import Words
    from agentmem.reference_queries.stored import QuerySample
    from agentmem.settings import Settings


class Usage(NamedTuple):
    """Tokens, slots and bytes of a memory at one moment, summed over its sequences."""

    tokens_seen: int
    total_slots: int
    """Filled slots of all layers and KV heads together; ``capacity`` and other numbers of slots are per head."""
    resident_bytes: int
    used_bytes: int
    peak_bytes: int


Event = CompactionReport | RebaseReport | Usage


class Memory:
    """The slots of all sequences under one cap, with the sequences' tokens, the policies' plans and the reports.

    Raises:
        CapTooSmall: at construction or when sequences are bound; the message names a cap that is large enough.

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
        device: torch.device | None = None,
        positions: Positions | None = None,
    ) -> None:
        """Make the plans for one sequence; :meth:`bind` makes new plans if there are more sequences.

        Args:
            shape: the sizes of the model.
            settings: cap, prefix, recent window and the other settings of a user.
            policy: the policy that compacts unless a single compaction asks for another one.
            extra_policies: the other policies that a single compaction may ask for.
            words: the token ids of the texts that a policy itself supplies, by the policy's name.
            language: converts between text and token ids; needed for patterns and summaries.
            device: the device on which the model computes; the CPU if it is ``None``.
            positions: how many positions the model has and how keys rotate with them; ``None`` means no re-basing.

        """
        self.shape, self.settings, self.policy, self.extra_policies = shape, settings, policy, tuple(extra_policies)
        self.words = dict(words or {})
        self.language, self.positions = language, positions
        self.device = torch.device("cpu") if device is None else device
        self.plan, *self._plans = make_plans(shape, settings, (policy, *self.extra_policies))
        self.ledger = Ledger(settings.cap)
        self._largest_cap = settings.cap
        self.sequences: list[TokenSequence] = []
        self.reports = Reports()
        self.scales = [1.0] * len(shape.layers)
        """The logit scale that the model last used in each layer."""
        self.boundary: Callable[[], None] = unwatched
        """A function that is called before each layer of a compaction; if it raises, the compaction is interrupted."""
        self.stopped: str | None = None
        self._closed = False
        self._subscribers: list[Callable[[Event], None]] = []
        self.progress = Progress()
        """The tokens and positions that the sequences have consumed."""
        self.owner = Owner()
        self.names: Mapping[str, str] = {}
        """Names that the memory's log events have: those of the session and the runtime that use the memory."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise CopyRefused, because a memory cannot be copied by ``copy`` or pickled, nor can what contains one."""
        raise CopyRefused.of(self)

    def empty(self, cap: int | None = None) -> Memory:
        """Return a new memory without tokens that has the model, policies and settings of this memory.

        ``cap`` replaces the cap in bytes, if it is given.
        """
        made = Memory(
            self.shape,
            self._settings(cap or self.settings.cap),
            self.policy,
            extra_policies=self.extra_policies,
            words=self.words,
            language=self.language,
            device=self.device,
            positions=self.positions,
        )
        made.names = self.names
        return made

    # ---- sequences and room

    def bind(self, rows: int) -> None:
        """Create ``rows`` empty sequences, which share the cap. Later calls only check that ``rows`` is unchanged.

        Raises:
            CapTooSmall: the cap is too small for this number of sequences.
            UnsupportedGeneration: the memory already has a different number of sequences.

        """
        if self.sequences:
            if rows != len(self.sequences):
                raise UnsupportedGeneration(
                    f"a batch of {rows} row(s) was given to a memory of {len(self.sequences)}; a memory serves the "
                    "batch it began with: open another one, or repeat the prompt as often as before"
                )
            return
        if rows != self.plan.rows:
            self.plan, *self._plans = make_plans(self.shape, self.settings, (self.policy, *self.extra_policies), rows)
        log_events.memory_planned(
            self.names, cap_bytes=self.plan.cap_bytes, capacity=self.plan.capacity, rows=rows, policy=self.policy.name
        )
        room, layers, seed = self.plan.capacity - self.plan.scratch, len(self.shape.layers), self.settings.seed
        self.progress.consumed = Consumed((0,) * rows, (0,) * rows)
        self.sequences = [TokenSequence(index, layers, room, seed, self.progress) for index in range(rows)]

    def plans_under(self, cap: int) -> tuple[Plan, ...]:
        """Return the plans that the policies would have under another cap in bytes: the memory's own policy's first.

        Raises:
            CapTooSmall: the cap is too small for one of the policies.
            SettingsRefused: the settings contradict each other under this cap.

        """
        policies = (self.policy, *self.extra_policies)
        return make_plans(self.shape, self._settings(cap), policies, max(1, len(self.sequences)))

    def replan(self, plans: Sequence[Plan]) -> None:
        """Replace the plans and the cap by plans that :meth:`plans_under` returned; what is held must fit under them.

        The free slots of the sequences stay as they are; see :func:`agentmem.memory.state.expand`.
        """
        self.plan, *self._plans = plans
        self.settings, self.ledger.cap = self._settings(self.plan.cap_bytes), self.plan.cap_bytes
        self._largest_cap = max(self._largest_cap, self.plan.cap_bytes)

    def _settings(self, cap: int) -> Settings:
        return self.settings if cap == self.settings.cap else self.settings.model_copy(update={"cap": cap})

    def plan_of(self, policy: Policy) -> Plan:
        """Return the plan for compactions by ``policy``, one of the memory's policies."""
        return self.plan if policy is self.policy else self._plans[self.extra_policies.index(policy)]

    def named(self, name: str) -> Policy:
        """Return the policy called ``name``, one of the policies that the memory was opened with.

        Raises:
            SettingsRefused: the memory has no policy of this name.

        """
        found = {policy.name: policy for policy in (*self.extra_policies, self.policy)}
        if name not in found:
            raise SettingsRefused(
                f"policy {name!r}: this memory was planned for {', '.join(map(repr, sorted(found)))}; name it when the "
                "memory is opened (extra_policies=...), so that its workspace is counted"
            )
        return found[name]

    def marks(self, sequence: TokenSequence, pattern: str) -> list[tuple[int, int]]:
        """Return the token spans of a sequence whose text matches ``pattern``; none if the pattern is empty."""
        if not pattern or self.language is None:
            return []
        if pattern not in sequence.marks:
            sequence.marks[pattern] = Marks(pattern, self.language.read)
        return sequence.marks[pattern].spans(sequence.ids)

    @property
    def scored(self) -> bool:
        """True if the memory's policy needs a score for each slot."""
        return self.policy.scores != "none"

    def take_back(self) -> None:
        """Undo a forward that was not committed: its slots, the scores that it added, and its temporary bytes.

        Reports that an interrupt kept from being recorded are recorded.
        """
        self.ledger.recover(self._holders())
        for sequence in self.sequences:
            sequence.take_back()
            self.reports.recover(sequence)

    def _holders(self) -> Iterator[LayerStore | QuerySample | torch.Tensor]:
        for sequence in self.sequences:
            stores = [store for store in sequence.stores if store is not None]
            yield from stores
            yield from (store.earlier.scores for store in stores if store.earlier is not None)
            yield from (sample for layer in sequence.samples for sample in layer)

    # ---- what happened

    def usage(self) -> Usage:
        """Return the memory's current tokens, slots and bytes."""
        stores = [store for sequence in self.sequences for store in sequence.stores if store is not None]
        return Usage(
            tokens_seen=sum(sequence.seen for sequence in self.sequences),
            total_slots=sum(sum(store.lengths) for store in stores),
            resident_bytes=self.ledger.resident,
            used_bytes=sum(store.used_bytes for store in stores),
            peak_bytes=self.ledger.peak,
        )

    def report(self) -> RunReport:
        """Return a report of the memory so far: tokens, slots and bytes, and its compactions and re-basings."""
        compactions = self.compactions
        return RunReport(
            model=self.shape.name,
            policy=self.policy.name,
            cap_bytes=self._largest_cap,
            peak_bytes=self.ledger.peak,
            resident_bytes=self.ledger.resident,
            total_slots=sum(sequence.held for sequence in self.sequences),
            capacity=self.plan.capacity,
            rows=len(self.sequences),
            num_compactions=len(compactions),
            num_prompt_tokens=self.progress.consumed.prompt_tokens,
            num_new_tokens=self.progress.consumed.new_tokens,
            seconds_compacting=sum(report.seconds for report in compactions),
            stopped=self.stopped,
            compactions=tuple(compactions),
            rebases=tuple(self.rebases),
        )

    def subscribe(self, callback: Callable[[Event], None]) -> None:
        """Call ``callback`` from now on: with a :class:`Usage` after every forward, and with every report.

        Every compaction and every re-basing makes a report.
        """
        self._subscribers.append(callback)

    @property
    def compactions(self) -> list[CompactionReport]:
        """The reports of all compactions that have finished."""
        return self.reports.all_compactions(self.sequences)

    @property
    def rebases(self) -> list[RebaseReport]:
        """The reports of all re-basings that have finished."""
        return self.reports.all_rebases(self.sequences)

    def record(self, report: CompactionReport | RebaseReport) -> None:
        """Add the report of a compaction or re-basing that has finished; see :class:`Reports`."""
        self.reports.record(self.sequences[report.row], report)

    def publish_usage(self) -> None:
        """Send the memory's current usage to the subscribers; called after each forward."""
        if self._subscribers:
            self.publish(self.usage())

    def publish(self, event: Event) -> None:
        """Call every subscriber with ``event``."""
        for callback in self._subscribers:
            callback(event)

    # ---- the end

    @property
    def closed(self) -> bool:
        """True if the memory was closed."""
        return self._closed

    @property
    def used(self) -> bool:
        """True if a first forward has fixed the number of sequences; see :meth:`bind`."""
        return bool(self.sequences)

    def open_or_raise(self) -> None:
        """Raise an error if the memory is closed.

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
        for sequence in self.sequences:
            for layer in range(len(sequence.stores)):
                sequence.replace(layer, None)
            sequence.samples = [()] * len(sequence.samples)
        self.ledger.recover(())


def unwatched() -> None:
    """Do nothing; the default of :attr:`Memory.boundary`, which a compaction calls before each of its steps."""
