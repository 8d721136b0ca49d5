"""Decoding of ids to text, piece by piece, without incomplete characters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LOOK_BACK = 64
"""Number of earlier ids that are decoded as context for new ids; no character has as many ids."""


class TextPieces:
    """A decoder that gives the text of ids piece by piece as the ids arrive, without special tokens.

    The joined pieces are the text of all ids.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        """Begin after the ids ``before``, which are only context: their text is not returned."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = self._start = 0
        for token in before[-LOOK_BACK:]:
            self.push(token)

    def push(self, token: int) -> str:
        """Add an id and return the new text; the text is empty as long as its last character is incomplete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """Return the rest of the text at the end, including an incomplete character as the tokenizer decodes it."""
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        self._start = self._shown = len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""
