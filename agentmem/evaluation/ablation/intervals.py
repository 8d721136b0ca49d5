"""Compute bootstrap confidence intervals of means and paired differences with :func:`scipy.stats.bootstrap`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from agentmem.evaluation.terms import Frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEAST = 2
"""The least number of units for which an interval is computed."""
_EQUAL = 1e-12
"""Largest spread of values that count as equal, relative to the largest value; rounding can cause such a spread."""


class Interval(Frozen):
    """A mean over ``units`` units, such as facts or samples, with its confidence interval.

    ``low`` and ``high`` are the ends of the interval; both are ``None`` if there is only one unit.
    """

    mean: float
    low: float | None
    high: float | None
    units: int

    @property
    def excludes_zero(self) -> bool:
        """Return True if zero lies outside the interval; False if there is no interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def of_mean(values: Sequence[float], *, confidence: float, resamples: int) -> Interval:
    """Return the mean of ``values`` and its bias-corrected and accelerated (BCa) bootstrap interval.

    ``confidence`` is the confidence level of the interval. The values are resampled with replacement ``resamples``
    times. The ends of the interval are two quantiles of the means of these resamples. BCa chooses these two quantiles
    from ``confidence`` and ``values``. Every call uses the same random numbers, so that a report made again has the
    same intervals.
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
    """Return the mean of the differences ``ours - theirs`` and its bootstrap interval; see :func:`of_mean`.

    ``ours`` and ``theirs`` have the scores of the same units in the same order. Only the differences count: a difficult
    passage that lowers both scores equally does not widen the interval.
    """
    paired = [one - other for one, other in zip(ours, theirs, strict=True)]
    return of_mean(paired, confidence=confidence, resamples=resamples)
