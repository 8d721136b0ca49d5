"""What sessions hold: one memory, in use, idle or on disk, with the bytes that the runtime's cap is charged for it."""

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
"""How an idle memory is preempted: its room is given back; it is compacted further first; it is moved to disk."""
_STAGES: tuple[Stage, ...] = get_args(Stage)


class Holding:
    """One memory of a model. Several sessions may share it as long as none of them writes."""

    def __init__(self, model: Any, memory: Memory, lease: int) -> None:
        """Hold a memory that is attached to no model yet."""
        self.model, self.lease = model, lease
        self.memory: Memory | None = None
        self.view: hf.CappedCache | None = None
        self.sessions: set[int] = set()
        self.stage: Stage | None = None
        """How far it has been preempted; ``None`` while it has its whole lease."""
        self.used = 0
        """When it was last used, by the runtime's count."""
        self.policy = memory.policy.name
        self.identity: dict[str, str] = {}
        """Of which model its keys are, as a snapshot names it; taken before its first token is read."""
        self.named: tuple[Named, ...] = ()
        """Its policy and the others, as a snapshot names them."""
        self.capacity = memory.plan.capacity
        self._noted = (0, 0, 0, 0)
        self._pins = Pins()
        self._template = memory.empty()
        self._working = 0
        """Bytes beside what it holds that an idle memory works with."""
        self._folder: Path | None = None
        self._dtype: torch.dtype = model.dtype
        self._attach(memory)

    @property
    def seen(self) -> int:
        """Tokens that the memory has consumed."""
        return self._counts()[0]

    @property
    def compactions(self) -> int:
        """Compactions of the memory so far."""
        return self._counts()[1]

    @property
    def rebases(self) -> int:
        """Its re-basings."""
        return self._counts()[2]

    @property
    def peak(self) -> int:
        """The most bytes that it ever held and worked with."""
        return self._counts()[3]

    def _counts(self) -> tuple[int, int, int, int]:
        memory, noted = self.memory, self._noted
        if memory is None:
            return noted
        peak = max(noted[3], memory.ledger.peak)
        return memory.sequences[0].seen, len(memory.compactions), len(memory.rebases), peak

    @property
    def pins(self) -> Pins:
        """What is pinned of it."""
        return self._pins if self.memory is None else self.memory.sequences[0].pins

    @property
    def charged(self) -> int:
        """Bytes of the runtime's cap: the lease, what an idle memory holds, or nothing on disk."""
        memory = self.memory
        if memory is None:
            return 0
        return self.lease if self.stage is None else memory.ledger.resident + self._working

    @property
    def resident(self) -> int:
        """Bytes that the memory holds; 0 on disk."""
        memory = self.memory
        return 0 if memory is None else memory.ledger.resident

    @property
    def quiet(self) -> bool:
        """Whether the memory is here and nothing that was begun is to be finished, so that reading it needs no room."""
        if self.memory is None:
            return False
        sequence = self.memory.sequences[0]
        return sequence.quiet and sequence.arranged

    def copied(self) -> Holding:
        """Another holding with an equal memory of its own; this one stays as it is, on disk too."""
        memory = self._read() if self.memory is None else copy(self.finished())
        other = Holding(self.model, memory, self.lease)
        other.named, other.identity = self.named, self.identity
        return other

    @property
    def engine(self) -> Engine:
        """What runs the memory, which must be here."""
        assert self.view is not None  # noqa: S101  # the caller has asked for it
        return self.view.engine

    def finished(self) -> Memory:
        """The memory, which must be here, once what was begun in it is ended.

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
        """Free bytes, unless it has been preempted as far already; the reports of compactions that this took.

        A memory whose room was given back is compacted only where ``left``, what is charged to nobody, has room for
        the workspace; and no memory twice before it is used again. ``ask`` says how it is to be done, ``None`` if not
        at all.

        Raises:
            CompactionFailed: one had begun and cannot be finished.
            AgentmemError: it cannot be written, or not be read again; nothing is lost then.

        """
        memory = self.memory
        if memory is None or (self.stage is not None and _STAGES.index(stage) <= _STAGES.index(self.stage)):
            return []
        if self.stage is not None and not self.quiet:
            return []  # a compaction that failed before would be tried again, which takes the lease
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
        """Halve the segments, once what has begun is finished. No room is given out: it would be given back at once."""
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
            promote(memory, sequence)  # pins count as the front, where a compaction would put them first of all
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
        """Bring everything back: from disk, and with the room of the whole lease. The lease must have been granted."""
        if self.memory is None:
            self._attach(self._read())
            self._forget_disk()
        elif self.stage is not None:
            expand(self.memory, self.memory.sequences[0])
        self.stage = None

    def inherit(self, folder: Callable[[], Path]) -> None:
        """In a forked process: have files of one's own of a memory on disk, since the parent deletes its own.

        A memory whose files cannot be linked or copied is lost for this process; its next turn says so.
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
        """Free the memory, on disk too."""
        self._detach()
        self._forget_disk()

    def _read(self) -> Memory:
        assert self._folder is not None  # noqa: S101  # a memory that is not here is on disk
        memory = self._template.empty()
        read_sequence(memory, self._folder, identity=self.identity, dtype=self._dtype)
        return memory

    def _attach(self, memory: Memory) -> None:
        view = hf.attach(self.model, memory)
        self._leash = finalize(self, hf.detach_later, self.model)  # should nobody close the runtime
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
    """The same file under another name, or a copy of it; snapshots' files never change."""
    try:
        os.link(file, onto)
    except OSError:
        shutil.copyfile(file, onto)
