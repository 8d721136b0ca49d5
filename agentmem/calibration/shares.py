"""Compute the shares of heads from the worth of their slots.

A head's *share* is its number of slots divided by the mean number of slots per head. The *worth* of a slot is its
attention score, or the decrease of the head's error by this slot.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_TINY = 1e-12


def top_shares(worth: Sequence[torch.Tensor], ratios: Sequence[float]) -> list[float]:
    """Return the share of each head, averaged over ``ratios``.

    ``worth[h]``, of shape ``[T]``, is the worth of every slot of head h. A ratio is a fraction of all slots to keep. At
    each ratio, the slots of the greatest worth over all heads are kept. A head's share is its number of kept slots,
    divided by the mean number per head. Among slots of equal worth, those of the earlier head are kept first.
    """
    owner = torch.cat([torch.full((len(slots),), head) for head, slots in enumerate(worth)])
    ranked = owner[torch.cat([slots.cpu() for slots in worth]).argsort(descending=True, stable=True)]
    shares = torch.zeros(len(worth), dtype=torch.float64)
    for ratio in ratios:
        kept = max(1, round(ratio * len(ranked)))
        shares += torch.bincount(ranked[:kept], minlength=len(worth)) * (len(worth) / kept / len(ratios))
    return shares.tolist()


def slot_gains(fractions: Sequence[float], errors: Sequence[float], slots: int) -> torch.Tensor:
    """Return by how much each further slot lowers a head's error, ``[slots]`` float64, in descending order.

    ``errors[i]`` was measured with the fraction ``fractions[i]`` of the head's slots kept. Between two fractions the
    error is interpolated geometrically. Below the first fraction, the curve through the first two points is extended;
    from the last fraction on, the error falls linearly to 0 at fraction 1. The gains are taken from the lower convex
    hull of this curve. If the slots with the greatest gains over all heads are kept, the sum of the heads' errors is
    smallest. The greedy exchange of arXiv:2602.16284 converges to the same result.
    """
    points = [(count, _error(fractions, errors, count / slots)) for count in range(slots + 1)]
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    steps = [torch.full((high[0] - low[0],), -_slope(low, high)) for low, high in pairwise(hull)]
    return torch.cat(steps).double()


def _error(fractions: Sequence[float], errors: Sequence[float], fraction: float) -> float:
    """Return the error at ``fraction``, interpolated or extended as :func:`slot_gains` describes."""
    known = [math.log(max(error, _TINY)) for error in errors]
    if fraction >= fractions[-1]:
        return math.exp(known[-1]) * (1 - fraction) / (1 - fractions[-1])
    if len(known) == 1:
        return math.exp(known[0])
    high = min(max(1, bisect_right(fractions, fraction)), len(known) - 1)
    along = (fraction - fractions[high - 1]) / (fractions[high] - fractions[high - 1])
    return math.exp(known[high - 1] + along * (known[high] - known[high - 1]))


def _slope(low: tuple[int, float], high: tuple[int, float]) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])
