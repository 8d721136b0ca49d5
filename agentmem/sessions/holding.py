"""What sessions hold: one memory, in use, idle or on disk, with the bytes that the runtime's cap is charged for it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentmem import hf
from agentmem.image import copy, expand, give, take, trim
from agentmem.job import Request
from agentmem.sessions.snapshot import check_row, row_of
from agentmem.sessions.snapshot_files import read_snapshot, write_snapshot

if TYPE_CHECKING:
    from agentmem.memory import Memory

Stage = Literal["trim", "compact", "disk"]
"""How an idle memory gives way: its room is given back; it is compacted further first; it is moved to disk."""


class Holding:
    """One memory of a model. Several sessions may share it as long as none of them writes."""

    def __init__(self, model: Any, memory: Memory, lease: int) -> None:
        """Hold a memory that is attached to no model yet."""
        self.model, self.lease = model, lease
        self.memory: Memory | None = None
        self.view: hf.CappedMemory | None = None
        self.sessions: set[int] = set()
        self.stage: Stage | None = None
        """How far it has given way; ``None`` while it has its whole lease."""
        self.used = 0
        """When it was last used, by the runtime's count."""
        self.policy = memory.policy.name
        self.capacity = memory.plan.capacity
        self.compactions = self.rebases = self.peak = self._seen = 0
        self._template = memory.empty()
        self._folder: Path | None = None
        self._attach(memory)

    @property
    def seen(self) -> int:
        """Tokens that the memory has consumed."""
        return self._seen if self.memory is None else self.memory.rows[0].seen

    @property
    def charged(self) -> int:
        """Bytes of the runtime's cap: the lease, what an idle memory holds, or nothing on disk."""
        if self.memory is None:
            return 0
        return self.lease if self.stage is None else self.memory.ledger.resident

    def copied(self, identity: dict[str, str]) -> Holding:
        """Another holding with an equal memory of its own; this one stays as it is, on disk too."""
        if self.memory is not None:
            return Holding(self.model, copy(self.memory), self.lease)
        return Holding(self.model, self._read(identity), self.lease)

    def give_way(self, stage: Stage, folder: Path, identity: dict[str, str]) -> None:
        """Free bytes, further with every stage.

        Raises:
            AgentmemError: the disk cannot be written; nothing is lost then.

        """
        if self.memory is None:
            return
        (row,) = self.memory.rows
        if stage == "compact" and self.memory.policy.compactor is not None and self.memory.settings.mode == "auto":
            held = row.held // max(1, sum(layer.kv_heads for layer in self.memory.shape.layers))
            plan = self.memory.plan
            self.memory.compact(row, Request(slots=max(1, held // 2 - row.front(plan.prefix) - plan.recent)))
        if stage == "disk":
            self._to_disk(folder, identity)
        else:
            trim(self.memory, row)
        self.stage = stage

    def wake(self, identity: dict[str, str]) -> None:
        """Bring everything back: from disk, and with the room of the whole lease. The lease must have been granted."""
        if self.memory is None:
            self._attach(self._read(identity))
            self._forget_disk()
        if self.stage is not None and self.memory is not None:
            expand(self.memory, self.memory.rows[0])
        self.stage = None

    def release(self) -> None:
        """Free the memory, on disk too."""
        self._detach()
        self._forget_disk()

    def _to_disk(self, folder: Path, identity: dict[str, str]) -> None:
        assert self.memory is not None  # noqa: S101  # the caller has looked
        image, tensors = take(self.memory)
        self._folder = Path(tempfile.mkdtemp(prefix="idle-", dir=folder))
        try:
            write_snapshot(self._folder, tensors, {"row": image.model_dump(mode="json")}, identity=identity)
        except BaseException:
            self._forget_disk()
            raise
        tensors.clear()
        self._detach()

    def _read(self, identity: dict[str, str]) -> Memory:
        assert self._folder is not None  # noqa: S101  # a memory that is not here is on disk
        memory = self._template.empty()
        tensors, state = read_snapshot(
            self._folder, identity=identity, max_bytes=self.lease, check=lambda *found: check_row(memory, *found)
        )
        give(memory, row_of(state), tensors)
        return memory

    def _attach(self, memory: Memory) -> None:
        self.memory, self.view = memory, hf.attach(self.model, memory)
        memory.bind(1)
        self.view.columns = memory.rows[0].seen

    def _detach(self) -> None:
        if self.memory is not None:
            self._seen = self.seen
            self.note()
            hf.detach(self.model)
            self.memory.close()
        self.memory = self.view = None

    def note(self) -> None:
        """Keep the counts that are asked for while the memory is not here."""
        if self.memory is not None:
            self.compactions, self.rebases = len(self.memory.compactions), len(self.memory.rebases)
            self.peak = max(self.peak, self.memory.ledger.peak)

    def _forget_disk(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            for file in folder.iterdir():
                file.unlink(missing_ok=True)
            folder.rmdir()
