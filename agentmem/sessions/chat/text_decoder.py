"""Decoding of ids to text, piece by piece, without incomplete characters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LOOK_BACK = 64
"""Number of earlier ids that are decoded as context for new ids; no character has as many ids."""


class TextPieces:
    """Decode ids as they come, without special tokens; the pieces joined are the text of all ids."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        """Begin after the ids ``before``, which serve as context; their own text is not returned again."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = self._start = 0
        for token in before[-LOOK_BACK:]:
            self.push(token)

    def push(self, token: int) -> str:
        """Return the text that one more id adds; the text is empty while a character is not complete."""
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
