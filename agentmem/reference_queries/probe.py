"""Choose the tokens of a probe, and record from which source each of these tokens comes.

A probe is a transient forward through the model. The queries of its tokens are the reference queries of a compaction.
The sources are texts (such as an instruction) and parts of the transcript (such as the newest tokens).
"""

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
"""Tokens before a marked span that are run again with the span, because they lead up to it."""
_GOLDEN = (math.sqrt(5) - 1) / 2
"""Successive multiples of this number, modulo 1, fill the interval 0 .. 1 evenly however many are taken."""

Words = dict["Source", tuple[tuple[int, ...], ...]]
"""The token ids of each source's texts, such as an instruction or a focus; successive compactions use them in turn."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a probe: the probe's tokens ``start`` to ``stop - 1``, whose queries have the same source and weight.

    ``span`` is the range ``(start, stop)`` of the transcript's tokens that the piece repeats. It is ``None`` if the
    piece does not repeat the transcript, but is a text such as an instruction or a focus.
    """

    start: int
    stop: int
    source: Source
    weight: float
    span: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """The token ids of one transient forward, and the pieces into which they are divided, in order."""

    ids: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def references(self, queries: torch.Tensor) -> tuple[Reference, ...]:
        """Return a :class:`Reference` for each of ``self.pieces``: the reference queries of the piece in one layer.

        A piece is a range of the probe's tokens with one source (such as an instruction) and one weight. The references
        have the order of the pieces.

        ``queries [Hq, q, d]`` are the queries of all ``q`` tokens of the probe, for ``Hq`` query heads with ``d`` dims.
        The references are views of this tensor.
        """
        return tuple(
            Reference(queries[:, piece.start : piece.stop], piece.weight, piece.source, piece.span)
            for piece in self.pieces
        )


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Consecutive token ids for a probe, all with the same source and weight."""

    source: Source
    weight: float
    ids: tuple[int, ...]
    span: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class _Source:
    """The transcript from which a probe takes tokens, and the arguments of :func:`make_probe` that choose these tokens.

    ``marks`` are spans of the transcript that match a regular expression of the policy. The queries of tokens in these
    spans weigh ``mark_weight`` times as much as they would otherwise.
    """

    transcript: Sequence[int]
    prefix: int
    turn: int
    marks: Sequence[tuple[int, int]]
    mark_weight: float
    start: int

    def stretch(self, part: Part, start: int, stop: int) -> list[_Stretch]:
        """Return the transcript's tokens ``start`` to ``stop - 1``, cut into stretches that have one weight each.

        ``self.marks`` are spans of tokens that match the policy's regular expression. Queries of tokens outside these
        spans have the weight of ``part``. Inside the spans, this weight is multiplied by ``self.mark_weight``. The
        tokens are therefore cut at both ends of every span.
        """
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
    """Make the probe that ``queries`` asks for, of at most ``tokens`` tokens.

    ``queries`` is a mixture of parts. The source of a part says what the part's tokens are: ``focus`` and
    ``self-study`` are texts, ``replay`` and ``repeat`` are the newest tokens of the transcript, ``spread`` is spans of
    the older transcript, and ``transcript`` is the whole transcript. :data:`agentmem.queries.Source` explains them all.

    The probe begins with texts and ends with the newest tokens of the transcript, so that the newest tokens attend to
    all other tokens of the probe. The probe may exceed ``tokens`` tokens only if a part has the source ``transcript``.

    Args:
        transcript: the token ids of the transcript.
        queries: the mixture of parts.
        tokens: the number of tokens to distribute among the parts, in proportion to their shares.
        words: for each source with a text or an instruction, the token ids of this text.
        prefix: the number of first tokens, which are never compacted. ``spread`` leaves out these tokens, and also the
            newest tokens if ``replay`` or ``repeat`` has them already.
        turn: the number of compactions so far. ``spread`` takes other spans after each compaction.
        start: index of the first token of the transcript that ``replay``, ``repeat`` and ``transcript`` may run.
        marks: spans of the transcript that match ``queries.pattern``. ``spread`` prefers these spans, and the queries
            of their tokens weigh ``queries.pattern_weight`` times as much.

    """
    source = _Source(transcript, prefix, turn, marks, queries.pattern_weight, start)
    sizes = _sizes(queries, tokens, words, len(transcript))
    instructions = {part.source: tuple(words.get(part.source, ())[: size - 1]) for part, size in sizes}
    newest = max((size - len(instructions[part.source]) for part, size in sizes if part.source in _NEWEST), default=0)
    stretches: list[_Stretch] = []
    for part, size in sorted(sizes, key=lambda item: _ORDER.index(item[0].source)):
        if part.source in _TEXTS:
            stretches.append(_Stretch(part.source, part.weight, tuple(words[part.source][:size])))
        elif part.source == "spread":
            stretches += _spread(part, size, source, newest)
        else:
            stretches += _recent(part, size, source, instructions[part.source])
    return _joined(stretches)


_ORDER = ("focus", "self-study", "transcript", "spread", "repeat", "replay")
_TEXTS = ("focus", "self-study")
_NEWEST = ("repeat", "replay")


def _sizes(queries: Queries, tokens: int, words: Mapping[Source, Sequence[int]], seen: int) -> list[tuple[Part, int]]:
    """Return how many tokens of a probe each part gets; parts that get none are left out.

    A part is one source of reference queries. The number ``tokens`` is divided among the parts in proportion to their
    shares. A part with the source ``focus`` or ``self-study`` runs a text, whose ids are in ``words``. If this text is
    shorter than the part's number of tokens, the parts that run no such text get the rest. A part with the source
    ``transcript`` always gets all ``seen`` tokens of the transcript.
    """
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
    """Return how many of ``tokens`` the source of each part gets, in proportion to the shares of the parts.

    The running sums of these numbers are rounded, not the numbers themselves, so that the numbers add up to ``tokens``.
    """
    ends = (0.0, *accumulate(part.share for part in parts))
    marks = [round(tokens * end / ends[-1]) for end in ends] if parts else []
    return {part.source: stop - start for part, (start, stop) in zip(parts, pairwise(marks), strict=True)}


def _recent(part: Part, size: int, source: _Source, instructions: tuple[int, ...]) -> list[_Stretch]:
    seen = len(source.transcript)
    recent = source.stretch(part, max(source.start, seen - size + len(instructions)), seen)
    return [_Stretch(part.source, part.weight, instructions), *recent] if instructions else recent


def _spread(part: Part, size: int, source: _Source, newest: int) -> list[_Stretch]:
    """Return the tokens of a ``spread`` part: at most ``size`` tokens of the older transcript.

    Up to half of the tokens come from ``source.marks`` (spans that match a pattern), and the others from evenly spread
    spans. The newest ``newest`` tokens of the transcript are left out.
    """
    stop = len(source.transcript) - newest
    marked = _marked(source, stop, size // 2)
    spans = spread_spans(source.prefix, stop, size - sum(high - low for low, high in marked), source.turn)
    # A marked span that lies inside an evenly spread span is not run twice.
    marked = [mark for mark in marked if not any(low <= mark[0] and mark[1] <= high for low, high in spans)]
    return [stretch for span in sorted(spans + marked) for stretch in source.stretch(part, *span)]


def _marked(source: _Source, stop: int, tokens: int) -> list[tuple[int, int]]:
    """Choose some of ``source.marks`` (spans that match a pattern) before the token ``stop``, and return their ranges.

    Each range ``(start, stop)`` begins up to ``LEAD`` tokens before the match. All ranges together have at most
    ``tokens`` tokens.
    The number of earlier compactions decides which span is tried first, so that successive compactions choose
    different spans.
    """
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
    """Return evenly spread spans of the range ``first`` to ``stop - 1``, of at most ``tokens`` tokens in total.

    If the whole range has at most ``tokens`` tokens, it is returned as one span. A longer range is divided into parts
    of equal length, and one span is taken from each part. ``turn``, the number of earlier compactions, decides where in
    its part each span lies, so that successive compactions reach all tokens of the range.
    """
    length = max(0, stop - first)
    if length <= tokens:
        return [(first, stop)] if length else []
    span = min(SPAN, tokens)
    count = tokens // span
    slack = length / count - span
    shift = turn * _GOLDEN % 1 * (slack + 1)  # int() rounds down; + 1 lets the last place be reached
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
