"""Between text and ids, for what a memory itself reads and writes; made at the edge, where the tokenizer is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Language:
    """What a memory needs of a tokenizer, and the ids that end a text which the model writes."""

    read: Callable[[Sequence[int]], list[str]]
    """The text of each id."""
    write: Callable[[str], Sequence[int]]
    """The ids of a text in mid-memory, without special tokens."""
    ask: Callable[[str], Sequence[int]]
    """The ids that ask the model to do something, up to where its answer begins."""
    ends: tuple[int, ...] = ()
