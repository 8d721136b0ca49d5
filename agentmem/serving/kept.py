"""Memories on disk: those of conversations that the next server restores, and those of compaction items."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from agentmem.serving.conversations import Conversation
from agentmem.serving.logs import LOG
from agentmem.serving.recipes import Recipe

if TYPE_CHECKING:
    from agentmem import Session

_RECORD, _MEMORY = "record.json", "memory"
_BEFORE = ".before-"
"""Prefix of the old folder of a memory while the new folder takes its place."""


class Record(BaseModel):
    """The facts saved beside a memory: its owner, its recipe, digests of its messages, and its counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    owner: str
    label: str | None = None
    policy: str | None
    settings: str
    tools: str
    options: str
    history: tuple[str, ...] = ()
    anchors: dict[str, int] = {}
    used: float
    bytes: int = 0
    lead: str | None = None
    since_item: int = 0
    open: bool = False

    @classmethod
    def of(cls, conversation: Conversation) -> Record:
        """Make the record of a conversation: everything except its memory."""
        names = ("id", "owner", "label", "anchors", "used", "bytes", "lead", "since_item", "open")
        own = {name: getattr(conversation, name) for name in names}
        return cls(**own, **asdict(conversation.recipe), history=tuple(conversation.history))

    @property
    def recipe(self) -> Recipe:
        """The recipe for the session of this record."""
        return Recipe(self.policy, self.settings, self.tools, self.options)

    def conversation(self, folder: Path) -> Conversation:
        """Make the conversation of this record, with its memory in ``folder``."""
        made = Conversation(self.id, self.owner, self.label, self.recipe, list(self.history), dict(self.anchors))
        made.folder, made.used, made.bytes = folder, self.used, self.bytes
        made.lead, made.since_item, made.open = self.lead, self.since_item, self.open
        return made


class Kept:
    """Memories saved by name under one folder. Each is complete, or not there at all."""

    def __init__(self, folder: Path) -> None:
        """Create the folder, readable only by the user, and delete or undo what an earlier server left unfinished."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.glob(".making-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in folder.glob(f"{_BEFORE}*"):
            self._settle(path.name.removeprefix(_BEFORE))

    def keep(self, name: str, session: Session, record: Record) -> Path:
        """Save a session under a name, replace the memory that had this name, and return the path of the memory.

        Raises:
            AgentmemError: the session cannot be written; the memory that had the name is still there.
            RuntimeBusy: the runtime is busy; try again later.

        """
        made = Path(tempfile.mkdtemp(prefix=".making-", dir=self.folder))
        try:
            session.save(made / _MEMORY)
            (made / _RECORD).write_text(record.model_dump_json(), encoding="utf-8")
            with suppress(FileNotFoundError):
                (self.folder / name).rename(self.folder / f"{_BEFORE}{name}")
            made.rename(self.folder / name)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        finally:
            self._settle(name)
        return self.memory(name)

    def _settle(self, name: str) -> None:
        """Delete the old folder of a memory if a new one took its place; otherwise give it its name back."""
        before = self.folder / f"{_BEFORE}{name}"
        if (self.folder / name).exists():
            shutil.rmtree(before, ignore_errors=True)
        elif before.exists():
            before.rename(self.folder / name)

    def memory(self, name: str) -> Path:
        """Return the path of the memory of that name."""
        return self.folder / name / _MEMORY

    def record(self, name: str) -> Record | None:
        """Read the record of the memory of that name; ``None`` if there is none or it cannot be read."""
        try:
            return Record.model_validate_json((self.folder / name / _RECORD).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            LOG.warning("memory_not_read", memory=name, error=type(error).__name__)
            return None

    def drop(self, name: str) -> None:
        """Delete the memory of that name, if there is one."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def names(self) -> Iterator[str]:
        """Iterate over the names of all memories."""
        return (path.name for path in sorted(self.folder.iterdir()) if not path.name.startswith("."))

    def sweep(self, seconds: float, quota_bytes: int) -> None:
        """Delete memories older than ``seconds``, and the oldest ones beyond ``quota_bytes``.

        The quota does not apply to the newest memory.
        """
        found = sorted(((_written(self.folder / name), name) for name in self.names()), reverse=True)
        size, now = 0, time.time()
        for at, (written, name) in enumerate(found):
            size += _bytes(self.folder / name)
            if now - written > seconds or (at and size > quota_bytes):
                self.drop(name)


def conversation_name(conversation: Conversation) -> str:
    """Return the folder name of a conversation: a digest, since ids come from clients and are unsafe as file names."""
    return hashlib.sha256(f"{conversation.owner}\n{conversation.id}".encode()).hexdigest()[:32]


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _bytes(path: Path) -> int:
    return sum(
        os.path.getsize(Path(folder) / name)  # noqa: PTH202  # walk gives texts
        for folder, _, names in os.walk(path)
        for name in names
    )
