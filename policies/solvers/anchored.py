"""Ridge regression anchored at a known point, solved from its normal equations.

The problem is to find the x that minimises ``|A x - y|² + r |x - a|²``, with

- A, the matrix of the fit: one row per query, one column per unknown;
- y, the target that A x should approximate;
- a, the *anchor*: the known point that x stays near, such as the values before the fit;
- r, the *ridge*: a positive number, the weight of the distance from the anchor.

The module solves ``(AᵀA + r I) (x - a) = Aᵀ (y - A a)``. The unknown ``x - a`` is called the *shift*, and the right
side ``Aᵀ (y - A a)`` is called the *pull*. The pull is computed from the residual at the anchor, which keeps float32
accurate. An unknown whose column of A is zero has shift 0.

Of ``AᵀA`` and of its Cholesky factor only the upper triangle is stored, in strips of columns (:class:`Upper`). For many
unknowns this takes about half the bytes of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

STRIP = 256
"""The columns of a strip of an :class:`Upper` matrix."""
_POWER_STEPS = 8
_PIECE = 128
_FLOAT = 4
FIRMER_RIDGES = (1.0, 1e2, 1e4, 1e6)
"""Multiples of a ridge that are tried in turn as long as rounding makes the factorisation fail."""


@dataclass(frozen=True, slots=True)
class Upper:
    """The upper triangle of a matrix ``[t, t]`` float32, in strips of columns.

    The strip of the columns ``start .. stop`` is a tensor ``[stop, stop - start]``: it has the rows down to the
    diagonal. Its last ``stop - start`` rows are a square block on the diagonal of the matrix.
    """

    strips: tuple[torch.Tensor, ...]

    @classmethod
    def zeros(cls, like: torch.Tensor, size: int, width: int = STRIP) -> Upper:
        """Return a matrix ``[size, size]`` of zeros on the device of ``like``, in strips of ``width`` columns."""
        starts = range(0, size, width)
        return cls(tuple(like.new_zeros(min(start + width, size), min(width, size - start)) for start in starts))

    @property
    def size(self) -> int:
        """Return t, the number of rows and columns of the matrix."""
        return len(self.strips[-1])

    def items(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the range of columns of each strip, and the strip."""
        start = 0
        for strip in self.strips:
            yield slice(start, len(strip)), strip
            start = len(strip)

    def times(self, rows: slice, matrix: torch.Tensor) -> torch.Tensor:
        """Return some rows of the product with ``matrix [t, k]``: those of one strip's square block on the diagonal.

        The entries of the square blocks below the diagonal must be 0.
        """
        product = matrix.new_zeros(rows.stop - rows.start, matrix.shape[1])
        for columns, strip in self.items():
            if columns.start >= rows.start:
                product.addmm_(strip[rows], matrix[columns])
        return product


def upper_bytes(size: int) -> int:
    """Return the bytes of an :class:`Upper` matrix ``[size, size]``."""
    whole, rest = divmod(size, STRIP)
    return _FLOAT * (STRIP * STRIP * whole * (whole + 1) // 2 + rest * size)


@dataclass(frozen=True, slots=True)
class Anchored:
    """The factored matrix of the normal equations ``(AᵀA + r I) (x - a) = Aᵀ (y - A a)``.

    These equations give the x that minimises ``|A x - y|² + r |x - a|²``. A is the matrix of the fit, and y is the
    target. a is the *anchor*: the known point that x stays near. The attribute ``ridge`` is r. The matrix ``AᵀA + r I``
    equals ``UᵀU``, where U is the attribute ``factor``, ``[t, t]``, and t is the number of unknowns.
    """

    factor: Upper
    ridge: float

    def shift(self, pull: torch.Tensor) -> torch.Tensor:
        """Return the shift ``x - a``, ``[t, k]``: the solution of ``(AᵀA + ridge I) (x - a) = pull``.

        x is the solution of the fit, and a is the anchor: the known point that x stays near. ``pull [t, k]`` has one
        row per unknown and one column per target. For the target y, the column is ``Aᵀ (y - A a)``, where A is the
        matrix of the fit.
        """
        shift = pull.clone()
        for columns, strip in self.factor.items():
            rows = shift[columns].addmm_(strip[: columns.start].T, shift[: columns.start], alpha=-1)
            shift[columns] = torch.linalg.solve_triangular(strip[columns].mT, rows, upper=False)
        for columns, strip in reversed([*self.factor.items()]):
            rows = torch.linalg.solve_triangular(strip[columns], shift[columns], upper=True)
            shift[columns] = rows
            shift[: columns.start].addmm_(strip[: columns.start], rows, alpha=-1)
        return shift

    def apply(self, shift: torch.Tensor) -> torch.Tensor:
        """Return ``(AᵀA + ridge I) shift``, ``[t, k]``, where A is the matrix of the fit."""
        image = torch.cat([self.factor.times(rows, shift) for rows, _ in self.factor.items()])
        return torch.cat([strip.T @ image[: columns.stop] for columns, strip in self.factor.items()])

    def gain(self, pull: torch.Tensor, shift: torch.Tensor) -> float:
        """Return the decrease of the squared error: ``|A a - y|² - |A x - y|²`` for the anchor a and ``x = a + shift``.

        A is the matrix of the fit, y is the target, and the anchor is the known point that x stays near. The result is
        negative if ``shift`` makes the error larger. ``pull [t, k]`` is ``Aᵀ (y - A a)``; it is overwritten.
        """
        lowered = 2 * float(pull.mul_(shift).sum())
        added = sum(float(self.factor.times(rows, shift).square_().sum()) for rows, _ in self.factor.items())
        return lowered - added + self.ridge * float(shift.norm()) ** 2

    def largest(self) -> float:
        """Return an upper bound of the largest eigenvalue of ``G = AᵀA + ridge I``.

        A, the matrix of the fit, must have no negative entries. By Collatz and Wielandt, ``max_i (G v)_i / v_i`` is
        then an upper bound for every positive vector v. Power steps tighten the bound.
        """
        vector = self.factor.strips[0].new_ones(self.factor.size, 1)
        bound = float("inf")
        for _ in range(_POWER_STEPS):
            image = self.apply(vector)
            bound = min(bound, float((image / vector).amax()))
            vector = image.div_(image.amax()).clamp_(min=1e-6)
        return bound

    def condition(self) -> float:
        """Estimate the condition number of ``AᵀA + ridge I``: :meth:`largest` divided by the smallest eigenvalue.

        Inverse power steps estimate the smallest eigenvalue.
        """
        vector = self.factor.strips[0].new_ones(self.factor.size, 1)
        for _ in range(_POWER_STEPS):
            vector = self.shift(vector / vector.norm())
        return self.largest() * float(vector.norm())


def add_gram(gram: Upper, block: torch.Tensor) -> None:
    """Add ``blockᵀ block`` of ``block [B, t]`` to the upper triangle of ``gram``.

    The product is computed in narrow pieces, so that little of it lies below the diagonal. Entries below the diagonal
    are meaningless; :func:`factored` does not read them.
    """
    for columns, strip in gram.items():
        for start in range(columns.start, columns.stop, _PIECE):
            stop = min(start + _PIECE, columns.stop)
            piece = strip[:stop, start - columns.start : stop - columns.start]
            piece.addmm_(block[:, :stop].T, block[:, start:stop])


def factored(gram: Upper, ridge: float) -> Anchored | None:
    """Return the Cholesky factorisation of ``gram + ridge * mean(diag gram) * I``, or ``None`` on failure.

    ``gram [t, t]`` is ``AᵀA``, where A is the matrix of a least-squares fit with t unknowns. The factor overwrites
    ``gram``. Rounding can make the factorisation fail if A has near-duplicate columns and the ridge is tiny. The
    factorisation also fails if ``gram`` is not finite.

    If all entries of ``gram`` are 0, the identity matrix is factored instead. The fit then changes no unknown.
    """
    diagonals = [strip[columns].diagonal() for columns, strip in gram.items()]
    absolute = ridge * sum(float(diagonal.sum()) for diagonal in diagonals) / gram.size or 1.0
    for diagonal in diagonals:
        diagonal.add_(absolute)
    for columns, strip in gram.items():
        if not _factor_strip(gram, columns, strip):
            return None
    return Anchored(gram, absolute)


def _factor_strip(gram: Upper, columns: slice, strip: torch.Tensor) -> bool:
    """Overwrite a strip of ``gram`` with that of its Cholesky factor, and return False on failure.

    The strips before it must have been overwritten.
    """
    for before, done in gram.items():
        if before.start >= columns.start:
            break
        rows = strip[before].addmm_(done[: before.start].T, strip[: before.start], alpha=-1)
        strip[before] = torch.linalg.solve_triangular(done[before].mT, rows, upper=False)
    above, square = strip[: columns.start], strip[columns]
    square.addmm_(above.T, above, alpha=-1)
    factor, failed = square.mT, torch.empty((), dtype=torch.int32, device=strip.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return not int(failed)
