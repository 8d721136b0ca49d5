"""The text of a probe: which tokens a transient forward runs to obtain reference queries, and whose they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from agentmem.queries import Reference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from agentmem.queries import Part, Queries, Source

SPAN = 64
"""Tokens of one span of a ``spread`` part: long enough to be read as text, short enough to reach many places."""
LEAD = 8
"""Tokens before a marked span that are run again with it: what asks for it."""
_GOLDEN = (math.sqrt(5) - 1) / 2
"""Successive multiples of it, modulo 1, fill an interval evenly however many are taken."""

Words = dict["Source", tuple[tuple[int, ...], ...]]
"""The ids of each source's texts (an instruction, a focus), tokenized once at the edge; used one after the other."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``start .. stop`` of a probe: whose queries they give, and which part of the transcript they repeat."""

    start: int
    stop: int
    source: Source
    weight: float
    span: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """The ids of one transient forward, and its pieces in order."""

    ids: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def references(self, queries: torch.Tensor) -> tuple[Reference, ...]:
        """The pieces' views of one layer's ``queries [Hq, q, d]``."""
        return tuple(
            Reference(queries[:, piece.start : piece.stop], piece.weight, piece.source, piece.span)
            for piece in self.pieces
        )


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Ids that become one piece."""

    source: Source
    weight: float
    ids: tuple[int, ...]
    span: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class _Source:
    """What pieces are cut from: a transcript, and the spans of it that a pattern names, with their weight."""

    transcript: Sequence[int]
    prefix: int
    turn: int
    marks: Sequence[tuple[int, int]]
    mark_weight: float
    start: int

    def stretch(self, part: Part, start: int, stop: int) -> list[_Stretch]:
        """Tokens ``start .. stop``, cut where marked spans begin and end."""
        cuts = {start, stop} | {cut for mark in self.marks for cut in mark if start < cut < stop}
        return [self._stretch(part, low, high) for low, high in pairwise(sorted(cuts))]

    def _stretch(self, part: Part, start: int, stop: int) -> _Stretch:
        marked = any(low <= start and stop <= high for low, high in self.marks)
        weight = part.weight * (self.mark_weight if marked else 1.0)
        return _Stretch(part.source, weight, tuple(self.transcript[start:stop]), (start, stop))


def make_probe(
    transcript: Sequence[int],
    queries: Queries,
    tokens: int,
    words: Mapping[Source, Sequence[int]],
    *,
    prefix: int,
    turn: int,
    start: int = 0,
    marks: Sequence[tuple[int, int]] = (),
) -> Probe:
    """The probe of at most ``tokens`` tokens that a mixture asks for; only ``transcript`` may be longer.

    ``spread`` spans leave out the first ``prefix`` tokens, which are never compacted, and what ``replay`` or ``repeat``
    run again, and nothing before ``start`` is run at all; ``turn`` counts compactions and moves the spans. Spans of the
    transcript in ``marks`` (those that a pattern names) come first among them, and their queries weigh more. Texts come
    first and the newest tokens last, so that the newest tokens' queries see what they will be followed by.
    """
    source = _Source(transcript, prefix, turn, marks, queries.pattern_weight, start)
    sizes = _sizes(queries, tokens, words, len(transcript))
    told = {part.source: tuple(words.get(part.source, ())[: size - 1]) for part, size in sizes}
    newest = max((size - len(told[part.source]) for part, size in sizes if part.source in _NEWEST), default=0)
    stretches: list[_Stretch] = []
    for part, size in sorted(sizes, key=lambda item: _ORDER.index(item[0].source)):
        if part.source in _TEXTS:
            stretches.append(_Stretch(part.source, part.weight, tuple(words[part.source][:size])))
        elif part.source == "spread":
            stretches += _spread(part, size, source, newest)
        else:
            stretches += _recent(part, size, source, told[part.source])
    return _joined(stretches)


_ORDER = ("focus", "self-study", "transcript", "spread", "repeat", "replay")
_TEXTS = ("focus", "self-study")
_NEWEST = ("repeat", "replay")


def _sizes(queries: Queries, tokens: int, words: Mapping[Source, Sequence[int]], seen: int) -> list[tuple[Part, int]]:
    """Tokens of every probing part; what a text leaves of its share goes to the others."""
    sizes = _shared(tokens, queries.probing)
    others = [part for part in queries.probing if part.source not in _TEXTS]
    for text in _TEXTS:
        if text in sizes:
            spare, sizes[text] = sizes[text], min(sizes[text], len(words.get(text, ())))
            for source, more in _shared(spare - sizes[text], others).items():
                sizes[source] += more
    if "transcript" in sizes:
        sizes["transcript"] = seen
    return [(part, sizes[part.source]) for part in queries.probing if sizes[part.source]]


def _shared(tokens: int, parts: Sequence[Part]) -> dict[Source, int]:
    """All tokens by the parts' shares; running sums are what is rounded, so that no token is lost."""
    ends = (0.0, *accumulate(part.share for part in parts))
    marks = [round(tokens * end / ends[-1]) for end in ends] if parts else []
    return {part.source: stop - start for part, (start, stop) in zip(parts, pairwise(marks), strict=True)}


def _recent(part: Part, size: int, source: _Source, told: tuple[int, ...]) -> list[_Stretch]:
    seen = len(source.transcript)
    recent = source.stretch(part, max(source.start, seen - size + len(told)), seen)
    return [_Stretch(part.source, part.weight, told), *recent] if told else recent


def _spread(part: Part, size: int, source: _Source, newest: int) -> list[_Stretch]:
    """Marked spans first, half of the tokens at most; then evenly spread ones."""
    stop = len(source.transcript) - newest
    marked = _marked(source, stop, size // 2)
    spans = spread_spans(source.prefix, stop, size - sum(high - low for low, high in marked), source.turn)
    # A mark inside a span that is run again anyway is not run twice.
    marked = [mark for mark in marked if not any(low <= mark[0] and mark[1] <= high for low, high in spans)]
    return [stretch for span in sorted(spans + marked) for stretch in source.stretch(part, *span)]


def _marked(source: _Source, stop: int, tokens: int) -> list[tuple[int, int]]:
    """Marked spans before ``stop`` with what leads up to them: as many as fit, others at every turn."""
    found: list[tuple[int, int]] = []
    for low, high in source.marks:
        start = max(source.prefix if not found else found[-1][1], low - LEAD)
        if low >= source.prefix and start < high <= stop:
            found.append((start, high))
    if not found:
        return []
    first = int(source.turn * _GOLDEN % 1 * len(found))
    chosen: list[tuple[int, int]] = []
    for low, high in found[first:] + found[:first]:
        if high - low <= tokens:
            chosen.append((low, high))
            tokens -= high - low
    return chosen


def spread_spans(first: int, stop: int, tokens: int, turn: int) -> list[tuple[int, int]]:
    """Spans of at most ``tokens`` tokens in all, one in each of equally long strata of ``first .. stop``.

    All of it where it is no longer than that. The place within the strata moves with ``turn`` by the golden ratio, so
    that successive compactions come by everywhere.
    """
    length = max(0, stop - first)
    if length <= tokens:
        return [(first, stop)] if length else []
    span = min(SPAN, tokens)
    count = tokens // span
    slack = length / count - span
    shift = turn * _GOLDEN % 1 * (slack + 1)  # rounded down, so that the last place has its turns too
    starts = [first + int(index * length / count + shift) for index in range(count)]
    return [(start, start + span) for start in starts]


def _joined(stretches: Sequence[_Stretch]) -> Probe:
    ids: list[int] = []
    pieces = []
    for each in stretches:
        if each.ids:
            pieces.append(Piece(len(ids), len(ids) + len(each.ids), each.source, each.weight, each.span))
            ids += each.ids
    return Probe(tuple(ids), tuple(pieces))
