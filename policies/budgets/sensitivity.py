"""Sensitivity budgets: slots go where they lower the predicted loss most, by a table of error curves.

Source: arXiv:2602.16284, nonuniform head budgets: sensitivity curves per head and a greedy exchange of slots from a
uniform start, with a most per head. The curves are convexified; then the exchange ends at the allocation with the least
sum of errors, and allocating every slot by what it gains leads there directly. Where the paper averages the outcome
over ratios, the curves are measured anew at every compaction, at the ratio that it has.
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
"""Steps from one measured point to the next."""
_TINY = 1e-12

Point = tuple[float, float]


class Sensitivity(Tabled):
    """Allocates slots so that the sum of the predicted errors is least; needs a table with curves.

    The fraction of its slots that a head keeps is taken of the *mean* of what heads hold now: a head that was allocated
    little last time shall not be taken for one that has little to lose.
    """

    def lacks(self, table: HeadTable) -> str:
        """Its curves, where it has none."""
        if table.errors:
            return ""
        return (
            f"table {table.source!r} has no error curves: its method is {table.method!r}; make one with "
            "`agentmem calibrate --method fisher --out FILE` and give it as table=FILE"
        )

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Slot by slot, the largest gain first."""
        table = self.table_for(request)
        heads = sum(map(len, request.held))
        slots = sum(map(sum, request.held)) / max(1, heads)
        demands = [[_demand(table.fractions, errors, slots) for errors in layer] for layer in table.errors]
        return allocate(request, demands, self.floor)


def _demand(fractions: Sequence[float], errors: Sequence[float], slots: float) -> Demand:
    """How many slots lower the error by at least a price each; at no price, all that there are."""
    hull = lower_hull(filled_in(fractions, errors))
    gains = [(low[1] - high[1]) / ((high[0] - low[0]) * max(1.0, slots)) for low, high in pairwise(hull)]
    rising = [-gain for gain in gains]
    ends = [0, *(round(fraction * slots) for fraction, _ in hull[1:])]
    return lambda price: 1 << 62 if price <= 0 else ends[bisect_right(rising, -price)]


def filled_in(fractions: Sequence[float], errors: Sequence[float]) -> list[Point]:
    """The curve with points between the measured ones, where errors fall geometrically, to 0 and 1 kept.

    Nothing is lost at 1. At 0 the fall between the first two points is taken to have gone on before.
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
    """The largest convex curve below the points, which ascend: the corners of it."""
    hull: list[Point] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(low: Point, high: Point) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])
