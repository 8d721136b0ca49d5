"""Memories on disk: those of conversations, which other servers go on from, and those of compaction items."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from agentmem.serving.conversations import Conversation
from agentmem.serving.logs import LOG
from agentmem.serving.recipes import Recipe
from agentmem.sessions.leasing.spill import Spill

if TYPE_CHECKING:
    from agentmem import Session

_RECORD, _MEMORY = "record.json", "memory"
_PASSING = ".passing"
"""Folder for what servers are writing or deleting. Each server has a private folder in it."""


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
    """Memories that are saved by name in one folder, which several servers may share.

    A memory is saved completely or not at all, and then never changes: a name is written once, and a memory and its
    record therefore always belong together. A memory may be deleted at any time, by another server too.
    """

    def __init__(self, folder: Path) -> None:
        """Create the folder, readable only by the user, and clean up what servers that have died left unfinished."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._passing = Spill(folder / _PASSING)
        self._sizes: dict[str, int] = {}

    def keep(self, name: str, session: Session, record: Record) -> Path:
        """Save a session and its record under a new name, and return the path of the saved memory.

        Raises:
            AgentmemError: the session cannot be written.
            OSError: the record cannot be written, or there is a memory of this name.
            RuntimeBusy: the runtime is busy; try again later.

        """
        made = self._aside()
        try:
            session.save(made / _MEMORY)
            (made / _RECORD).write_text(record.model_dump_json(), encoding="utf-8")
            made.rename(self.folder / name)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        return self.memory(name)

    def _aside(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._passing.folder()))

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
        """Delete the memory with this name, if there is such a memory. To other servers it vanishes as a whole."""
        with suppress(OSError):
            gone = self._aside()
            with suppress(FileNotFoundError):
                (self.folder / name).rename(gone / name)
            shutil.rmtree(gone, ignore_errors=True)

    def names(self) -> Iterator[str]:
        """Iterate over the names of all memories."""
        return (path.name for path in sorted(self.folder.iterdir()) if not path.name.startswith("."))

    def sweep(self, seconds: float, quota_bytes: int, most: int | None = None) -> None:
        """Delete memories older than ``seconds``, and the oldest beyond ``quota_bytes`` in total or ``most`` in number.

        Memories whose names are equal up to the first dot count as one, as old as the newest of them. The newest is
        deleted only for its age.
        """
        together = defaultdict(list)
        for name in self.names():
            together[name.partition(".")[0]].append(name)
        found = [(max(_written(self.folder / name) for name in names), names) for names in together.values()]
        size, now = 0, time.time()
        for at, (written, names) in enumerate(sorted(found, reverse=True)):
            size += sum(map(self._bytes, names))
            if now - written > seconds or (at and (size > quota_bytes or (most is not None and at >= most))):
                for name in names:
                    self.drop(name)
        self._sizes = {name: self._sizes[name] for names in together.values() for name in names}

    def _bytes(self, name: str) -> int:
        if name not in self._sizes:
            self._sizes[name] = _bytes(self.folder / name)
        return self._sizes[name]

    def close(self) -> None:
        """Delete this server's private folder for unfinished writes."""
        self._passing.close()


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _bytes(path: Path) -> int:
    found = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):  # another server deletes it
                found += os.path.getsize(Path(folder) / name)  # noqa: PTH202  # walk gives texts
    return found
