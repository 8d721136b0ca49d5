"""Describe reference queries: the sources that a policy asks for, and the queries that the runtime passes to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import regex
import torch

from agentmem import specs
from agentmem.untrusted.texts import did_you_mean

Source = Literal["replay", "repeat", "spread", "transcript", "focus", "self-study", "live", "context", "random"]
"""The source of one part of the reference queries:

- ``replay``: the newest tokens of the transcript, run again at the following positions in a transient forward.
- ``repeat``: the same tokens as ``replay``, run again after an instruction (``text``).
- ``spread``: spans from all over the older transcript; successive compactions take different spans.
- ``transcript``: the whole transcript. Its bytes grow with the transcript and are not counted under the cap; reports
  state this.
- ``focus``: a text that the caller gives (``text``), which must stay recallable.
- ``self-study``: a text that the model itself writes about its memory, in scratch slots that are kept free for it.
  Successive compactions ask in turn for questions and answers, facts, a summary and structured data, or always with
  ``text`` if it is given.
- ``live``: the queries of the newest tokens, stored during the model's own forwards; their bytes are bounded.
- ``context``: a sample of the queries of all tokens so far, stored during the model's own forwards; its bytes are
  bounded.
- ``random``: random directions, scaled to the norms of the newest tokens' queries.
"""
PROBING = frozenset({"replay", "repeat", "spread", "transcript", "focus", "self-study"})
"""Sources that need a transient forward through the model."""
STORED = frozenset({"live", "context", "random"})
"""Sources whose queries are stored during the model's own forwards."""
WORDED: dict[str, tuple[str, ...]] = {
    "repeat": ("Repeat the previous context word for word.",),
    "focus": (),
    "self-study": (
        "\n\nQuestions about the text above, each with its answer:\n1.",
        "\n\nAll names, numbers and facts of the text above:\n-",
        "\n\nA summary of the text above:",
        '\n\nThe text above as structured data:\n{"',
    ),
}
"""Sources that use texts, with their default texts; successive compactions use these in turn."""
MAX_PATTERN = 4096
"""The most characters of a regular expression."""
MAX_INSTRUCTION = 32
"""The most tokens of an instruction of ``self-study``."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a mixture of reference queries."""

    source: Source
    share: float = 1.0
    """This part's share of the reference tokens, relative to the shares of the other parts."""
    weight: float = 1.0
    """The weight of each query of this part in scores and fits."""
    text: str = ""
    """The instruction of ``repeat`` or ``self-study``, or the text of ``focus``; needs a tokenizer."""

    def __post_init__(self) -> None:
        """Raise ValueError if a field has a value that cannot work."""
        if self.source not in get_args(Source):
            known = get_args(Source)
            hint = did_you_mean(self.source, known)
            raise ValueError(f"probe: {self.source!r} is unknown; {hint}choose from {', '.join(known)}")
        for name in ("share", "weight"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"probe: the {name} of {self.source!r} is {getattr(self, name)}; give one above 0")
        if self.source == "focus" and not self.text.strip():
            raise ValueError("probe: 'focus' needs a text, what must stay recallable; give focus=TEXT")

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the texts that are fed to the model for this part of the reference queries, such as an instruction.

        If ``text`` was given, the only text is ``text``. Otherwise the texts are the defaults of ``source``, the kind
        of this part. Most kinds need no text; the tuple is then empty.
        """
        return (self.text,) if self.text else WORDED.get(self.source, ())


@dataclass(frozen=True, slots=True)
class Queries:
    """The sources of a policy's reference queries: a weighted mixture of parts. No parts means no queries."""

    parts: tuple[Part, ...] = ()
    tokens: int | None = None
    """The number of reference tokens of all parts together; ``None`` lets the plan choose."""
    pattern: str = ""
    """A regular expression whose matches in the transcript matter more, for example numbers or identifiers. ``spread``
    chooses spans with matches first, and queries of matching tokens weigh ``pattern_weight`` times as much. A pattern
    needs a tokenizer."""
    pattern_weight: float = 4.0

    @classmethod
    def of(cls, text: str, tokens: int | None = None, *, focus: str = "") -> Queries:
        """Parse a mixture: terms ``source[:share][*weight]`` joined by ``+``, such as ``"replay:3+spread:1*0.5"``.

        A share is relative to the other shares; a weight applies to each query of its source. ``tokens`` is the number
        of reference tokens; ``focus`` is the text of the source ``focus``.

        Raises:
            ValueError: the text cannot be parsed, a source is unknown, or a share or weight is not positive.

        """
        terms = specs.mixture(text, "probe")
        words = {"focus": focus}
        parts = [Part(cast("Source", t.name), t.share, t.weight, words.get(t.name, "")) for t in terms]
        return cls(tuple(parts), tokens)

    def __post_init__(self) -> None:
        """Raise ValueError if a field has a value that cannot work."""
        if self.tokens is not None and (self.tokens % 1 or self.tokens < 1):
            raise ValueError(
                f"probe_tokens: {self.tokens!r} is too few or no whole number; give at least 1, or None for the plan's"
            )
        if len(self.pattern) > MAX_PATTERN:
            raise ValueError(f"pattern: it has {len(self.pattern)} characters; {MAX_PATTERN} are allowed")
        try:
            regex.compile(self.pattern)
        except (regex.error, RecursionError) as error:
            raise ValueError(f"pattern: {self.pattern[:80]!r} is no regular expression: {error}") from error
        if not 0 < self.pattern_weight < float("inf"):
            raise ValueError(f"pattern_weight: {self.pattern_weight} is no weight; give a number above 0")
        names = [part.source for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"probe: {'+'.join(names)} names a source twice; give each once, with a share")

    def __str__(self) -> str:
        """Return the names of the sources joined by ``+``, or ``none``."""
        return "+".join(part.source for part in self.parts) or "none"

    def _named(self, sources: frozenset[str]) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.source in sources)

    @property
    def probing(self) -> tuple[Part, ...]:
        """Return the parts whose reference queries come from a transient forward through the model (a probe).

        A part is one source of reference queries, such as ``replay``.
        """
        return self._named(PROBING)

    @property
    def stored(self) -> tuple[Part, ...]:
        """Return the parts whose reference queries are stored during the model's own forwards.

        A part is one source of reference queries, such as ``live``.
        """
        return self._named(STORED)

    @property
    def outside_cap(self) -> bool:
        """Return True if these reference queries need bytes that are not counted under the cap.

        Only the source ``transcript`` needs such bytes: it runs the whole transcript again.
        """
        return any(part.source == "transcript" for part in self.parts)

    def focused(self, share: float = 0.25) -> Queries:
        """Return a copy with a further source of reference queries: ``focus``, a text that must stay recallable.

        The new source gets the fraction ``share`` of the reference tokens. Its text is a placeholder, since each
        compaction brings the token ids of its own text. If ``focus`` is already a source, the same object is returned.
        """
        if any(part.source == "focus" for part in self.parts):
            return self
        rest = sum(part.share for part in self.parts)
        part = Part("focus", rest * share / (1 - share), text="brought by the caller")
        return replace(self, parts=(part, *self.parts))

    def share(self, part: Part) -> float:
        """Return the fraction of the reference tokens that ``part`` gets."""
        return part.share / sum(each.share for each in self.parts)


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference queries of ``n`` tokens in one layer: ``queries [heads * group, n, d]``.

    ``heads`` is the number of KV heads; the query heads are in the model's order. Queries are post-RoPE, in the model's
    dtype. ``span`` is the range ``(start, stop)`` of the transcript's tokens that the queries belong to; it is ``None``
    if the queries do not belong to such tokens.
    """

    queries: torch.Tensor
    weight: float = 1.0
    source: Source = "replay"
    span: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        """Return n, the number of reference tokens."""
        return int(self.queries.shape[1])
