"""The selectors of Attention Matching: classes that choose which slots of a head stay.

``highest`` chooses the slots that receive most attention, and judges each slot by itself. ``omp`` (orthogonal matching
pursuit) adds slots step by step; each step adds the slots that best restore the attention mass still missing. It fits
the mass better than ``highest``, but drops slots that few queries attend to. ``omp-needles`` combines both: half of the
slots are chosen as by ``highest``, the other half by pursuit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from agentmem.contracts import SegmentShape
from agentmem.policies.compactors.eviction import check_pooling, pooled
from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.lots import lots
from agentmem.policies.solvers.pursuit import EXACT, FAST, PROGRESSIVE, Schedule, pursue, pursuit_bytes
from agentmem.policies.solvers.selection import Importance, top
from agentmem.policies.solvers.solution import Solution

_FLOAT = 4
_SORT = 28
"""Bytes per slot that choosing the top slots of a head takes."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The choice of a selector: the indices ``kept [t]`` int64, ascending, of the slots that stay.

    ``mass`` is the solution of the β fit, as :func:`fit_mass` returns it, or ``None`` if the selector fits no β.
    """

    kept: torch.Tensor
    mass: Solution[torch.Tensor] | None = None


class Selector(ABC):
    """Chooses the slots that stay.

    Invariants: exactly ``count`` slots are chosen, in ascending order; of equally good slots the newer is chosen;
    random choices are determined by ``seed``; a fitted β differs from the old β by at most ``bound``.
    """

    @abstractmethod
    def select(self, attention: LocalAttention, found: Importance, count: int, seed: int, bound: float) -> Selection:
        """Choose ``count`` of the T slots that ``attention`` covers; ``found`` is the importance of these slots."""

    @abstractmethod
    def workspace(self, shape: SegmentShape, rows: int) -> int:
        """Return an upper bound of the bytes that one :meth:`select` allocates, for blocks of ``rows`` queries."""


@dataclass(frozen=True)
class Highest(Selector):
    """Chooses the most important slots; a ``kernel`` above 1 max-pools importance over that many neighbouring slots."""

    kernel: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError if ``kernel`` is not odd and positive."""
        check_pooling(self.kernel)

    def select(self, attention: LocalAttention, found: Importance, count: int, seed: int, bound: float) -> Selection:
        """Choose the ``count`` most important slots; of equally important slots, the newer is chosen."""
        del attention, seed, bound
        return Selection(top(found.scores if self.kernel == 1 else pooled(found.scores, self.kernel, "max"), count))

    def workspace(self, shape: SegmentShape, rows: int) -> int:
        """Return the bytes of ranking the slots."""
        del rows
        return shape.slots * (_SORT + 2 * _FLOAT)


@dataclass(frozen=True)
class Pursue(Selector):
    """Chooses slots by orthogonal matching pursuit of the attention mass; the pursuit also fits the β of these slots.

    Of the slots to choose, the fraction ``needles`` is chosen by importance first, and the rest by pursuit.
    """

    schedule: Schedule = FAST
    needles: float = 0.0
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        """Raise ValueError if ``needles`` is outside 0 … 1."""
        if not 0 <= self.needles <= 1:
            raise ValueError(f"needles: {self.needles!r} is no fraction of the slots; give 0 to 1")

    def select(self, attention: LocalAttention, found: Importance, count: int, seed: int, bound: float) -> Selection:
        """Choose ``count`` slots: the fraction ``needles`` of them by importance, the others by pursuit.

        Pursuit adds slots step by step. Each step adds the slots that best restore the attention mass still missing.
        """
        del seed
        keep = top(found.scores, int(count * self.needles)) if self.needles else None
        result = pursue(
            attention,
            found.log_mass,
            count,
            schedule=self.schedule,
            ridge=self.ridge,
            bound=bound,
            cutoff=-bound,
            keep=keep,
        )
        kept, log_weights = result.value
        return Selection(kept, Solution(log_weights, result.outcome, result.condition, result.stats))

    def workspace(self, shape: SegmentShape, rows: int) -> int:
        """Return an upper bound of the bytes of the pursuit and of ranking the slots by importance."""
        return pursuit_bytes(shape.slots, shape.budget, rows, shape.key_dim) + shape.slots * (_SORT + _FLOAT)


@dataclass(frozen=True)
class RandomSlots(Selector):
    """Chooses a random subset; a baseline that every other selector should beat."""

    def select(self, attention: LocalAttention, found: Importance, count: int, seed: int, bound: float) -> Selection:
        """Choose ``count`` slots; every subset of that size is equally likely."""
        del found, bound
        return Selection(top(lots(attention.keys, seed), count))

    def workspace(self, shape: SegmentShape, rows: int) -> int:
        """Return the bytes of the random numbers and of ranking them."""
        del rows
        return shape.slots * (_SORT + 2 * _FLOAT) + shape.key_dim * 2 * _FLOAT


SELECTORS: dict[str, Callable[[], Selector]] = {
    "highest": Highest,
    "pooled": lambda: Highest(kernel=5),
    "omp": lambda: Pursue(EXACT),
    "omp-fast": Pursue,
    "omp-progressive": lambda: Pursue(PROGRESSIVE),
    "omp-needles": lambda: Pursue(needles=0.5),
    "random": RandomSlots,
}


def selector(name: str) -> Selector:
    """Return a new selector by its name in :data:`SELECTORS`.

    Raises:
        ValueError: the name is unknown.

    """
    if name not in SELECTORS:
        raise ValueError(f"selector: {name!r} is unknown; choose one of {', '.join(SELECTORS)}")
    return SELECTORS[name]()
