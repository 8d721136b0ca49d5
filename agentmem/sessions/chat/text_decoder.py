"""Text out of ids, piece by piece, without ever showing half a character."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LOOK_BACK = 64
"""Ids before a text that tell how it goes on: more than a character has."""


class TextPieces:
    """Decodes ids as they come; special tokens are left out. The pieces together are the text of all ids."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        """``before`` are the ids that the text goes on from: their own text is not shown again."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = self._start = 0
        for token in before[-LOOK_BACK:]:
            self.push(token)

    def push(self, token: int) -> str:
        """What one more id adds to the text; empty while a character is not complete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What is left at the end: an incomplete character is shown as it is."""
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        self._start = self._shown = len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""
