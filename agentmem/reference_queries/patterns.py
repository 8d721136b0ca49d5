"""Marks: which tokens of a transcript a regular expression names."""

from __future__ import annotations

import re
from itertools import accumulate, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Marks:
    """Spans of one row's transcript that match a pattern; what was read is kept, so that a call costs what is new."""

    def __init__(self, pattern: str, read: Callable[[Sequence[int]], list[str]]) -> None:
        """``read`` gives the text of each id."""
        self.pattern, self.read = re.compile(pattern), read
        self._text = ""
        self._ends: list[int] = []

    def spans(self, transcript: Sequence[int]) -> list[tuple[int, int]]:
        """Token spans ``start .. stop`` of all matches, with the token before, whose query asks for the first.

        Ascending and apart; matches that touch become one span.
        """
        pieces = self.read(transcript[len(self._ends) :])
        self._ends += islice(accumulate(map(len, pieces), initial=len(self._text)), 1, None)
        self._text += "".join(pieces)
        found: list[tuple[int, int]] = []
        token = 0
        for match in self.pattern.finditer(self._text):
            if match.start() == match.end():
                continue
            while self._ends[token] <= match.start():
                token += 1
            stop = token
            while self._ends[stop] < match.end():
                stop += 1
            start = max(0, token - 1)
            if found and start <= found[-1][1]:
                found[-1] = (found[-1][0], stop + 1)
            else:
                found.append((start, stop + 1))
        return found
