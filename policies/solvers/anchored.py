"""Ridge regression anchored at a known point, solved from its normal equations.

To minimise ``|A x - y|² + r |x - a|²`` solve ``(AᵀA + r I) (x - a) = Aᵀ (y - A a)``. Working with the *shift* x - a and
with the pull ``Aᵀ (y - A a)``, the residual taken at the anchor, keeps float32 accurate, and an unknown without
evidence (a zero column of A) has shift 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_POWER_STEPS = 8
_STRIP = 128
FIRMER_RIDGES = (1.0, 1e2, 1e4, 1e6)
"""Multiples of a ridge to try in turn, should rounding make the factor fail."""


@dataclass(frozen=True, slots=True)
class Anchored:
    """The factored equations: ``factor [t, t]`` lower triangular with ``factor factorᵀ = AᵀA + ridge I``."""

    factor: torch.Tensor
    ridge: float

    def shift(self, pull: torch.Tensor) -> torch.Tensor:
        """The shift ``[t, k]`` from the anchor that ``pull [t, k]`` asks for."""
        # Two triangular solves: cholesky_solve would copy the factor.
        half = torch.linalg.solve_triangular(self.factor, pull, upper=False)
        shift: torch.Tensor = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        return shift

    def apply(self, shift: torch.Tensor) -> torch.Tensor:
        """``(AᵀA + ridge I) shift``."""
        return self.factor @ (self.factor.mT @ shift)

    def gain(self, pull: torch.Tensor, shift: torch.Tensor) -> float:
        """By how much ``shift`` lowers the squared error ``|A x - y|²`` below the anchor's. Overwrites ``pull``."""
        lowered = 2 * pull.mul_(shift).sum()
        added = (self.factor.mT @ shift).square_().sum()
        return float(lowered - added + self.ridge * shift.norm() ** 2)

    def largest(self) -> float:
        """An upper bound of the largest eigenvalue, for A without negative entries.

        Collatz-Wielandt: for every positive x, max_i (G x)_i / x_i bounds it from above; power steps tighten the bound.
        """
        vector = self.factor.new_ones(len(self.factor))
        bound = float("inf")
        for _ in range(_POWER_STEPS):
            image = self.apply(vector)
            bound = min(bound, float((image / vector).amax()))
            vector = image.div_(image.amax()).clamp_(min=1e-6)
        return bound

    def condition(self) -> float:
        """An estimate of the condition number: the bound above over the smallest eigenvalue by inverse power steps."""
        vector = self.factor.new_ones(len(self.factor), 1)
        for _ in range(_POWER_STEPS):
            vector = self.shift(vector / vector.norm())
        return self.largest() * float(vector.norm())


def add_gram(gram: torch.Tensor, block: torch.Tensor) -> None:
    """Add ``blockᵀ block`` of ``block [B, t]`` to the upper triangle of ``gram [t, t]``.

    That is all that :func:`factored` reads. In strips, so that little is worked out for nothing; what lands in the
    lower triangle means nothing.
    """
    for start in range(0, len(gram), _STRIP):
        stop = min(start + _STRIP, len(gram))
        gram[:stop, start:stop].addmm_(block[:, :stop].T, block[:, start:stop])


def factored(gram: torch.Tensor, ridge: float) -> Anchored | None:
    """Factor ``gram + ridge * mean(diag gram) * I`` by Cholesky, in place of ``gram [t, t]``.

    Only the upper triangle of ``gram`` is read.
    ``None`` when rounding makes the factor fail (near-duplicate columns with a tiny ridge) or ``gram`` is not finite.
    A gram of zeros gets a ridge of 1: there is no evidence, and every shift is 0.
    """
    diagonal = gram.diagonal()
    absolute = ridge * float(diagonal.mean()) or 1.0
    diagonal.add_(absolute)
    factor = gram.mT
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return None if int(failed) else Anchored(factor, absolute)
