"""What a session has read and written, beside its memory: ids are the state, text is for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal["message", "reply", "text", "summary"]


class Entry(BaseModel):
    """Tokens ``start .. stop`` of a session, and whose they are.

    A ``summary`` is no tokens of the session's: it stands in the memory for ``start .. stop``, and ``text`` is the
    summary's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    role: str | None
    start: int
    stop: int
    name: str | None = None
    pinned: bool = False
    text: str = ""


@dataclass(frozen=True, slots=True)
class Transcript:
    """Everything so far: ``ids`` as they were read and sampled, what of them is whose, and the whole text."""

    ids: tuple[int, ...]
    entries: tuple[Entry, ...]
    text: str

    def ids_of(self, entry: Entry) -> tuple[int, ...]:
        """The ids of one entry."""
        return self.ids[entry.start : entry.stop]
