"""Selectors: which slots of a head stay. A choice of its own, so that an ablation changes nothing else.

Highest attention looks at one slot at a time; pursuit at what the slots chosen so far leave unexplained, which fits the
mass better and drops what few queries look at. ``omp-needles`` does both: half of the slots by highest attention, and
pursuit goes on from there.
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
"""Bytes a slot that choosing the top of a head takes."""


@dataclass(frozen=True, slots=True)
class Selection:
    """``kept [t]`` int64 ascending; ``mass``, as of :func:`fit_mass`, where the selector has fitted β already."""

    kept: torch.Tensor
    mass: Solution[torch.Tensor] | None = None


class Selector(ABC):
    """Chooses the slots that stay.

    Invariants: exactly ``count`` slots, ascending; of equally good ones the newer; what is random follows from
    ``seed``; a fitted β is within ``bound`` of the old one.
    """

    @abstractmethod
    def select(self, attention: LocalAttention, found: Importance, count: int, seed: int, bound: float) -> Selection:
        """``count`` of the T slots that ``attention`` looks at; ``found`` is their importance."""

    @abstractmethod
    def workspace(self, shape: SegmentShape, rows: int) -> int:
        """Bytes that one call allocates at most, for blocks of ``rows`` queries."""


@dataclass(frozen=True)
class Highest(Selector):
    """The slots of the highest importance, pooled over ``kernel`` neighbouring slots if that is above 1."""

    kernel: int = 1

    def __post_init__(self) -> None:
        """Refuse a kernel that cannot pool."""
        check_pooling(self.kernel)

    def select(self, attention: LocalAttention, found: Importance, count: int, seed: int, bound: float) -> Selection:
        """The top; of equal ones the newer."""
        del attention, seed, bound
        return Selection(top(found.scores if self.kernel == 1 else pooled(found.scores, self.kernel, "max"), count))

    def workspace(self, shape: SegmentShape, rows: int) -> int:
        """The order of the slots."""
        del rows
        return shape.slots * (_SORT + 2 * _FLOAT)


@dataclass(frozen=True)
class Pursue(Selector):
    """Orthogonal matching pursuit of the mass; its weights are the fit of β.

    ``needles``: the fraction of the slots that highest attention chooses first.
    """

    schedule: Schedule = FAST
    needles: float = 0.0
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse a fraction that is none."""
        if not 0 <= self.needles <= 1:
            raise ValueError(f"needles: {self.needles!r} is no fraction of the slots; give 0 to 1")

    def select(self, attention: LocalAttention, found: Importance, count: int, seed: int, bound: float) -> Selection:
        """Needles first, then what the mass lacks."""
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
        """The pursuit's."""
        return pursuit_bytes(shape.slots, shape.budget, rows, shape.key_dim) + shape.slots * (_SORT + _FLOAT)


@dataclass(frozen=True)
class RandomSlots(Selector):
    """A random subset: what any selector has to beat."""

    def select(self, attention: LocalAttention, found: Importance, count: int, seed: int, bound: float) -> Selection:
        """Every subset is as likely."""
        del found, bound
        return Selection(top(lots(attention.keys, seed), count))

    def workspace(self, shape: SegmentShape, rows: int) -> int:
        """The lots and their order."""
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
    """The selector of that name.

    Raises:
        ValueError: the name is unknown.

    """
    if name not in SELECTORS:
        raise ValueError(f"selector: {name!r} is unknown; choose one of {', '.join(SELECTORS)}")
    return SELECTORS[name]()
