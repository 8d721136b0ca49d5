"""The result type of all solvers: the value found, how the search ended, and statistics of the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

T = TypeVar("T")


class Outcome(Enum):
    """The way in which a solver ended; the text of a member names the problem and the remedy, if any."""

    SOLVED = "solved"
    STOPPED = "stopped at the limit of steps before it converged; raise the ridge"
    """The value is the last point, which is usable but not exact."""
    REFUSED = "no fit was better"
    """The value is the start: the fit's error on the fitting queries was not below the start's."""
    SINGULAR = "equations singular to rounding; raise the ridge"
    """The value is the start: the equations could not be factored with the largest multiple of the ridge."""


@dataclass(frozen=True, slots=True)
class Solution(Generic[T]):
    """The result of a solver; the docstring of each solver describes its ``value`` and its ``stats``.

    ``condition`` estimates the condition number of the solved equations. It is 1 if none was estimated, and infinity if
    the equations were singular.
    """

    value: T
    outcome: Outcome = Outcome.SOLVED
    condition: float = 1.0
    stats: Mapping[str, float] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """Return True if the value is a fit, False if the value is the unchanged start because no fit was better."""
        return self.outcome in {Outcome.SOLVED, Outcome.STOPPED}
