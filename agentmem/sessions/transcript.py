"""What a session has read and written, beside its memory: ids are the state, text is for people."""

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
    """Whether all of it is pinned now; a transcript says so, a session's own entries do not."""
    text: str = ""

    def replaced(self, made: SummaryReport) -> bool:
        """Whether this is a summary that another one has replaced."""
        return self.kind == "summary" and made.start <= self.start and self.stop <= made.stop


@dataclass(frozen=True, slots=True)
class Transcript:
    """Everything so far: ``ids`` as they were read and sampled, what of them is whose, and the whole text."""

    ids: tuple[int, ...]
    entries: tuple[Entry, ...]
    text: str

    @classmethod
    def of(cls, ids: Sequence[int], entries: Iterable[Entry], tokenizer: Any, pins: Pins) -> Self:
        """What was read and written so far; the text of each entry is decoded where it has none of its own."""

        def text(start: int, stop: int) -> str:
            part = list(ids[start:stop])
            return str(tokenizer.decode(part, skip_special_tokens=False)) if part else ""

        def shown(entry: Entry) -> Entry:
            pinned = entry.kind != "summary" and pins.holds(entry.start, entry.stop)
            return entry.model_copy(update={"pinned": pinned, "text": entry.text or text(entry.start, entry.stop)})

        return cls(tuple(ids), tuple(map(shown, entries)), text(0, len(ids)))

    def ids_of(self, entry: Entry) -> tuple[int, ...]:
        """The ids of one entry."""
        return self.ids[entry.start : entry.stop]
