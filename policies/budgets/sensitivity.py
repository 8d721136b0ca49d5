"""Sensitivity budgets: slots go to the heads in which they lower the predicted loss most.

The prediction comes from a table made for the model, with an *error curve* for every head: the head's errors at several
fractions of kept slots.

Source: arXiv:2602.16284, nonuniform head budgets. The paper starts from equally many slots per head, and exchanges
slots greedily between heads by a sensitivity curve per head, up to a maximum per head. Here the curves are made convex
first. For convex curves the exchange ends at the allocation with the smallest sum of errors. Giving each slot to the
head whose error it lowers most leads to that allocation directly. The paper averages its result over several compaction
ratios; here every compaction evaluates the curves at its own ratio.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from agentmem.contracts import BudgetRequest
from agentmem.policies.budgets.head_table import HeadTable
from agentmem.policies.budgets.tabled import Tabled
from agentmem.policies.budgets.water_filling import Demand, allocate

_BETWEEN = 8
"""Number of interpolation steps from one measured point to the next."""
_TINY = 1e-12

Point = tuple[float, float]


class Sensitivity(Tabled):
    """Allocates slots so that the sum of the predicted errors is smallest; needs a table with error curves.

    A curve gives a head's error at a fraction of kept slots. This fraction is the number of slots that the head would
    keep, divided by the *mean* number of slots that heads hold now. Division by the head's own number of slots would be
    wrong: a head to which the last compaction left few slots would then seem to lose little.
    """

    def lacks(self, table: HeadTable) -> str:
        """Return a message if the table has no error curves, else an empty string."""
        if table.errors:
            return ""
        return (
            f"table {table.source!r} has no error curves: its method is {table.method!r}; make one with "
            "`agentmem calibrate --method fisher --out FILE` and give it as table=FILE"
        )

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Allocate each slot to the head where it lowers the predicted error most."""
        table = self.table_for(request)
        heads = sum(map(len, request.held))
        slots = sum(map(sum, request.held)) / max(1, heads)
        demands = [[_demand(table.fractions, errors, slots) for errors in layer] for layer in table.errors]
        return allocate(request, demands, self.floor)


def _demand(fractions: Sequence[float], errors: Sequence[float], slots: float) -> Demand:
    """Return a function that says how many slots lower a head's error by at least a given threshold each.

    The function takes the threshold and returns the number of slots. A head that keeps ``fractions[i] * slots`` slots
    is predicted to have the error ``errors[i]``. The curve of these predictions is first made convex, so that no slot
    lowers the error more than the slot before it. For a threshold of 0 or less, the number is larger than every limit.
    """
    hull = lower_hull(filled_in(fractions, errors))
    gains = [(low[1] - high[1]) / ((high[0] - low[0]) * max(1.0, slots)) for low, high in pairwise(hull)]
    rising = [-gain for gain in gains]
    ends = [0, *(round(fraction * slots) for fraction, _ in hull[1:])]
    return lambda price: 1 << 62 if price <= 0 else ends[bisect_right(rising, -price)]


def filled_in(fractions: Sequence[float], errors: Sequence[float]) -> list[Point]:
    """Return measured and interpolated points (fraction of kept slots, error) of a head, from fraction 0 to fraction 1.

    The measured points are the pairs of ``fractions`` and ``errors``. Errors between them are interpolated
    geometrically. At fraction 1 the error is 0. The error at fraction 0 is extrapolated from the first two measured
    points.
    """
    known = [(fraction, max(error, _TINY)) for fraction, error in zip(fractions, errors, strict=True) if fraction < 1]
    (first, error), (second, less) = known[0], known[min(1, len(known) - 1)]
    start = error * (error / less) ** (first / (second - first)) if second > first else error
    points: list[Point] = []
    for low, high in pairwise([(0.0, start), *known]):
        for step in range(_BETWEEN):
            along = step / _BETWEEN
            points.append((low[0] + along * (high[0] - low[0]), low[1] * (high[1] / low[1]) ** along))
    return [*points, known[-1], (1.0, 0.0)]


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Return the corners of the largest convex curve that lies nowhere above ``points``.

    A point is a pair (fraction of kept slots, error). No two points may have equal fractions. The points must be in
    ascending order of fraction, and so are the returned corners.
    """
    hull: list[Point] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(low: Point, high: Point) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])
