"""The record of what a session has read and written, as ids, entries and text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from agentmem.memory.pins import Pins
    from agentmem.reporting.report import SummaryReport

Kind = Literal["message", "reply", "text", "summary"]


class Entry(BaseModel):
    """A part of a transcript: the tokens ``start .. stop`` with their kind, role and name.

    An entry of the kind ``summary`` has no tokens of its own in the transcript: the memory holds the summary in place
    of the tokens ``start .. stop``, and ``text`` is the text of the summary.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    role: str | None
    start: int
    stop: int
    name: str | None = None
    pinned: bool = False
    """True if all tokens of the entry are pinned until they are unpinned; the pin of the newest request does not count.
    Only the entries of a :class:`Transcript` have this field set."""
    text: str = ""

    def replaced(self, made: SummaryReport) -> bool:
        """Return True if this entry is a summary and the new summary ``made`` covers all tokens of this entry."""
        return self.kind == "summary" and made.start <= self.start and self.stop <= made.stop


@dataclass(frozen=True, slots=True)
class Transcript:
    """Everything that a session has read and written so far.

    ``ids`` are the token ids as they were read and sampled, ``entries`` say who wrote which of them, and ``text`` is
    the decoded text of all ids.
    """

    ids: tuple[int, ...]
    entries: tuple[Entry, ...]
    text: str

    @classmethod
    def of(cls, ids: Sequence[int], entries: Iterable[Entry], tokenizer: Any, pins: Pins) -> Self:
        """Build a transcript from a session's ids, entries and pins.

        Entries without a text get the decoded text of their ids.
        """

        def text(start: int, stop: int) -> str:
            part = list(ids[start:stop])
            return str(tokenizer.decode(part, skip_special_tokens=False)) if part else ""

        def shown(entry: Entry) -> Entry:
            pinned = entry.kind != "summary" and pins.holds(entry.start, entry.stop)
            return entry.model_copy(update={"pinned": pinned, "text": entry.text or text(entry.start, entry.stop)})

        return cls(tuple(ids), tuple(map(shown, entries)), text(0, len(ids)))

    def ids_of(self, entry: Entry) -> tuple[int, ...]:
        """Return the ids of one entry."""
        return self.ids[entry.start : entry.stop]
