"""Bootstrap intervals against the same numbers worked out by hand."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from agentmem.evaluation.ablation.intervals import of_difference, of_mean

VALUES = [float(value) for value in np.random.default_rng(1).exponential(size=30)]
"""Skewed, as KL is; no resample has exactly their mean."""


def bca(values: list[float], confidence: float, resamples: int) -> tuple[float, float]:
    """Efron's BCa interval of a mean, step by step, from the same random numbers."""
    generator, count, normal = np.random.default_rng(0), len(values), NormalDist()
    chosen = generator.integers(0, count, (resamples, count))
    means = [sum(values[place] for place in row) / count for row in chosen]
    mean = sum(values) / count
    below = sum((each < mean) + (each <= mean) for each in means) / 2 / resamples
    shift = normal.inv_cdf(below)
    without = [(sum(values) - value) / (count - 1) for value in values]
    gaps = [sum(without) / count - each for each in without]
    skew = sum(gap**3 for gap in gaps) / (6 * sum(gap**2 for gap in gaps) ** 1.5)
    ends = []
    for share in ((1 - confidence) / 2, (1 + confidence) / 2):
        quantile = shift + normal.inv_cdf(share)
        place = normal.cdf(shift + quantile / (1 - skew * quantile))
        ends.append(float(np.percentile(means, 100 * place)))
    return ends[0], ends[1]


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_is_efrons(confidence: float) -> None:
    """Low and high end equal a direct computation to rounding."""
    found = of_mean(VALUES, confidence=confidence, resamples=2000)

    low, high = bca(VALUES, confidence, 2000)
    assert found.mean == pytest.approx(sum(VALUES) / len(VALUES), rel=1e-12)
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-6), pytest.approx(high, rel=1e-6))
    assert found.units == len(VALUES)


def test_a_difference_is_paired() -> None:
    """What both policies share cancels out: a constant difference has no width though the values spread."""
    ours = [value + 0.25 for value in VALUES]
    found = of_difference(ours, VALUES, confidence=0.95, resamples=500)

    assert found.mean == pytest.approx(0.25)
    assert found.high is not None
    assert found.low is not None
    assert found.high - found.low < 1e-9
    assert found.excludes_zero


def test_one_unit_has_no_interval() -> None:
    """An interval needs two units; equal units have one without width."""
    alone = of_mean([3.0], confidence=0.95, resamples=100)
    equal = of_mean([3.0, 3.0], confidence=0.95, resamples=100)

    assert (alone.low, alone.high, alone.excludes_zero) == (None, None, False)
    assert (equal.low, equal.high) == (3.0, 3.0)
