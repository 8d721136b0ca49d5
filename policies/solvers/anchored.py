"""Ridge regression anchored at a known point, solved from its normal equations.

The problem is to find the x that minimises ``|A x - y|² + r |x - a|²``, with

- A, the matrix of the fit: one row per query, one column per unknown;
- y, the target that A x should approximate;
- a, the *anchor*: the known point that x stays near, such as the values before the fit;
- r, the *ridge*: a positive number, the weight of the distance from the anchor.

The module solves ``(AᵀA + r I) (x - a) = Aᵀ (y - A a)``. The unknown ``x - a`` is called the *shift*, and the right
side ``Aᵀ (y - A a)`` is called the *pull*. The pull is computed from the residual at the anchor, which keeps float32
accurate. An unknown whose column of A is zero has shift 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_POWER_STEPS = 8
_STRIP = 128
FIRMER_RIDGES = (1.0, 1e2, 1e4, 1e6)
"""Multiples of a ridge that are tried in turn as long as rounding makes the factorisation fail."""


@dataclass(frozen=True, slots=True)
class Anchored:
    """The factored matrix of the normal equations ``(AᵀA + r I) (x - a) = Aᵀ (y - A a)``.

    These equations give the x that minimises ``|A x - y|² + r |x - a|²``. A is the matrix of the fit, and y is the
    target. a is the *anchor*: the known point that x stays near. The attribute ``ridge`` is r. The matrix ``AᵀA + r I``
    equals ``factor factorᵀ``, where ``factor [t, t]`` is lower triangular and t is the number of unknowns.
    """

    factor: torch.Tensor
    ridge: float

    def shift(self, pull: torch.Tensor) -> torch.Tensor:
        """Return the shift ``x - a``, ``[t, k]``: the solution of ``(AᵀA + ridge I) (x - a) = pull``.

        x is the solution of the fit, and a is the anchor: the known point that x stays near. ``pull [t, k]`` has one
        row per unknown and one column per target. For the target y, the column is ``Aᵀ (y - A a)``, where A is the
        matrix of the fit.
        """
        # Two triangular solves: cholesky_solve would copy the factor.
        half = torch.linalg.solve_triangular(self.factor, pull, upper=False)
        shift: torch.Tensor = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        return shift

    def apply(self, shift: torch.Tensor) -> torch.Tensor:
        """Return ``(AᵀA + ridge I) shift``, ``[t, k]``, where A is the matrix of the fit."""
        return self.factor @ (self.factor.mT @ shift)

    def gain(self, pull: torch.Tensor, shift: torch.Tensor) -> float:
        """Return the decrease of the squared error: ``|A a - y|² - |A x - y|²`` for the anchor a and ``x = a + shift``.

        A is the matrix of the fit, y is the target, and the anchor is the known point that x stays near. The result is
        negative if ``shift`` makes the error larger. ``pull [t, k]`` is ``Aᵀ (y - A a)``; it is overwritten.
        """
        lowered = 2 * pull.mul_(shift).sum()
        added = (self.factor.mT @ shift).square_().sum()
        return float(lowered - added + self.ridge * shift.norm() ** 2)

    def largest(self) -> float:
        """Return an upper bound of the largest eigenvalue of ``G = AᵀA + ridge I``.

        A, the matrix of the fit, must have no negative entries. By Collatz and Wielandt, ``max_i (G v)_i / v_i`` is
        then an upper bound for every positive vector v. Power steps tighten the bound.
        """
        vector = self.factor.new_ones(len(self.factor))
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
        vector = self.factor.new_ones(len(self.factor), 1)
        for _ in range(_POWER_STEPS):
            vector = self.shift(vector / vector.norm())
        return self.largest() * float(vector.norm())


def add_gram(gram: torch.Tensor, block: torch.Tensor) -> None:
    """Add ``blockᵀ block`` of ``block [B, t]`` to the upper triangle of ``gram [t, t]``.

    The product is computed in strips, so that little of the lower triangle is computed. The entries of the lower
    triangle are meaningless; :func:`factored` does not read them.
    """
    for start in range(0, len(gram), _STRIP):
        stop = min(start + _STRIP, len(gram))
        gram[:stop, start:stop].addmm_(block[:, :stop].T, block[:, start:stop])


def factored(gram: torch.Tensor, ridge: float) -> Anchored | None:
    """Return the Cholesky factorisation of ``gram + ridge * mean(diag gram) * I``, or ``None`` on failure.

    ``gram [t, t]`` is ``AᵀA``, where A is the matrix of a least-squares fit with t unknowns. Only the upper triangle of
    ``gram`` is read. The factor overwrites ``gram``. Rounding can make the factorisation fail if A has near-duplicate
    columns and the ridge is tiny. The factorisation also fails if ``gram`` is not finite.

    If all entries of ``gram`` are 0, the identity matrix is factored instead. The fit then changes no unknown.
    """
    diagonal = gram.diagonal()
    absolute = ridge * float(diagonal.mean()) or 1.0
    diagonal.add_(absolute)
    factor = gram.mT
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return None if int(failed) else Anchored(factor, absolute)
