"""Reference queries: which sources a policy asks for, and what the runtime hands to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import regex
import torch

from agentmem import specs
from agentmem.untrusted.texts import did_you_mean

Source = Literal["replay", "repeat", "spread", "transcript", "focus", "self-study", "live", "context", "random"]
"""Where one part of the reference queries comes from:

- ``replay``: the newest tokens of the transcript, run again at the following positions in a transient forward.
- ``repeat``: the same behind an instruction (``text``).
- ``spread``: spans from all over the older transcript, other ones at every compaction.
- ``transcript``: the whole transcript. Its cost grows without bound: an oracle, outside the cap and labelled so.
- ``focus``: a text that the caller gives (``text``): what must stay recallable.
- ``self-study``: what the model itself writes about its memory (questions and answers, facts, a summary, structured
  data: one after the other at successive compactions, or after ``text``), in scratch slots that are kept free for it.
- ``live``: the queries of the newest tokens, kept from the model's own forwards, bounded in bytes.
- ``context``: a sample of the queries of everything read so far, kept likewise.
- ``random``: random directions with the norms of live queries.
"""
PROBING = frozenset({"replay", "repeat", "spread", "transcript", "focus", "self-study"})
"""Sources that need a transient forward through the model."""
STORED = frozenset({"live", "context", "random"})
"""Sources that store queries of the model's own forwards."""
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
"""Sources that use texts, with their defaults: one after the other at successive compactions."""
MAX_PATTERN = 4096
"""Characters of a regular expression."""
MAX_INSTRUCTION = 32
"""Tokens of an instruction of ``self-study`` at most."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a mixture of reference queries."""

    source: Source
    share: float = 1.0
    """Of the reference tokens, relative to the other parts' shares."""
    weight: float = 1.0
    """Of each of its queries in scores and fits."""
    text: str = ""
    """The instruction of ``repeat`` or ``self-study``, the text of ``focus``; needs a tokenizer."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
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
        """The texts to tokenize: its own, or the source's defaults; none for sources without."""
        return (self.text,) if self.text else WORDED.get(self.source, ())


@dataclass(frozen=True, slots=True)
class Queries:
    """Where reference queries come from: a weighted mixture of parts; none for policies that need no queries."""

    parts: tuple[Part, ...] = ()
    tokens: int | None = None
    """Reference tokens of all parts together; ``None`` lets the plan choose."""
    pattern: str = ""
    """A regular expression over the transcript: ``spread`` comes by what it matches first, and all queries of matching
    tokens (numbers, identifiers) weigh ``pattern_weight`` times as much. Needs a tokenizer."""
    pattern_weight: float = 4.0

    @classmethod
    def of(cls, text: str, tokens: int | None = None, *, focus: str = "") -> Queries:
        """Parse ``"replay"``, ``"replay+spread"``, ``"replay:3+spread:1*0.5"``: ``source[:share][*weight]``, joined.

        Raises:
            ValueError: the text cannot be read, a source is unknown, or a share or weight is not positive.

        """
        terms = specs.mixture(text, "probe")
        words = {"focus": focus}
        parts = [Part(cast("Source", t.name), t.share, t.weight, words.get(t.name, "")) for t in terms]
        return cls(tuple(parts), tokens)

    def __post_init__(self) -> None:
        """Refuse a mixture that cannot run."""
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
        """The sources, joined."""
        return "+".join(part.source for part in self.parts) or "none"

    def _named(self, sources: frozenset[str]) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.source in sources)

    @property
    def probing(self) -> tuple[Part, ...]:
        """The parts that need a transient forward through the model."""
        return self._named(PROBING)

    @property
    def stored(self) -> tuple[Part, ...]:
        """The parts that keep queries of the model's own forwards."""
        return self._named(STORED)

    @property
    def outside_cap(self) -> bool:
        """Whether some part's cost is not bounded by the cap."""
        return any(part.source == "transcript" for part in self.parts)

    def focused(self, share: float = 0.25) -> Queries:
        """The same mixture with a ``focus`` part, whose text the caller brings, for that share of the tokens."""
        if any(part.source == "focus" for part in self.parts):
            return self
        rest = sum(part.share for part in self.parts)
        part = Part("focus", rest * share / (1 - share), text="brought by the caller")
        return replace(self, parts=(part, *self.parts))

    def share(self, part: Part) -> float:
        """The fraction of the reference tokens that is this part's."""
        return part.share / sum(each.share for each in self.parts)


@dataclass(frozen=True, slots=True)
class Reference:
    """One stretch of reference queries, as attention gets them: ``queries [heads * group, n, d]``.

    Query heads in the model's order, post-RoPE, in the model's dtype. ``span`` says which tokens of the transcript
    they are the queries of, where they are of any.
    """

    queries: torch.Tensor
    weight: float = 1.0
    source: Source = "replay"
    span: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        """n, the number of reference tokens."""
        return int(self.queries.shape[1])
