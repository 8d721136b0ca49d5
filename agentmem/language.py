"""Convert between text and ids for a memory, whose code does not know the tokenizer itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Language:
    """The functions of a tokenizer that a memory uses, and the ids that end a text which the model writes."""

    read: Callable[[Sequence[int]], list[str]]
    """Returns the text of each id."""
    write: Callable[[str], Sequence[int]]
    """Returns the ids of a text that continues what the memory holds, without special tokens."""
    ask: Callable[[str], Sequence[int]]
    """Returns the ids of an instruction to the model up to where the answer begins (by the chat template, if any)."""
    ends: tuple[int, ...] = ()
    """The ids that end a text."""
