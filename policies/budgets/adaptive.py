"""Adaptive budgets: as many slots as an error target needs, instead of a fixed number.

Every head's errors on held-out queries are measured at several sizes; each head gets the fewest slots at which both
errors are within the target. Where that is more than the memory can leave and still go on, the target is loosened for
all heads alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from agentmem.contracts import BudgetRequest, Budgets, Curve
from agentmem.policies.budgets.water_filling import Demand, allocate


@dataclass(frozen=True)
class Adaptive(Budgets):
    """Allocates by error curves. A larger target never allocates more slots.

    The memory keeps a part of its capacity free whatever the curves say, so that compactions do not follow each other
    closely; an easy text is compacted further than ``target`` would, a hard one less.
    """

    output_error: float = 0.25
    """Relative L2 error of a head's local attention output."""
    log_mass_error: float = 0.2
    """Mean absolute error of the log of the segment's attention mass."""
    head_ceiling: float = 2.0
    layer_ceiling: float = 1.5
    needs_curves = True
    adaptive = True

    def __post_init__(self) -> None:
        """Refuse targets that no compaction can meet."""
        for name in ("output_error", "log_mass_error"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)!r} is no error target; give a number above 0")

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """The fewest slots within the target, or within the tightest multiple of it that fits."""
        if len(request.surveys) != len(request.held):
            raise ValueError(
                f"{len(request.surveys)} surveys for {len(request.held)} layers: adaptive budgets read error curves; "
                "allocate them in a memory, which surveys every layer first"
            )
        demands = [[self._demand(curve) for curve in survey.curves] for survey in request.surveys]
        wanted = sum(
            min(max(request.floor, demand(1.0)), held, request.ceiling)
            for row, layer in zip(demands, request.held, strict=True)
            for demand, held in zip(row, layer, strict=True)
        )
        return allocate(replace(request, total=min(request.limit, wanted)), demands)

    def _demand(self, curve: Curve) -> Demand:
        """Slots that keep both errors within a multiple of their targets."""

        def slots(multiple: float) -> int:
            if math.isinf(multiple):  # any error will do
                return 0
            needed = (
                _needed(curve.slots, curve.output, multiple * self.output_error),
                _needed(curve.slots, curve.log_mass, multiple * self.log_mass_error),
            )
            return max(needed)

        return slots


def _needed(slots: Sequence[int], errors: Sequence[float], target: float) -> int:
    """The fewest slots whose error, interpolated between the measured sizes, is at most the target."""
    last = len(slots) - 1
    while last > 0 and errors[last - 1] <= target:
        last -= 1
    if last == 0 or errors[last] >= target:
        return slots[last]
    low, high = slots[last - 1], slots[last]
    over, under = errors[last - 1], errors[last]
    if math.isinf(over):  # nothing was measured there
        return high
    return min(high, low + math.ceil((high - low) * (over - target) / (over - under)))
