"""Float64 oracles of Attention Matching in plain loops. Nothing of the package is imported here.

Matrices are lists of rows of Python floats. Every function is written from the equations, not for speed.
"""

from __future__ import annotations

import math

Matrix = list[list[float]]


def dot(left: list[float], right: list[float]) -> float:
    """The inner product."""
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def logits(queries: Matrix, keys: Matrix, bias: list[float], scale: float) -> Matrix:
    """``scale * q · k + b`` for every query and key."""
    return [[scale * dot(query, key) + b for key, b in zip(keys, bias, strict=True)] for query in queries]


def log_mass(queries: Matrix, keys: Matrix, bias: list[float], scale: float) -> list[float]:
    """The log of each query's attention mass over the keys."""
    masses = []
    for row in logits(queries, keys, bias, scale):
        peak = max(row)
        masses.append(peak + math.log(math.fsum(math.exp(x - peak) for x in row)))
    return masses


def weights(queries: Matrix, keys: Matrix, bias: list[float], scale: float) -> Matrix:
    """Attention weights; every row sums to 1."""
    masses = log_mass(queries, keys, bias, scale)
    rows = logits(queries, keys, bias, scale)
    return [[math.exp(x - mass) for x in row] for row, mass in zip(rows, masses, strict=True)]


def output(queries: Matrix, keys: Matrix, bias: list[float], values: Matrix, scale: float) -> Matrix:
    """The attention output of each query over these slots alone."""
    columns = list(zip(*values, strict=True))
    return [[dot(row, list(column)) for column in columns] for row in weights(queries, keys, bias, scale)]


def importance(rows: Matrix, score: str) -> list[float]:
    """Each column's root mean square, maximum or mean."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    if score == "max":
        return [max(column) for column in columns]
    if score == "mean":
        return [math.fsum(column) / len(column) for column in columns]
    return [math.sqrt(math.fsum(x * x for x in column) / len(column)) for column in columns]


def top(scores: list[float], count: int) -> list[int]:
    """The ``count`` best columns, ascending; of equal ones the last."""
    best = sorted(range(len(scores)), key=lambda index: (-scores[index], -index))[:count]
    return sorted(best)


def solve(matrix: Matrix, right: list[float]) -> list[float]:
    """Gauss elimination with pivoting."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda index: abs(rows[index][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for below in range(column + 1, size):
            factor = rows[below][column] / rows[column][column]
            for place in range(column, size + 1):
                rows[below][place] -= factor * rows[column][place]
    solution = [0.0] * size
    for index in reversed(range(size)):
        known = dot(rows[index][index + 1 : size], solution[index + 1 :])
        solution[index] = (rows[index][size] - known) / rows[index][index]
    return solution


def anchored(design: Matrix, target: list[float], anchor: list[float], ridge: float) -> list[float]:
    """The x of least ``|A x - y|² + ridge * mean(diag AᵀA) * |x - anchor|²``."""
    columns = [list(column) for column in zip(*design, strict=True)]
    gram = [[dot(one, other) for other in columns] for one in columns]
    firm = ridge * math.fsum(gram[index][index] for index in range(len(gram))) / len(gram)
    right = [dot(column, target) + firm * a for column, a in zip(columns, anchor, strict=True)]
    for index in range(len(gram)):
        gram[index][index] += firm
    return solve(gram, right)


def relative_mass(queries: Matrix, keys: Matrix, bias: list[float], kept: list[int], scale: float) -> Matrix:
    """Φ: the kept columns' attention weights relative to the mass of all keys."""
    return [[row[index] for index in kept] for row in weights(queries, keys, bias, scale)]


def fitted_values(
    queries: Matrix,
    keys: Matrix,
    bias: list[float],
    values: Matrix,
    kept: list[int],
    new_bias: list[float],
    scale: float,
    ridge: float,
) -> Matrix:
    """The kept slots' values that restore the output of all slots, anchored at their own; one column at a time."""
    design = weights(queries, [keys[index] for index in kept], new_bias, scale)
    whole = output(queries, keys, bias, values, scale)
    columns = [
        anchored(design, [row[place] for row in whole], [values[index][place] for index in kept], ridge)
        for place in range(len(values[0]))
    ]
    return [list(row) for row in zip(*columns, strict=True)]
