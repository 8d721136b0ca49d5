"""Holdings: each is one memory, in use, idle or on disk, with the bytes that the runtime charges for this memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import finalize

from agentmem import hf
from agentmem.compaction.request import USUAL, Request
from agentmem.errors import AgentmemError, SettingsRefused
from agentmem.memory.pinning import least_target, promote, put
from agentmem.memory.pins import Pins
from agentmem.memory.state import copy, expand, filled, trim
from agentmem.planning.pricing import MIN_BUDGET
from agentmem.reporting import log_events
from agentmem.sessions.snapshots.files import write_snapshot
from agentmem.sessions.snapshots.snapshot import read_sequence, take_sequence
from agentmem.settings import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from agentmem.engine import Engine
    from agentmem.memory.memory import Memory
    from agentmem.planning.pricing import Plan
    from agentmem.reporting.report import CompactionReport
    from agentmem.sessions.snapshots.recipe import Named

Stage = Literal["trim", "compact", "disk"]
"""Stage of the preemption of an idle memory: ``trim`` gives back its free room, ``compact`` compacts it further and
gives back its free room, ``disk`` moves it to disk."""
_STAGES: tuple[Stage, ...] = get_args(Stage)


class Holding:
    """One memory of a model, which is attached to the model or stored on disk.

    Several sessions, such as forks, may share a holding as long as none of them begins a turn.
    """

    def __init__(self, model: Any, memory: Memory, lease: int, *, elastic: bool = False) -> None:
        """Attach a memory to the model; ``lease`` is the number of bytes charged while a session uses the memory.

        An ``elastic`` lease may change (:meth:`resize`).
        """
        self.model, self.lease, self.elastic = model, lease, elastic
        self.least = 0
        """The least lease in bytes of the next turn, if the lease is elastic; 0 if any lease will do."""
        self.refused = 0
        """The largest lease to which the running turn could not be reduced, in bytes."""
        self.memory: Memory | None = None
        self.view: hf.CappedCache | None = None
        self.sessions: set[int] = set()
        self.stage: Stage | None = None
        """The last stage by which the memory was preempted; ``None`` while it has its whole lease."""
        self.used = 0
        """Number of the last turn that used the memory, by the runtime's count of turns."""
        self.policy = memory.policy.name
        self.identity: dict[str, str] = {}
        """The identity (fingerprints) of the model that computes the keys, taken before the first token is read."""
        self.named: tuple[Named, ...] = ()
        """The memory's policy and the extra policies, as a snapshot names them."""
        self.capacity = memory.plan.capacity
        self._noted, self._filled = (0, 0, 0, 0), 0
        self._plans: dict[int, tuple[Plan, ...]] = {}
        """The plans under each lease that was considered; no plans if the lease is too small."""
        self._pins = Pins()
        self._template = memory.empty()
        self._working = 0
        """Bytes that a compaction of the idle memory uses temporarily, in addition to the bytes that it holds."""
        self._folder: Path | None = None
        self._dtype: torch.dtype = model.dtype
        self._attach(memory)

    @property
    def seen(self) -> int:
        """Number of tokens that the memory has consumed."""
        return self._counts()[0]

    @property
    def compactions(self) -> int:
        """Number of compactions of the memory so far."""
        return self._counts()[1]

    @property
    def rebases(self) -> int:
        """Number of re-basings of the memory so far."""
        return self._counts()[2]

    @property
    def peak(self) -> int:
        """The most bytes that the memory ever used at one time, resident and temporary bytes together."""
        return self._counts()[3]

    def _counts(self) -> tuple[int, int, int, int]:
        memory, noted = self.memory, self._noted
        if memory is None:
            return noted
        peak = max(noted[3], memory.ledger.peak)
        return memory.sequences[0].seen, len(memory.compactions), len(memory.rebases), peak

    @property
    def pins(self) -> Pins:
        """The pins of the memory's sequence."""
        memory = self.memory  # read once, here and below: another thread may move the memory to disk in between
        return self._pins if memory is None else memory.sequences[0].pins

    @property
    def charged(self) -> int:
        """Number of bytes of the runtime's cap that are charged for the memory.

        This is the lease until the memory is preempted, then the bytes that the memory holds, and 0 while it is on
        disk.
        """
        memory = self.memory
        if memory is None:
            return 0
        return self.lease if self.stage is None else memory.ledger.resident + self._working

    @property
    def resident(self) -> int:
        """Bytes that the memory holds; 0 while it is on disk."""
        memory = self.memory
        return 0 if memory is None else memory.ledger.resident

    @property
    def quiet(self) -> bool:
        """True if the memory can be saved without temporary bytes.

        This is so if the memory is not on disk and has no unfinished compaction, re-basing or move of pinned slots.
        """
        memory = self.memory
        if memory is None:
            return False
        sequence = memory.sequences[0]
        return sequence.quiet and sequence.arranged

    def copied(self, lease: int) -> Holding:
        """Return a new holding with a copy of the memory; if the memory is on disk, the copy is read from there.

        This holding keeps its own memory. ``lease`` is the lease of the copy; see :meth:`takes`.
        """
        memory = self._read(lease) if self.memory is None else copy(self.finished(), lease)
        other = Holding(self.model, memory, lease, elastic=self.elastic)
        other.named, other.identity = self.named, self.identity
        return other

    @property
    def engine(self) -> Engine:
        """The engine that feeds and compacts the memory, which must not be on disk."""
        assert self.view is not None  # noqa: S101  # the caller has made sure of this
        return self.view.engine

    def finished(self) -> Memory:
        """Finish an interrupted compaction or re-basing, and return the memory, which must not be on disk.

        Raises:
            CompactionFailed: a compaction had begun and cannot be finished.

        """
        memory = self.engine.memory
        self.engine.finish(memory.sequences[0])
        return memory

    # ---- elastic leases

    def plans(self, lease: int) -> tuple[Plan, ...]:
        """Return the plans that the memory's policies would have under a lease; none if the lease is too small."""
        if lease not in self._plans:
            try:
                self._plans[lease] = (self.memory or self._template).plans_under(lease)
            except SettingsRefused:
                self._plans[lease] = ()
        return self._plans[lease]

    def takes(self, lease: int) -> bool:
        """Return whether the memory would fit under a lease as it is now, with its pins, without a compaction.

        Stored queries are kept in the number of the first plan, so a lease whose plan has another number is refused as
        soon as the memory has read something.
        """
        if lease == self.lease:
            return True
        plans = self.plans(lease)
        if not plans or not (self.memory is None or self.quiet):
            return False
        plan = plans[0]
        stored = (self.memory or self._template).plan.stored
        if self.seen and plan.stored != stored:
            return False
        slots = self._filled if self.memory is None else filled(self.memory.sequences[0])
        return slots + plan.scratch < plan.capacity and least_target(self.pins.spans, plan) <= plan.target

    def ask_more(self, cap: int) -> bool:
        """Note that the memory's next turn needs a larger lease, up to ``cap`` bytes; return whether it may get one."""
        if self.elastic and self.lease < cap:
            self.least = min(cap, 2 * self.lease)
        return self.least > 0

    def resize(self, lease: int) -> None:
        """Change the lease of the memory, which is in use, to one that it :meth:`takes`."""
        memory, plans = self.memory, self.plans(lease)
        assert memory is not None  # noqa: S101  # the caller has made sure of this
        (sequence,) = memory.sequences
        self.stage = "trim"  # until the end, so that the next turn does what an interrupt left undone
        trim(memory, sequence)
        memory.replan(plans)
        self.lease, self.capacity = lease, memory.plan.capacity
        expand(memory, sequence)
        put(memory, sequence, sequence.pins)
        self.stage = None

    # ---- preemption

    def preempt(
        self,
        stage: Stage,
        folder: Callable[[], Path],
        *,
        left: int = 0,
        ask: Callable[[], Request | None] = lambda: USUAL,
    ) -> list[CompactionReport]:
        """Free bytes of the idle memory by one stage of preemption, and return the reports of any compactions.

        The stages are, in this order: ``trim`` gives back the memory's free slots, ``compact`` compacts the memory
        further and gives back its free slots, and ``disk`` moves the memory to disk. Nothing happens if the memory went
        through this stage or a later one since its last use. Therefore the memory is compacted at most once before it
        is used again.

        Args:
            stage: the stage to apply.
            folder: function that returns the folder for idle memories on disk.
            left: bytes of the runtime's cap that are not charged to any memory. After the stage ``trim``, the memory is
                no longer charged for temporary bytes. It is then compacted only if the temporary bytes of a compaction
                fit into ``left``.
            ask: function that returns the request for the compaction, or ``None`` to forbid the compaction.

        Raises:
            CompactionFailed: a compaction had begun and cannot be finished.
            AgentmemError: the memory cannot be written to disk, or could not be read again; nothing is lost.

        """
        memory = self.memory
        if memory is None or (self.stage is not None and _STAGES.index(stage) <= _STAGES.index(self.stage)):
            return []
        if self.stage is not None and not self.quiet:
            return []  # this would retry a compaction that failed before, which needs the whole lease
        before = len(memory.compactions)
        if stage == "disk":
            self._to_disk(memory, folder)
        elif stage == "trim":
            trim(self.finished(), memory.sequences[0])
        elif (self.stage is not None and memory.plan.workspace_bytes > left) or (request := ask()) is None:
            return []
        else:
            self._compact_further(memory, request)
            trim(memory, memory.sequences[0])
        self.stage = stage
        return memory.compactions[before:]

    def _compact_further(self, memory: Memory, request: Request) -> None:
        """Finish an interrupted compaction or re-basing, then compact the segments to half of their slots.

        The second step is left out in three cases: the memory never compacts by itself, the request names a policy with
        a plan other than the memory's own plan, or too few slots would be left. The compaction allocates no free room
        for further tokens, since the caller would take this room back at once.
        """
        sequence, plan, cap = memory.sequences[0], memory.plan, memory.ledger.cap
        engine = self.engine
        engine.finish(sequence)
        if not engine.automatic:
            return
        if plan is not memory.plan_of(request.policy or memory.policy):
            return
        try:
            if self.stage is not None:
                self._working = plan.workspace_bytes
                memory.ledger.cap = self.charged
            promote(memory, sequence)  # so that the slots of pins count as part of the front
            pinned = sequence.front(plan.prefix) + plan.recent
            slots = (sequence.mean_slots() - pinned) // 2
            if slots >= MIN_BUDGET:
                memory.plan = replace(plan, capacity=pinned + slots)
                engine.compact(sequence, Request(slots=slots))
        finally:
            memory.plan, memory.ledger.cap, self._working = plan, cap, 0

    def _to_disk(self, memory: Memory, folder: Callable[[], Path]) -> None:
        saved, tensors = take_sequence(self.finished(), None)
        moved = False
        try:
            self._dtype = saved.dtype or self._dtype
            self._folder = Path(tempfile.mkdtemp(prefix="idle-", dir=folder()))
            write_snapshot(self._folder, tensors, {"row": saved.plain()}, identity=self.identity)
            moved = True
        except (OSError, AgentmemError) as error:
            raise AgentmemError(
                f"an idle memory of {exact_bytes(memory.ledger.resident)} cannot be moved to the spill folder: "
                f"{error}. Nothing is lost: it stays where it was. Mend the folder (spill), or leave 'disk' out of "
                "pressure"
            ) from error
        finally:
            tensors.clear()
            if not moved:
                self._forget_disk()
        freed = memory.ledger.resident
        self._detach()
        log_events.memory_spilled(memory.names, freed_bytes=freed)

    # ---- coming back

    def wake(self, lease: int) -> None:
        """Make an idle memory ready for a turn: read it from disk if necessary, and allocate its free slots again.

        From now on the memory is charged ``lease`` bytes, which it must take (:meth:`takes`). The lease must have been
        granted before this call.
        """
        self.least = self.refused = 0
        if self.memory is None:
            memory = self._read(lease)
            self._attach(memory)
            self._forget_disk()
            self.lease, self.capacity = lease, memory.plan.capacity
            log_events.memory_restored(memory.names, held_bytes=memory.ledger.resident)
        elif lease != self.lease or lease != self.memory.plan.cap_bytes:
            self.resize(lease)
        elif self.stage is not None:
            expand(self.memory, self.memory.sequences[0])
        self.stage = None

    def inherit(self, folder: Callable[[], Path]) -> None:
        """In a forked process, link or copy the files of a memory on disk into a folder of this process.

        This is necessary because the parent process deletes its own files at some time. If the files cannot be linked
        or copied, the memory is lost for this process, and the next turn raises an error.
        """
        theirs, self._folder = self._folder, None
        if theirs is None:
            return
        self._folder = theirs.with_name(f"{theirs.name}-lost")
        with suppress(OSError):
            self._folder = Path(tempfile.mkdtemp(prefix="idle-", dir=folder()))
            for file in theirs.iterdir():
                _link(file, self._folder / file.name)

    def release(self) -> None:
        """Free the memory and delete its files on disk."""
        self._detach()
        self._forget_disk()

    def _read(self, lease: int) -> Memory:
        assert self._folder is not None  # noqa: S101  # without a memory in use, it is on disk
        memory = self._template.empty(lease)
        read_sequence(memory, self._folder, identity=self.identity, dtype=self._dtype)
        return memory

    def _attach(self, memory: Memory) -> None:
        view = hf.attach(self.model, memory)
        self._leash = finalize(self, hf.detach_later, self.model)  # in case nobody closes the runtime
        self._leash.atexit = False
        memory.bind(1)
        self.memory, self.view = memory, view

    def _detach(self) -> None:
        memory = self.memory
        if memory is not None:
            self._noted, self._pins, self._filled = self._counts(), self.pins, filled(memory.sequences[0])
            self.memory = self.view = None
            self._leash.detach()
            hf.detach(self.model)
            memory.close()

    def _forget_disk(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _link(file: Path, onto: Path) -> None:
    """Link a file to another name, or copy it if that fails; a link suffices since files of snapshots never change."""
    try:
        os.link(file, onto)
    except OSError:
        shutil.copyfile(file, onto)
