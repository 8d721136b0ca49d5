"""Memories on disk: those of conversations, which the next server restores, and those of compaction items."""

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
"""Prefix that a memory's old folder has while a new folder replaces it."""


class Record(BaseModel):
    """The facts about a conversation that are saved beside its memory.

    These are the conversation's owner, its recipe, the digests of its messages, its size in bytes, and so on; the
    attributes of :class:`agentmem.serving.conversations.Conversation` explain them.
    """

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
        """Return the record of a conversation; the record has everything except the memory."""
        names = ("id", "owner", "label", "anchors", "used", "bytes", "lead", "since_item", "open")
        own = {name: getattr(conversation, name) for name in names}
        return cls(**own, **asdict(conversation.recipe), history=tuple(conversation.history))

    @property
    def recipe(self) -> Recipe:
        """The recipe (the session's arguments) of the recorded conversation."""
        return Recipe(self.policy, self.settings, self.tools, self.options)

    def conversation(self, folder: Path) -> Conversation:
        """Return the recorded conversation, whose memory is in ``folder``; no session is opened."""
        made = Conversation(self.id, self.owner, self.label, self.recipe, list(self.history), dict(self.anchors))
        made.folder, made.used, made.bytes = folder, self.used, self.bytes
        made.lead, made.since_item, made.open = self.lead, self.since_item, self.open
        return made


class Kept:
    """Memories that are saved by name in one folder. A memory is either saved completely or not at all."""

    def __init__(self, folder: Path) -> None:
        """Create the folder, readable only by the user, and clean up writes that an earlier server left unfinished."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.glob(".making-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in folder.glob(f"{_BEFORE}*"):
            self._settle(path.name.removeprefix(_BEFORE))

    def keep(self, name: str, session: Session, record: Record) -> Path:
        """Save a session and its record under a name, and return the path of the saved memory.

        An older memory of this name is replaced.

        Raises:
            AgentmemError: the session cannot be written; an older memory of this name is still there.
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
        """Finish or undo the replacement of a memory.

        The old folder is deleted if the new folder is in place. Otherwise the old folder gets its name back.
        """
        before = self.folder / f"{_BEFORE}{name}"
        if (self.folder / name).exists():
            shutil.rmtree(before, ignore_errors=True)
        elif before.exists():
            before.rename(self.folder / name)

    def memory(self, name: str) -> Path:
        """Return the path of the memory with this name."""
        return self.folder / name / _MEMORY

    def record(self, name: str) -> Record | None:
        """Return the record of the memory with this name, or ``None`` if no record can be read."""
        try:
            return Record.model_validate_json((self.folder / name / _RECORD).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            LOG.warning("memory_not_read", memory=name, error=type(error).__name__)
            return None

    def drop(self, name: str) -> None:
        """Delete the memory with this name, if there is such a memory."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def names(self) -> Iterator[str]:
        """Iterate over the names of all memories."""
        return (path.name for path in sorted(self.folder.iterdir()) if not path.name.startswith("."))

    def sweep(self, seconds: float, quota_bytes: int) -> None:
        """Delete memories that are older than ``seconds``, and the oldest memories beyond ``quota_bytes`` in total.

        The quota never deletes the newest memory.
        """
        found = sorted(((_written(self.folder / name), name) for name in self.names()), reverse=True)
        size, now = 0, time.time()
        for at, (written, name) in enumerate(found):
            size += _bytes(self.folder / name)
            if now - written > seconds or (at and size > quota_bytes):
                self.drop(name)


def conversation_name(conversation: Conversation) -> str:
    """Return the folder name of a conversation: a digest of its owner and id.

    Ids come from clients, and are therefore unsafe as file names.
    """
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
