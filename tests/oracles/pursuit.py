"""Float64 oracles of pursuit, bounded least squares, refinement and merging. Nothing of the package is imported here.

In plain loops, with matrices as lists of rows of Python floats; but for pursuit by orthogonal factors, which is there
for sizes at which loops would take minutes.
"""

from __future__ import annotations

import itertools
import math

import torch

from oracles.matching import Matrix, dot, log_mass, output, solve


def gram(design: Matrix) -> Matrix:
    """``AᵀA``."""
    columns = [list(column) for column in zip(*design, strict=True)]
    return [[dot(one, other) for other in columns] for one in columns]


def pull(design: Matrix, target: list[float]) -> list[float]:
    """``Aᵀy``."""
    return [dot(list(column), target) for column in zip(*design, strict=True)]


def mean_diagonal(matrix: Matrix) -> float:
    """The mean of the diagonal."""
    return math.fsum(matrix[index][index] for index in range(len(matrix))) / len(matrix)


def squared_error(design: Matrix, target: list[float], point: list[float]) -> float:
    """``|A x - y|²``."""
    return math.fsum((dot(row, point) - wanted) ** 2 for row, wanted in zip(design, target, strict=True))


def objective(
    design: Matrix, target: list[float], point: list[float], firm: float, anchor: list[float] | None = None
) -> float:
    """``|A x - y|² + firm |x - anchor|²``; the anchor is 1 unless it is given."""
    anchor = anchor or [1.0] * len(point)
    far = math.fsum((x - a) ** 2 for x, a in zip(point, anchor, strict=True))
    return squared_error(design, target, point) + firm * far


def every_vertex(design: Matrix, target: list[float], low: float, high: float, firm: float) -> list[float]:
    """The least objective within bounds, by trying for every unknown: at the low bound, free, at the high bound."""
    count = len(design[0])
    normal, right = gram(design), pull(design, target)
    for index in range(count):
        normal[index][index] += firm
        right[index] += firm
    best: list[float] = []
    least = math.inf
    for places in itertools.product((low, None, high), repeat=count):
        point = [0.0 if place is None else place for place in places]
        free = [index for index, place in enumerate(places) if place is None]
        rest = [right[index] - dot(normal[index], point) for index in free]
        found = solve([[normal[one][other] for other in free] for one in free], rest)
        if any(not low <= x <= high for x in found):
            continue
        for index, x in zip(free, found, strict=True):
            point[index] = x
        value = objective(design, target, point, firm)
        if value < least:
            best, least = point, value
    return best


def coordinate_descent(
    normal: Matrix, right: list[float], low: float, high: float, start: list[float] | None = None
) -> list[float]:
    """The least ``x G x - 2 b x`` within bounds: one unknown at a time until nothing moves (G positive definite)."""
    point = list(start or [1.0] * len(right))
    for _ in range(100_000):
        moved = 0.0
        for index, row in enumerate(normal):
            slope = dot(row, point) - right[index]
            new = min(high, max(low, point[index] - slope / row[index]))
            moved = max(moved, abs(new - point[index]))
            point[index] = new
        if moved < 1e-13:
            return point
    raise AssertionError("coordinate descent did not converge")


def pursue(
    design: Matrix, target: list[float], count: int, batch: int, *, ridge: float, bound: float
) -> tuple[list[int], list[float]]:
    """Greedy: the ``batch`` columns of the steepest descent join, then all weights are refitted within bounds."""
    normal, right = gram(design), pull(design, target)
    firm = ridge * mean_diagonal(normal)
    chosen: list[int] = []
    fitted: list[float] = []
    while len(chosen) < count:
        point = [0.0] * len(right)
        for index, weight in zip(chosen, fitted, strict=True):
            point[index] = weight
        descent = [b - dot(row, point) for row, b in zip(normal, right, strict=True)]
        others = [index for index in range(len(right)) if index not in chosen]
        others.sort(key=lambda index: (-descent[index], -index))
        chosen += others[: min(batch, count - len(chosen))]
        part = [[normal[one][other] + firm * (one == other) for other in chosen] for one in chosen]
        wanted = [right[index] + firm for index in chosen]
        fitted = coordinate_descent(part, wanted, math.exp(-bound), math.exp(bound))
    order = sorted(range(count), key=lambda place: chosen[place])
    return [chosen[place] for place in order], [fitted[place] for place in order]


def orthogonal(phi: torch.Tensor, count: int, batch: int, firm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pursuit with each fit by QR of the chosen columns over the root of the ridge; no Gram anywhere."""
    ones = phi.new_ones(len(phi))
    kept: list[int] = []
    weights = phi.new_zeros(0)
    while len(kept) < count:
        descent = phi.T @ (ones - phi[:, kept] @ weights)
        descent[kept] = -math.inf
        kept += descent.topk(min(batch, count - len(kept))).indices.tolist()
        design = torch.cat((phi[:, kept], firm**0.5 * torch.eye(len(kept), dtype=phi.dtype)))
        target = torch.cat((ones, torch.full((len(kept),), firm**0.5, dtype=phi.dtype)))
        weights = active_set(design, target, math.exp(-7), math.exp(7))
    order = torch.tensor(kept).argsort()
    return torch.tensor(kept)[order], weights[order]


def active_set(design: torch.Tensor, target: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Least squares within bounds, each step by QR."""
    state = torch.zeros(design.shape[1], dtype=torch.int8)
    for _ in range(200):
        point = torch.where(state < 0, low, high).to(design.dtype)
        free = state == 0
        right = target - design[:, ~free] @ point[~free]
        factors = torch.linalg.qr(design[:, free])
        point[free] = torch.linalg.solve_triangular(factors.R, (factors.Q.T @ right)[:, None], upper=True).squeeze(-1)
        slope = design.T @ (design @ point - target)
        below, above = free & (point < low), free & (point > high)
        inward = (state < 0) & (slope < -1e-10) | (state > 0) & (slope > 1e-10)
        if not bool((below | above | inward).any()):
            return point
        state[inward] = 0
        state[below], state[above] = -1, 1
    raise AssertionError("the active set did not settle")


def mismatch(
    queries: Matrix,
    whole: tuple[Matrix, list[float], Matrix],
    kept: tuple[Matrix, list[float], Matrix],
    scale: float,
    mass_weight: float,
) -> float:
    """Mean over queries of ``|o' - o|² / mean |o|² + mass_weight (log m' - log m)²``; slots are (keys, β, values)."""
    (keys, bias, values), (kept_keys, kept_bias, kept_values) = whole, kept
    outputs = output(queries, keys, bias, values, scale)
    found = output(queries, kept_keys, kept_bias, kept_values, scale)
    masses, kept_masses = log_mass(queries, keys, bias, scale), log_mass(queries, kept_keys, kept_bias, scale)
    missed = math.fsum(
        (a - b) ** 2 for one, other in zip(found, outputs, strict=True) for a, b in zip(one, other, strict=True)
    )
    length = math.fsum(x * x for row in outputs for x in row)
    lost = math.fsum((a - b) ** 2 for a, b in zip(kept_masses, masses, strict=True))
    return missed / length + mass_weight * lost / len(queries)


def cosine(one: list[float], other: list[float]) -> float:
    """Of the angle between two vectors."""
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


def merge(keys: Matrix, importance: list[float], count: int, threshold: float) -> tuple[dict[int, int], list[int]]:
    """Who joined whom, and who stays: again and again the most similar pair, then the most important survivors.

    In a pair the more important leads (of equals the later); one that has joined or was joined does not join again.
    """
    leads = sorted(range(len(keys)), key=lambda index: (-importance[index], -index))
    rank = {slot: place for place, slot in enumerate(leads)}
    joined: dict[int, int] = {}
    while len(keys) - len(joined) > count:
        pairs = [
            (cosine(keys[slot], keys[lead]), slot, lead)
            for slot in leads
            for lead in leads
            if rank[lead] < rank[slot] and slot not in joined and lead not in joined and slot not in joined.values()
        ]
        best = max(pairs, default=(-math.inf, -1, -1))
        if best[0] < threshold:
            break
        joined[best[1]] = best[2]
    stay = sorted([slot for slot in leads if slot not in joined][:count])
    return {slot: lead for slot, lead in joined.items() if lead in stay}, stay


def pooled(group: list[int], log_weights: list[float], values: Matrix) -> tuple[float, list[float]]:
    """The log of a group's weight, and its mean value by weight."""
    shares = [math.exp(log_weights[index]) for index in group]
    total = math.fsum(shares)
    mean = [
        math.fsum(share * values[index][place] for share, index in zip(shares, group, strict=True)) / total
        for place in range(len(values[0]))
    ]
    return math.log(total), mean
