"""Float64 oracles of what evictions score slots by, in plain loops. Nothing of the package is imported here.

Matrices are lists of rows of Python floats. ``groups`` has the queries of one KV head: for each of its query heads one
matrix, row after row the same tokens.
"""

from __future__ import annotations

import math

from oracles.matching import Matrix, dot, logits, weights


def pooled(scores: list[float], kernel: int, pool: str) -> list[float]:
    """Each score replaced by the maximum or mean of those at most ``kernel // 2`` places away."""
    reach = kernel // 2
    windows = [scores[max(0, place - reach) : place + reach + 1] for place in range(len(scores))]
    return [max(window) if pool == "max" else math.fsum(window) / len(window) for window in windows]


def mean_weights(groups: list[Matrix], keys: Matrix, bias: list[float], scale: float) -> list[float]:
    """Each slot's attention weight, averaged over all queries of all query heads."""
    rows = [row for queries in groups for row in weights(queries, keys, bias, scale)]
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def norm(vector: list[float]) -> float:
    """The Euclidean length."""
    return math.sqrt(dot(vector, vector))


def cosine(left: list[float], right: list[float]) -> float:
    """The cosine of the angle between two vectors."""
    return dot(left, right) / (norm(left) * norm(right))


def keydiff(keys: Matrix) -> list[float]:
    """Minus the cosine of each key and the mean of the normalised keys: the larger, the rather kept."""
    units = [[x / norm(key) for x in key] for key in keys]
    anchor = [math.fsum(column) / len(keys) for column in zip(*units, strict=True)]
    return [-cosine(key, anchor) for key in keys]


def redundancy(keys: Matrix, threshold: float, spared: int) -> list[float]:
    """The softmax over slots of each slot's mean cosine with the others, those it is spared taken as 0."""
    size = len(keys)
    links = [[0.0 if i == j else cosine(keys[i], keys[j]) for j in range(size)] for i in range(size)]
    for row in links:
        similar = [place for place, value in enumerate(row) if value > threshold]
        for place in similar[len(similar) - min(spared, len(similar)) :]:
            row[place] = 0.0
    means = [math.fsum(column) / size for column in zip(*links, strict=True)]
    return softmax(means)


def softmax(row: list[float]) -> list[float]:
    """Positive numbers that sum to 1."""
    powers = [math.exp(x - max(row)) for x in row]
    return [power / math.fsum(powers) for power in powers]


def r_kv(  # the paper's arguments
    groups: list[Matrix],
    keys: Matrix,
    bias: list[float],
    scale: float,
    mix: float,
    kernel: int,
    threshold: float,
    spared: int,
) -> list[float]:
    """Equation 7: logits are maximised over the group, softened, pooled over slots, averaged over tokens."""
    heads = [logits(queries, keys, bias, scale) for queries in groups]
    tokens = range(len(groups[0]))
    largest = [[max(head[token][slot] for head in heads) for slot in range(len(keys))] for token in tokens]
    rows = [pooled(softmax(row), kernel, "max") for row in largest]
    importance = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    repeated = redundancy(keys, threshold, spared)
    return [mix * i - (1 - mix) * r for i, r in zip(importance, repeated, strict=True)]


def g_kv(
    groups: list[Matrix], keys: Matrix, bias: list[float], scale: float, before: list[float], decay: float
) -> list[float]:
    """Equation 3: the larger of the decayed score before and the scaled one now (weights maximised over the group)."""
    heads = [weights(queries, keys, bias, scale) for queries in groups]
    tokens = range(len(groups[0]))
    rows = [[max(head[token][slot] for head in heads) for slot in range(len(keys))] for token in tokens]
    now = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    return [max(decay * old, new / max(now)) for old, new in zip(before, now, strict=True)]


def g_kv_mixed(carried: list[float], repeated: list[float], mix: float) -> list[float]:
    """The selection score: the global score less the redundancy, which is scaled to a maximum of 1 too."""
    return [mix * c - (1 - mix) * r / max(repeated) for c, r in zip(carried, repeated, strict=True)]


def semantic_vector(votes: list[float], values: Matrix, count: int) -> list[float]:
    """The values of the ``count`` slots with the most votes, weighted by them and summed."""
    chosen = sorted(range(len(votes)), key=lambda slot: (-votes[slot], -slot))[:count]
    return [math.fsum(votes[slot] * values[slot][place] for slot in chosen) for place in range(len(values[0]))]


def distances(vectors: Matrix) -> list[float]:
    """How far each vector is from the mean of all."""
    centre = [math.fsum(column) / len(vectors) for column in zip(*vectors, strict=True)]
    return [norm([x - c for x, c in zip(vector, centre, strict=True)]) for vector in vectors]
