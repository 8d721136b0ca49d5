"""The conversations in a state folder: their records, and which of several saves of a conversation to go on from.

Each save of a conversation is a memory of its own, named by a digest of owner and id and by a number that rises with
each save of that conversation, whichever server makes it. Nothing that was saved is ever written again.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

from agentmem.serving.kept import Kept, Record

if TYPE_CHECKING:
    from agentmem import Session
    from agentmem.serving.conversations import Conversation


class Shelf:
    """The saved conversations of one state folder. :meth:`look` and all that follow it may be called on any thread."""

    def __init__(self, kept: Kept, *, shared: bool) -> None:
        """Begin without records; :meth:`look` reads them.

        In a folder that is ``shared`` with other servers, the save that a conversation went on from stays beside its
        newest one, so that a turn can be repeated from there if its server died before the client had the whole reply.
        """
        self.kept, self._shared = kept, shared
        self._records: dict[str, Record] = {}
        self._refused: set[str] = set()

    def look(self) -> None:
        """Read the records of all saves that are new since the last call, and forget those that were deleted."""
        known, found = self._records, {}
        for name in self.kept.names():
            if name in self._refused:
                continue
            record = known.get(name) or self.kept.record(name)
            if record is None:
                self._refused.add(name)
            else:
                found[name] = record
        self._records = found

    def conversations(self, owner: str | None = None) -> Iterator[Conversation]:
        """Yield a conversation for each save that :meth:`look` found, of ``owner`` if one is given, oldest save first.

        Several of them may have the same id: they are saves of one conversation, and the last is the newest.
        """
        for name, record in sorted(self._records.items(), key=lambda found: _number(found[0])):
            if owner in (None, record.owner):
                made = record.conversation(self.kept.memory(name))
                made.saved = name
                yield made

    def save(self, conversation: Conversation, session: Session) -> None:
        """Save a conversation, and delete the saves that this one replaces.

        Raises:
            AgentmemError, OSError: the conversation cannot be written; older saves are still there.
            RuntimeBusy: the runtime is busy; try again later.

        """
        older = self._saves(conversation)
        number = 1 + max(map(_number, older), default=0)
        name = f"{_digest(conversation)}.{number:08d}-{secrets.token_hex(4)}"
        self.kept.keep(name, session, Record.of(conversation))
        for each in older:
            if _number(each) < number and not (self._shared and each == conversation.saved):
                self.kept.drop(each)
        conversation.saved, conversation.changed = name, False

    def refuse(self, conversation: Conversation) -> None:
        """Never again yield the save that a conversation was made from; the folder keeps it for other servers."""
        if conversation.saved is not None:
            self._refused.add(conversation.saved)
            self._records.pop(conversation.saved, None)

    def drop(self, conversation: Conversation) -> None:
        """Delete all saves of a conversation."""
        for name in self._saves(conversation):
            self.kept.drop(name)

    def _saves(self, conversation: Conversation) -> list[str]:
        digest = _digest(conversation)
        return [name for name in self.kept.names() if name.partition(".")[0] == digest]


def _digest(conversation: Conversation) -> str:
    """Return a digest of a conversation's owner and id. Ids come from clients and are unsafe as file names."""
    return hashlib.sha256(f"{conversation.owner}\n{conversation.id}".encode()).hexdigest()[:32]


def _number(name: str) -> int:
    """Return the number of a save; 0 for a name that no save has."""
    number = name.partition(".")[2].partition("-")[0]
    return int(number) if number.isdecimal() else 0
