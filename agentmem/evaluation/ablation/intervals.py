"""Bootstrap confidence intervals of means and of paired differences, by :func:`scipy.stats.bootstrap`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from agentmem.evaluation.terms import Frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEAST = 2
"""Units from which on an interval says anything."""
_EQUAL = 1e-12
"""Relative spread that is rounding."""


class Interval(Frozen):
    """A mean over ``units``, and the interval of the given confidence around it; ``None`` below two units."""

    mean: float
    low: float | None
    high: float | None
    units: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def of_mean(values: Sequence[float], *, confidence: float, resamples: int) -> Interval:
    """The mean of ``values`` and its bias-corrected and accelerated interval.

    The random numbers are the same at every call, so that a report drawn again shows the same figures.
    Equivalent to resampling ``values`` with replacement, taking the mean of each resample, and reading its quantiles
    where BCa puts them.
    Source: Efron, "Better Bootstrap Confidence Intervals", JASA 82 (1987).
    """
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if len(found) < _LEAST:
        return Interval(mean=mean, low=None, high=None, units=len(found))
    if np.ptp(found) <= _EQUAL * np.abs(found).max():  # every resample has this mean; BCa would divide by zero
        return Interval(mean=mean, low=mean, high=mean, units=len(found))
    interval = stats.bootstrap(
        (found,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, 2**20 // len(found)),  # at most 8 MB of resampled numbers at once
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean=mean, low=float(interval.low), high=float(interval.high), units=len(found))


def of_difference(ours: Sequence[float], theirs: Sequence[float], *, confidence: float, resamples: int) -> Interval:
    """The mean of ``ours - theirs``, unit by unit: what both share, such as a hard passage, cancels out."""
    paired = [one - other for one, other in zip(ours, theirs, strict=True)]
    return of_mean(paired, confidence=confidence, resamples=resamples)
