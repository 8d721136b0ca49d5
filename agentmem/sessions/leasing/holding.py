"""The holding of sessions: one memory, in use, idle or on disk, and the bytes that are charged for it."""

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
from agentmem.errors import AgentmemError
from agentmem.memory.pinning import promote
from agentmem.memory.pins import Pins
from agentmem.memory.state import copy, expand, trim
from agentmem.planning.pricing import MIN_BUDGET
from agentmem.sessions.snapshots.files import write_snapshot
from agentmem.sessions.snapshots.snapshot import read_sequence, take_sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from agentmem.engine import Engine
    from agentmem.memory.memory import Memory
    from agentmem.reporting.report import CompactionReport
    from agentmem.sessions.snapshots.recipe import Named

Stage = Literal["trim", "compact", "disk"]
"""Stage of the preemption of an idle memory: ``trim`` gives back its free room, ``compact`` compacts it further and
gives back its free room, ``disk`` moves it to disk."""
_STAGES: tuple[Stage, ...] = get_args(Stage)


class Holding:
    """One memory of a model. Several sessions may share a holding as long as none of them begins a turn."""

    def __init__(self, model: Any, memory: Memory, lease: int) -> None:
        """Hold a memory and attach it to the model; the memory must not be attached yet."""
        self.model, self.lease = model, lease
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
        self._noted = (0, 0, 0, 0)
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
        """The most bytes that the memory ever held and worked with at one time."""
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
        return self._pins if self.memory is None else self.memory.sequences[0].pins

    @property
    def charged(self) -> int:
        """Bytes charged to the runtime's cap.

        These are the lease until the memory is preempted, then the bytes that it holds, and 0 while it is on disk.
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
        """True if the memory is not on disk and no operation in it is unfinished, so that saving it needs no room."""
        if self.memory is None:
            return False
        sequence = self.memory.sequences[0]
        return sequence.quiet and sequence.arranged

    def copied(self) -> Holding:
        """Return a new holding with a copy of the memory; this holding keeps its own memory, also if it is on disk."""
        memory = self._read() if self.memory is None else copy(self.finished())
        other = Holding(self.model, memory, self.lease)
        other.named, other.identity = self.named, self.identity
        return other

    @property
    def engine(self) -> Engine:
        """The engine that feeds and compacts the memory, which must not be on disk."""
        assert self.view is not None  # noqa: S101  # the caller has asked for it
        return self.view.engine

    def finished(self) -> Memory:
        """Finish what has begun in the memory and return the memory, which must not be on disk.

        Raises:
            CompactionFailed: a compaction had begun and cannot be finished.

        """
        memory = self.engine.memory
        self.engine.finish(memory.sequences[0])
        return memory

    # ---- preemption

    def preempt(
        self,
        stage: Stage,
        folder: Callable[[], Path],
        *,
        left: int = 0,
        ask: Callable[[], Request | None] = lambda: USUAL,
    ) -> list[CompactionReport]:
        """Free bytes by a stage and return the reports of the compactions made for that.

        Nothing happens if the memory was already preempted by this stage or a later one. Therefore it is compacted
        at most once before it is used again.

        Args:
            stage: the stage.
            folder: returns the folder for idle memories on disk.
            left: uncharged bytes of the cap. A memory that has given back its room is compacted only if the workspace
                of a compaction fits into these bytes.
            ask: returns the request for the compaction, or ``None`` to forbid the compaction.

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
        """Finish what has begun, then compact the segments to half their slots.

        The memory gets no free room after the compaction, since the caller would give it back at once.
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
            promote(memory, sequence)  # as a compaction does first; then the slots of pins count as the front
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
                f"an idle memory of {memory.ledger.resident} bytes cannot be moved to the spill folder: {error}. "
                "Nothing is lost: it stays where it was. Mend the folder (spill), or leave 'disk' out of pressure"
            ) from error
        finally:
            tensors.clear()
            if not moved:
                self._forget_disk()
        self._detach()

    # ---- coming back

    def wake(self) -> None:
        """Read the memory from disk if necessary, and give it the room of its whole lease, which must be granted."""
        if self.memory is None:
            self._attach(self._read())
            self._forget_disk()
        elif self.stage is not None:
            expand(self.memory, self.memory.sequences[0])
        self.stage = None

    def inherit(self, folder: Callable[[], Path]) -> None:
        """Make own links or copies of the files of a memory on disk, in a forked process.

        The parent will delete its files. If they cannot be linked or copied, the memory is lost for this process, and
        the next turn raises an error.
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

    def _read(self) -> Memory:
        assert self._folder is not None  # noqa: S101  # a memory that is not here is on disk
        memory = self._template.empty()
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
            self._noted, self._pins = self._counts(), self.pins
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
