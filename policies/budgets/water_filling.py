"""The one allocating algorithm that all head budgets share: integer slots by a falling price.

Every head says how many slots it takes at a price; the price falls until the slots run out. What a price is, is the
budgets' own affair: an attention score, the error that one more slot removes, the inverse of a share. Held slots,
floors and ceilings bind a head, ``layer_ceiling`` binds the heads of one layer together.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

from agentmem.contracts import BudgetRequest

Demand = Callable[[float], int]
"""Slots that a head takes at a price ≥ 0: never more at a higher price, and the same every time it is asked."""
_INFINITY_BITS = 0x7FF0 << 48


def proportional(share: float) -> Demand:
    """Slots in proportion to a share, rounded as fairly as integers can be: the divisor method of Webster.

    A head without a share takes slots when all others have all that they may.
    """
    weight = max(share, 1e-12)
    return lambda price: _INFINITY_BITS if price <= 0 else int(min(weight / price + 0.5, _INFINITY_BITS))


def allocate(
    request: BudgetRequest, demands: Sequence[Sequence[Demand]], fraction: float = 0.0
) -> tuple[tuple[int, ...], ...]:
    """Allocate ``request.total`` slots to heads with these demands.

    ``fraction`` of the total is allocated equally first, as a floor besides ``request.floor``; a floor that does not fit
    is allocated as far as it goes, the emptiest head first.

    Invariants: those of :class:`agentmem.contracts.Budgets`; a larger total (all else equal) takes a slot from no head;
    every head gets its floor if the total and the ceilings allow it.

    The last: a fraction of a larger total raises at most one head's floor by one. Given the floors, what a head gets
    depends on the price alone, and the price falls as the total grows.
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
    """The water level: the lowest price whose demand fits, and what is left to the heads in order."""

    def layers(price: float) -> Iterator[list[int]]:
        for row in zip(demands, floors, limits, strict=True):
            yield [min(max(low, demand(price)), high) for demand, low, high in zip(*row, strict=True)]

    def wanted(price: float) -> int:
        return sum(min(sum(layer), layer_ceiling) for layer in layers(price))

    above, below = _clearing(wanted, total)
    allocated = list(layers(above))
    for index, layer in enumerate(allocated):
        if sum(layer) > layer_ceiling:  # it was full at a higher price
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
    """Two neighbouring prices: at the higher one the demand fits into the total, at the lower one it does not.

    Floats that are not negative are ordered as their bits are, so 63 halvings tell any two apart. Where even a price
    of 0 fits, both are 0.
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
