"""One forward for several turns: each one's next tokens, fed together, with a result of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from agentmem.memory.forwards import Arriving, Packed
from agentmem.memory.torch_state import torch_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.engine.engine import Engine
    from agentmem.memory.forwards import Append


def ambient() -> tuple[object, ...]:
    """What of torch's state belongs to a thread and changes a forward; only turns that agree in it are fed together."""
    return (torch_state(), torch.get_num_threads(), torch.is_inference_mode_enabled())


class Outcome(NamedTuple):
    """What became of a :class:`Want`: ``logits [V]`` after the ``fed`` th token, or the error of its own part."""

    fed: int = 0
    logits: torch.Tensor | None = None
    error: Exception | None = None


def _nobody() -> None:
    """Nobody is to be woken."""


@dataclass(eq=False, slots=True)
class Want:
    """Tokens that a turn wants to be fed next, at its sequence's next positions; the memory has one sequence.

    What was fed is consumed when the turn itself calls :meth:`agentmem.engine.engine.Engine.commit`; until then it can
    be fed again.
    """

    engine: Engine
    ids: Sequence[int]
    turn: object = None
    """Stands for the turn."""
    priority: int = 0
    """Higher ones are fed first."""
    most: int = 1 << 30
    """Tokens of a forward that feeds others, too."""
    alone: bool = False
    """Whether the model cannot be fed several sequences at once."""
    ambient: tuple[object, ...] = field(default_factory=ambient)
    wake: Callable[[], None] = _nobody
    """Called from any thread when the outcome is there, or when it may be the turn's part to feed."""
    passed: int = 0
    """Forwards that fed others meanwhile."""
    outcome: Outcome | None = None

    @property
    def done(self) -> bool:
        """Whether there is an outcome."""
        return self.outcome is not None

    def result(self) -> tuple[int, torch.Tensor]:
        """How many tokens were fed, from the first on, and the logits ``[V]`` after the last of them.

        Raises:
            AgentmemError: what the forward of these tokens raised, and other errors likewise.

        """
        outcome = self.outcome or Outcome()
        if outcome.error is not None:
            raise outcome.error
        assert outcome.logits is not None  # noqa: S101  # whoever asks has waited for the outcome
        return outcome.fed, outcome.logits


class _Part(NamedTuple):
    """A want whose forward has begun."""

    want: Want
    append: Append

    @property
    def tokens(self) -> int:
        """How many it feeds."""
        return len(self.append.arriving[0].ids)


def feed(shares: Sequence[tuple[Want, int]]) -> None:
    """Run one forward over the first tokens, so many, of each want, and note the outcomes.

    A part that cannot begin, or fails by itself, has an error for its outcome and disturbs no other. Whatever else
    ends this (an interrupt) leaves wants without an outcome, which can be fed again.
    """
    holds: list[object] = []  # that this thread owns the memories; emptied, as a traceback may be kept
    try:
        parts = [part for part in (_begun(want, count, holds) for want, count in shares) if part is not None]
        if parts:
            _run(sorted(parts, key=lambda part: part.tokens > 1))  # single tokens first: they attend in one call
    finally:
        holds.clear()


def _begun(want: Want, count: int, holds: list[object]) -> _Part | None:
    """Make room for a want's tokens; its failure is its outcome."""
    engine, sequence = want.engine, want.engine.memory.sequences[0]
    try:
        holds.append(engine.memory.owner.take())
        start = sequence.next_position + sequence.shift  # as whoever feeds counts
        ids = want.ids[:count]
        append = engine.begin([Arriving(ids, range(start, start + len(ids)), slice(None))])
    except Exception as error:  # noqa: BLE001  # it ends this turn alone
        want.outcome = Outcome(error=error)
        return None
    append.columns = len(ids)
    return _Part(want, append)


def _run(parts: Sequence[_Part]) -> None:
    try:
        logits = _forward(parts)
    except Exception as error:  # noqa: BLE001  # likewise
        for part in parts:
            part.want.engine.abandon()
        if len(parts) == 1:
            parts[0].want.outcome = Outcome(error=error)
            return
        for part in parts:  # whose fault it was shows when each is run alone
            feed([(part.want, part.tokens)])
        return
    for part, row in zip(parts, logits, strict=True):
        part.want.outcome = Outcome(part.tokens, row)


def _forward(parts: Sequence[_Part]) -> torch.Tensor:
    """Logits ``[n, V]`` after the last token of each part."""
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    for part in parts:
        (arriving,), (sequence,) = part.append.arriving, part.append.memory.sequences
        ids.extend(arriving.ids)
        positions.extend(position - sequence.shift for position in arriving.positions)
        ends.append(len(ids) - 1)
    return parts[0].want.engine.forwards.packed(ids, positions, ends, Packed([part.append for part in parts]))
