"""The algorithm by which all head budgets allocate integer numbers of slots: demand at a falling price.

Every head has a demand function: the number of slots that it takes at a price. The price falls until all slots are
allocated. The meaning of a price depends on the budgets: an attention score, the error that one more slot removes, or
the inverse of a share. The slots that a head holds, its floor and its ceiling limit the head; ``layer_ceiling`` limits
the sum over the heads of a layer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

from agentmem.contracts import BudgetRequest

Demand = Callable[[float], int]
"""Function from a price ≥ 0 to the number of slots that a head takes. It never rises with the price, and always returns
the same number for the same price."""
_INFINITY_BITS = 0x7FF0 << 48


def proportional(share: float) -> Demand:
    """Return a demand that allocates slots in proportion to ``share``, rounded by Webster's divisor method.

    A head with a share of 0 takes slots only after all other heads have reached their limits.
    """
    weight = max(share, 1e-12)
    return lambda price: _INFINITY_BITS if price <= 0 else int(min(weight / price + 0.5, _INFINITY_BITS))


def allocate(
    request: BudgetRequest, demands: Sequence[Sequence[Demand]], fraction: float = 0.0
) -> tuple[tuple[int, ...], ...]:
    """Allocate ``request.total`` slots to heads with these demands.

    The fraction ``fraction`` of the total is allocated equally first, as a floor besides ``request.floor``. If the
    floors together exceed the total, they are filled as far as possible, the head with the fewest slots first.

    Invariants: those of :class:`agentmem.contracts.Budgets`; a larger total (all else equal) takes a slot from no head;
    every head gets its floor if the total and the ceilings allow it.

    A larger total takes nothing away for this reason: one slot more raises at most one head's floor by one, and for
    given floors a head's slots depend on the price alone, which falls as the total grows.
    """
    limits = [[min(held, request.ceiling) for held in layer] for layer in request.held]
    level = [[proportional(1.0)] * len(layer) for layer in limits]
    none = [[0] * len(layer) for layer in limits]
    share = _fill(level, none, limits, int(fraction * request.total), request.layer_ceiling)
    wanted = [
        [min(most, max(request.floor, least)) for most, least in zip(*pair, strict=True)]
        for pair in zip(limits, share, strict=True)
    ]
    floors = _fill(level, none, wanted, request.total, request.layer_ceiling)
    return tuple(map(tuple, _fill(demands, floors, limits, request.total, request.layer_ceiling)))


def _fill(
    demands: Sequence[Sequence[Demand]],
    floors: Sequence[Sequence[int]],
    limits: Sequence[Sequence[int]],
    total: int,
    layer_ceiling: int,
) -> list[list[int]]:
    """Allocate at the lowest price whose demand fits into ``total``; give the remaining slots to the heads in order."""

    def layers(price: float) -> Iterator[list[int]]:
        for row in zip(demands, floors, limits, strict=True):
            yield [min(max(low, demand(price)), high) for demand, low, high in zip(*row, strict=True)]

    def wanted(price: float) -> int:
        return sum(min(sum(layer), layer_ceiling) for layer in layers(price))

    above, below = _clearing(wanted, total)
    allocated = list(layers(above))
    for index, layer in enumerate(allocated):
        if sum(layer) > layer_ceiling:  # the layer reached its ceiling at a higher price
            alone = ([demands[index]], [floors[index]], [limits[index]])
            allocated[index] = _fill(*alone, layer_ceiling, sum(limits[index]))[0]
    left = total - sum(map(sum, allocated))
    for layer, more in zip(allocated, layers(below), strict=True):
        for head, most in enumerate(more):
            extra = max(0, min(most - layer[head], layer_ceiling - sum(layer), left))
            layer[head] += extra
            left -= extra
    return allocated


def _clearing(wanted: Callable[[float], int], total: int) -> tuple[float, float]:
    """Return two adjacent floats: a price whose demand fits into the total, and the next lower one, which does not fit.

    Non-negative floats are ordered as their bit patterns are, so a bisection of the bits ends after at most 63 steps.
    If the demand fits at a price of 0, both prices are 0.
    """
    if wanted(0.0) <= total:
        return 0.0, 0.0
    low, high = 0, _INFINITY_BITS
    while high - low > 1:
        middle = (low + high) // 2
        if wanted(_price(middle)) <= total:
            high = middle
        else:
            low = middle
    return _price(high), _price(low)


def _price(bits: int) -> float:
    return float(struct.unpack("d", struct.pack("q", bits))[0])
