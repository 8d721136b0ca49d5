"""What a solver returns: the value that it found, how the search for it ended, and figures about the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

T = TypeVar("T")


class Outcome(Enum):
    """How a solver ended. The text says what was wrong, and what helps where something does."""

    SOLVED = "solved"
    STOPPED = "stopped at the limit of steps before it converged; raise the ridge"
    """The value is the last point, which is usable but not exact."""
    REFUSED = "no fit was better"
    """The value is the start: the fit's error on the fitting queries was not below the start's."""
    SINGULAR = "equations singular to rounding; raise the ridge"
    """The value is the start: the equations could not be factored with the largest multiple of the ridge."""


@dataclass(frozen=True, slots=True)
class Solution(Generic[T]):
    """The result of a solver; what ``value`` is and which ``stats`` there are, the solver's docstring says.

    ``condition`` estimates the condition number of the equations that were solved: 1 where none was estimated, infinity
    where they were singular.
    """

    value: T
    outcome: Outcome = Outcome.SOLVED
    condition: float = 1.0
    stats: Mapping[str, float] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """Whether the value is a fit, and not the start that is returned where no fit was better."""
        return self.outcome in {Outcome.SOLVED, Outcome.STOPPED}
