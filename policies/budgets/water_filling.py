"""The algorithm by which all head budgets allocate whole slots: a threshold falls until all slots are allocated.

The threshold is called the *price*. A head takes one more slot only if this slot is worth at least the price to the
head, so a lower price means more slots. What a slot is worth depends on the budgets: its attention score, the error
that it removes, or a number that is inversely proportional to the slots that the head has. Every head has a *demand*: a
function from the price to the number of slots that the head takes. This number never rises with the price.

Whatever its demand, a head gets no fewer slots than its floor, and no more than it holds or than its ceiling. All heads
of a layer together get at most ``layer_ceiling`` slots.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

from agentmem.contracts import BudgetRequest

Demand = Callable[[float], int]
"""Function from a price ≥ 0 to the number of slots that a head takes. The number never rises with the price, and
depends on nothing else."""
_INFINITY_BITS = 0x7FF0 << 48


def proportional(share: float) -> Demand:
    """Return the demand of a head that should get slots in proportion to ``share``.

    A *demand* is a function from a price to the number of slots that the head takes. The *price* is a threshold: the
    lower it is, the more slots a head takes. :func:`allocate` lowers the price until all slots are allocated. If all
    heads have demands of this kind, they get slots in proportion to their shares, rounded by Webster's divisor method.
    A head with a share of 0 takes slots only after all other heads have reached their limits.
    """
    weight = max(share, 1e-12)
    return lambda price: _INFINITY_BITS if price <= 0 else int(min(weight / price + 0.5, _INFINITY_BITS))


def allocate(
    request: BudgetRequest, demands: Sequence[Sequence[Demand]], fraction: float = 0.0
) -> tuple[tuple[int, ...], ...]:
    """Allocate ``request.total`` slots to the heads by their demands; return the slots of each head, ``[layer][head]``.

    A head's *demand*, ``demands[layer][head]``, is a function from a price to the number of slots that the head takes.
    The *price* is a threshold on the worth of one more slot: a lower price means more slots. It is lowered for all
    heads together until the total is reached; a layer that has reached its ceiling takes no more slots.

    Every head has a floor, the larger of two numbers: ``request.floor``, and the slots that the head gets if
    ``fraction * request.total`` slots are allocated equally. If all floors together exceed the total, slots are given
    one by one to the head with the fewest, up to its floor.

    Invariants: those of :class:`agentmem.contracts.Budgets`; if the total grows and nothing else changes, no head gets
    fewer slots; every head gets its floor if the total and the ceilings allow it.

    A larger total gives no head fewer slots for two reasons. First, one more slot in the total raises at most one
    floor, by one. Second, for given floors a head's slots depend on the price alone, and a larger total never raises
    the price.
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
    """Allocate slots at the lowest price at which all heads together take at most ``total`` slots.

    The *price* is a threshold on the worth of one more slot: a lower price means more slots. Prices are floats.
    ``demands[layer][head]`` is the function from a price to the number of slots that this head takes. ``floors`` and
    ``limits`` are the fewest and the most slots of each head.

    At the lowest price found, some of the ``total`` slots may be left over. Then the next smaller float is used as a
    price: some heads would take more slots at that price. These heads get the slots left over, in the order of the
    heads. The result is the number of slots of each head, as ``[layer][head]``.
    """

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
    """Return the lowest price at which all heads together take at most ``total`` slots, and the next smaller float.

    A price is a threshold on the worth of one more slot: a lower price means more slots. ``wanted`` is the function
    from a price to the number of slots that all heads together take. At the second price, the heads take more than
    ``total`` slots. If the heads take at most ``total`` slots even at a price of 0, both prices are 0.

    Non-negative floats have the same order as their bit patterns, so a bisection of the bits ends after at most 63
    steps.
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
