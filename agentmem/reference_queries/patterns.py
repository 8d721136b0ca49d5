"""Find the tokens of a transcript that a regular expression matches; their spans are called marks."""

from __future__ import annotations

from itertools import accumulate, islice
from typing import TYPE_CHECKING, Final

import regex

from agentmem.errors import SettingsRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SECONDS: Final = 2.0
"""The most seconds that one search may take, because some patterns need exponential time on some texts."""


class Marks:
    """Find the spans of one row's transcript that match a pattern.

    The transcript may only grow; each search decodes only the tokens that were added since the last search.
    """

    def __init__(self, pattern: str, read: Callable[[Sequence[int]], list[str]]) -> None:
        """Compile ``pattern``; ``read`` decodes a list of token ids to one text per id."""
        self.pattern, self.read = regex.compile(pattern), read
        self._text = ""
        self._ends: list[int] = []

    def spans(self, transcript: Sequence[int]) -> list[tuple[int, int]]:
        """Return the token spans ``(start, stop)`` of all matches, in ascending order and without overlap.

        Each span includes the token before the match, because the query of that token predicts the match's first
        token. Spans that overlap or touch are merged into one.

        Raises:
            SettingsRefused: the search took longer than :data:`SECONDS`.

        """
        pieces = self.read(transcript[len(self._ends) :])
        self._ends += islice(accumulate(map(len, pieces), initial=len(self._text)), 1, None)
        self._text += "".join(pieces)
        found: list[tuple[int, int]] = []
        token = 0
        for first, last in self._matches():
            while self._ends[token] <= first:
                token += 1
            stop = token
            while self._ends[stop] < last:
                stop += 1
            start = max(0, token - 1)
            if found and start <= found[-1][1]:
                found[-1] = (found[-1][0], stop + 1)
            else:
                found.append((start, stop + 1))
        return found

    def _matches(self) -> list[tuple[int, int]]:
        """Return the character spans of all non-empty matches; other threads can run during the search.

        Raises:
            SettingsRefused: the search took longer than :data:`SECONDS`.

        """
        try:
            found = [match.span() for match in self.pattern.finditer(self._text, timeout=SECONDS, concurrent=True)]
        except TimeoutError:
            raise SettingsRefused(
                f"pattern {self.pattern.pattern[:80]!r}: searching {len(self._text)} characters took longer than "
                f"{SECONDS:g} s; give a pattern without nested repetitions"
            ) from None
        return [(first, last) for first, last in found if first < last]
