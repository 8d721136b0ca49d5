"""Define how a memory converts between text and token ids; a memory has no tokenizer of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Language:
    """The tokenizer's functions that a memory uses, and the ids at which a text written by the model ends."""

    read: Callable[[Sequence[int]], list[str]]
    """Returns one text for each id."""
    write: Callable[[str], Sequence[int]]
    """Returns the ids of a text that continues what the memory holds, without special tokens."""
    ask: Callable[[str], Sequence[int]]
    """Returns the ids of an instruction to the model, up to the place where the answer begins.

    The tokenizer's chat template is used if there is one.
    """
    ends: tuple[int, ...] = ()
    """The token ids that end a text."""
