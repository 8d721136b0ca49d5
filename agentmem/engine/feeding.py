"""Run one forward over the next tokens of several turns, with a separate result for each turn.

A turn is one use of a session: its memory reads a prompt, and the model may write a reply. A turn's request to feed
tokens is a :class:`Want`. The result of the request is an :class:`Outcome`.
"""

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
    """Return the settings of torch in the current thread that affect a forward.

    Turns are fed in one forward only if these values are equal.
    """
    return (torch_state(), torch.get_num_threads(), torch.is_inference_mode_enabled())


class Outcome(NamedTuple):
    """The result of a turn's request to feed tokens.

    It has the number of fed tokens and the ``logits [V]`` after the last of them. If the forward failed, it has only
    the error.
    """

    fed: int = 0
    logits: torch.Tensor | None = None
    error: Exception | None = None


def _nobody() -> None:
    """Do nothing: the default of :attr:`Want.wake`."""


@dataclass(eq=False, slots=True)
class Want:
    """A turn's request to feed tokens at the next positions of its memory's only sequence.

    Fed tokens count as consumed only after the turn has called :meth:`agentmem.engine.engine.Engine.commit`; until then
    they can be fed again.
    """

    engine: Engine
    ids: Sequence[int]
    turn: object = None
    """Any object that identifies the turn."""
    priority: int = 0
    """Wants with higher priority are fed first."""
    most: int = 1 << 30
    """The most tokens in total that a forward may have if it feeds this want together with others."""
    alone: bool = False
    """True if this want must be fed in a forward of its own."""
    ambient: tuple[object, ...] = field(default_factory=ambient)
    wake: Callable[[], None] = _nobody
    """A callback that wakes the turn, because its outcome is set or because it may be time for a forward.

    The callback may be called from any thread.
    """
    passed: int = 0
    """The number of forwards that fed other wants while this want waited."""
    outcome: Outcome | None = None

    @property
    def done(self) -> bool:
        """True if the outcome is set."""
        return self.outcome is not None

    def result(self) -> tuple[int, torch.Tensor]:
        """Return the number of fed tokens and the logits ``[V]`` after the last of them.

        A forward may feed only the first tokens of a want. Call this only after the outcome has been set.

        Raises:
            AgentmemError: the forward of these tokens failed with this error. Errors of other types are raised, too.

        """
        outcome = self.outcome or Outcome()
        if outcome.error is not None:
            raise outcome.error
        assert outcome.logits is not None  # noqa: S101  # whoever asks has waited for the outcome
        return outcome.fed, outcome.logits


class _Part(NamedTuple):
    """One turn's part of a forward that feeds tokens of several turns.

    ``want`` is the turn's request to feed tokens. ``append`` has the tokens that this forward feeds, and appends their
    slots to the turn's memory.
    """

    want: Want
    append: Append

    @property
    def tokens(self) -> int:
        """The number of tokens that this part feeds."""
        return len(self.append.arriving[0].ids)


def feed(shares: Sequence[tuple[Want, int]]) -> None:
    """Feed the first tokens of several requests in one forward, and set the outcome of each request.

    ``shares`` lists the requests, each with the number of its tokens to feed. If a request fails, its outcome is the
    error, and the other requests are not affected. An interrupt can leave requests without an outcome; these requests
    can be fed again.
    """
    holds: list[object] = []  # the ownership of the memories; emptied at the end, because a traceback may keep the list
    try:
        parts = [part for part in (_begun(want, count, holds) for want, count in shares) if part is not None]
        if parts:
            _run(sorted(parts, key=lambda part: part.tokens > 1))  # single tokens first: they attend in one call
    finally:
        holds.clear()


def _begun(want: Want, count: int, holds: list[object]) -> _Part | None:
    """Make room for the first ``count`` tokens of a request, and return the part of the forward that feeds them.

    The request ``want`` asks for tokens to be fed into a memory. The current thread becomes the owner of this memory.
    An object is added to ``holds``, and the thread stays the owner while this object exists. On failure, the error
    becomes the outcome of the request, and the result is ``None``.
    """
    engine, sequence = want.engine, want.engine.memory.sequences[0]
    try:
        holds.append(engine.memory.owner.take())
        start = sequence.next_position + sequence.shift  # the caller's count of positions
        ids = want.ids[:count]
        append = engine.begin([Arriving(ids, range(start, start + len(ids)), slice(None))])
    except Exception as error:  # noqa: BLE001  # the error becomes the outcome of this want only
        want.outcome = Outcome(error=error)
        return None
    append.columns = len(ids)
    return _Part(want, append)


def _run(parts: Sequence[_Part]) -> None:
    try:
        logits = _forward(parts)
    except Exception as error:  # noqa: BLE001  # the error becomes the outcome of the part that failed
        for part in parts:
            part.want.engine.abandon()
        if len(parts) == 1:
            parts[0].want.outcome = Outcome(error=error)
            return
        for part in parts:  # run each part alone to find which one failed
            feed([(part.want, part.tokens)])
        return
    for part, row in zip(parts, logits, strict=True):
        part.want.outcome = Outcome(part.tokens, row)


def _forward(parts: Sequence[_Part]) -> torch.Tensor:
    """Run the ``n`` parts in one forward, and return the logits ``[n, V]`` after the last token of each part."""
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    for part in parts:
        (arriving,), (sequence,) = part.append.arriving, part.append.memory.sequences
        ids.extend(arriving.ids)
        positions.extend(position - sequence.shift for position in arriving.positions)
        ends.append(len(ids) - 1)
    return parts[0].want.engine.forwards.packed(ids, positions, ends, Packed([part.append for part in parts]))
