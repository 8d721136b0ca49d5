"""Adaptive budgets: give every head as many slots as an error target needs, instead of allocating a fixed total.

Before the allocation, every head is compacted to several numbers of slots, and two errors are measured on reference
queries that were not used to fit β and values: the error of the attention output, and the error of the log of the
attention mass (the sum of ``exp(logit)`` over the segment's slots). Each head then gets the fewest slots at which both
errors are within their targets. If the heads together need too many slots, all targets are multiplied by the same
factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from agentmem.contracts import BudgetRequest, Budgets, Curve
from agentmem.policies.budgets.water_filling import Demand, allocate


@dataclass(frozen=True)
class Adaptive(Budgets):
    """Allocates to each head the fewest slots at which two errors of the head are within their targets.

    The first error is that of the head's attention output; its target is ``output_error``. The second error is that of
    the head's log-mass, the log of the sum of ``exp(logit)`` over the segment's slots; its target is
    ``log_mass_error``. Before the allocation, both errors are measured for several numbers of kept slots (see
    :class:`Curve`). A larger target never leads to more slots.

    All heads together may get fewer slots than ``request.total`` (for an easy text) or more (for a hard text). They
    never get more than ``request.limit``, so that compactions do not follow each other closely. If this limit requires
    it, larger errors are accepted.
    """

    output_error: float = 0.25
    """Target for the relative L2 error of a head's attention output over the segment alone."""
    log_mass_error: float = 0.2
    """Target for the mean absolute error of the log of the segment's attention mass, in nats."""
    head_ceiling: float = 2.0
    layer_ceiling: float = 1.5
    needs_curves = True
    adaptive = True

    def __post_init__(self) -> None:
        """Raise ValueError if an error target is not a finite number above 0."""
        for name in ("output_error", "log_mass_error"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)!r} is no error target; give a number above 0")

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Allocate to each head the fewest slots at which two errors of the head are within their targets.

        These are the error of the head's attention output and the error of the log of its attention mass. If the heads
        together need more than ``request.limit`` slots, both targets of all heads are multiplied by one factor: the
        smallest factor at which at most ``request.limit`` slots are allocated.
        """
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
        """Return a function that says how many slots a head needs if its error targets are multiplied by a factor.

        The function takes the factor and returns the number of slots. The error targets are ``output_error`` for the
        attention output and ``log_mass_error`` for the log of the attention mass. ``curve`` has the head's errors for
        several numbers of slots. The function returns the fewest slots at which both errors are within the multiplied
        targets.
        """

        def slots(multiple: float) -> int:
            if math.isinf(multiple):  # every error is within an infinite target
                return 0
            needed = (
                _needed(curve.slots, curve.output, multiple * self.output_error),
                _needed(curve.slots, curve.log_mass, multiple * self.log_mass_error),
            )
            return max(needed)

        return slots


def _needed(slots: Sequence[int], errors: Sequence[float], target: float) -> int:
    """Return the smallest number of slots at which the error is at most the target.

    ``errors[i]`` was measured with ``slots[i]`` slots; between two measurements the error is interpolated linearly. If
    no error is at most the target, the largest measured number of slots is returned.
    """
    last = len(slots) - 1
    while last > 0 and errors[last - 1] <= target:
        last -= 1
    if last == 0 or errors[last] >= target:
        return slots[last]
    low, high = slots[last - 1], slots[last]
    over, under = errors[last - 1], errors[last]
    if math.isinf(over):  # the error at ``low`` was not measured
        return high
    return min(high, low + math.ceil((high - low) * (over - target) / (over - under)))
