"""Exact least squares within bounds, by block principal pivoting on the normal equations.

The problem is to find the x with ``low <= x <= high`` that minimises ``|A x - y|² + r |x - a|²``, with

- A, the matrix of the fit: one row per query, one column per unknown;
- y, the target that A x should approximate;
- a, the *anchor*: the known point that x stays near;
- r, the *ridge*: the weight of the distance from the anchor.

The solver does not need A and y themselves, only ``AᵀA`` (the argument ``gram``) and ``Aᵀy`` (the argument ``pull``).

Each pivot has two steps. First it solves for the *free* unknowns, while the others are held at a bound. Then it
exchanges all unknowns that break a condition of Karush, Kuhn and Tucker (KKT): free unknowns go to a bound, and
unknowns at a bound become free. If several pivots in a row do not lower the number of broken conditions, each further
pivot exchanges only one unknown: the last that breaks a condition. In this way the solver terminates for every positive
definite matrix.

The matrix of the free unknowns is ``AᵀA + r I``, restricted to the rows and columns of the free unknowns. The inverse
of the Cholesky factor of this matrix is kept between pivots. This inverse has one row per free unknown. For unknowns
that become free, rows are added. If an unknown is no longer free, its row is dropped, and all rows below this row are
computed anew.

Source: Portugal, Júdice and Vicente, "A comparison of block pivoting and interior point algorithms for linear least
squares problems with nonnegative variables", Mathematics of Computation 63 (1994). The paper has the lower bound 0;
here there are a lower and an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from agentmem.policies.solvers.anchored import FIRMER_RIDGES
from agentmem.policies.solvers.solution import Outcome, Solution

LOW, FREE, HIGH, ABSENT = -1, 0, 1, 2
"""States of an unknown: at its lower bound, free, at its upper bound, or absent from the problem, with the value 0."""

_PANEL = 32
_PATIENCE = 10
_POWER_STEPS = 8
_DOUBLE = 8
_BYTES_PER_UNKNOWN = 160
_SMALL = 4096


class IllConditioned(ArithmeticError):
    """Rounding made the Cholesky factorisation of a fit's matrix fail; a larger ridge avoids this failure.

    The fit is a least-squares problem with the matrix A and with bounds for the unknowns. The solver holds some
    unknowns at a fixed value: at a bound, or at 0. The factored matrix is ``AᵀA + ridge I``, restricted to the rows and
    columns of the other unknowns.
    """


@dataclass(slots=True)
class Factor:
    """The factored matrix of a least-squares problem within bounds, restricted to the free unknowns of the moment.

    The problem has T unknowns. At each step, its solver holds some unknowns at a fixed value: at a bound, or at 0. The
    others are called *free*. The factored matrix is ``gram + ridge I``, restricted to the rows and columns of the free
    unknowns. ``gram [T, T]`` is ``AᵀA``, where A is the matrix of the fit.

    The inverse of the Cholesky factor is stored. It is called M, so ``MᵀM`` is the inverse of the factored matrix. M is
    lower triangular and has one row per free unknown. ``order`` has the indices of the free unknowns, in the order of
    these rows. M is the leading square block of ``inverse [capacity, capacity]`` float64.

    A product with M needs no copy. A triangular solve with the Cholesky factor itself would copy the factor, because
    the factor does not fill its storage.
    """

    gram: torch.Tensor
    ridge: float
    inverse: torch.Tensor
    order: torch.Tensor

    def become(self, free: torch.Tensor) -> None:
        """Update the factor so that the free unknowns are exactly the unknowns in the mask ``free [T]``.

        Free unknowns are those that the solver does not hold at a fixed value. The factor has one row per free unknown.
        Let row i be the first row whose unknown is no longer free. All rows above row i are kept unchanged. Row i and
        all rows below row i are dropped. Then new rows are computed: first for the dropped unknowns that are still
        free, then for the unknowns that have become free. If every old unknown is still free, all old rows are kept.

        Raises:
            IllConditioned: the matrix of the free unknowns is not positive definite within rounding.

        """
        stays = free[self.order]
        leaving = (~stays).nonzero()
        first = int(leaving[0]) if len(leaving) else len(self.order)
        entering = free.clone()
        entering[self.order] = False
        rest = torch.cat((self.order[first:][stays[first:]], entering.nonzero().squeeze(-1)))
        self.order = self.order[:first]
        for panel in torch.split(rest, _PANEL):
            self._append(panel)

    def _append(self, panel: torch.Tensor) -> None:
        known, new = len(self.order), len(self.order) + len(panel)
        inverse = self.inverse[:known, :known]
        half = self.gram[panel[:, None], self.order].double() @ inverse.mT
        square = self.gram[panel[:, None], panel].double()
        square.diagonal().add_(self.ridge)
        lower, failed = torch.linalg.cholesky_ex(square.addmm_(half, half.mT, alpha=-1))
        if int(failed):
            raise IllConditioned
        own = torch.linalg.solve_triangular(lower, torch.eye(len(panel), out=square), upper=False)
        self.inverse[known:new, known:new] = own
        torch.mm(own, half @ inverse, out=half)
        self.inverse[known:new, :known] = half.neg_()
        self.order = torch.cat((self.order, panel))

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Return the values ``[n]`` of the n free unknowns that solve the equations with the right side ``right [n]``.

        The free unknowns are those that the solver does not hold at a fixed value. Entry i of both vectors belongs to
        the unknown with the index ``self.order[i]``.
        """
        inverse = self.inverse[: len(right), : len(right)]
        solution: torch.Tensor = inverse.mT @ (inverse @ right)
        return solution

    def condition(self) -> float:
        """Estimate the condition number of the factored matrix by power steps; the estimate is a lower bound."""
        order = self.order
        if not len(order):
            return 1.0
        small = large = torch.ones(len(order), dtype=torch.float64, device=order.device)
        for _ in range(_POWER_STEPS):
            small = self.solve(small / small.norm())
            large = self._apply(large / large.norm())
        return float(small.norm() * large.norm())

    def _apply(self, vector: torch.Tensor) -> torch.Tensor:
        spread = self.gram.new_zeros(len(self.gram))
        spread[self.order] = vector.to(spread.dtype)
        return (self.gram @ spread)[self.order].double().add_(vector, alpha=self.ridge)


@dataclass(slots=True)
class Pivoting:
    """A least-squares problem within bounds, with the state of its solution.

    The problem is to find the x with ``low <= x <= high`` that minimises ``|A x - y|² + r |x - a|²``. A is the matrix
    of the fit, y is the target, a is the anchor that x stays near, and r is the ridge. The T entries of x are called
    unknowns. A *pivot* is one step of the solver: it solves for the unknowns that are not held at a bound, then moves
    some unknowns to a bound and frees others.

    ``pull [T]`` float64 is ``Aᵀy + r a``, the right side of the normal equations. ``state [T]`` int8 holds, for each
    unknown, ``LOW`` (at its lower bound), ``FREE`` (held at no bound), ``HIGH`` (at its upper bound) or ``ABSENT`` (not
    in the problem, with the value 0). ``solution`` is the x of the last pivot. ``gradient`` is half the gradient at
    this x: ``(AᵀA + r I) x - pull``.

    Between two calls of :meth:`solve`, the caller may change ``state``, for example to add an absent unknown.
    """

    factor: Factor
    pull: torch.Tensor
    low: float
    high: float
    state: torch.Tensor = field(init=False)
    solution: torch.Tensor = field(init=False)
    gradient: torch.Tensor = field(init=False)
    pivots: int = 0

    def __post_init__(self) -> None:
        """Set the state of every unknown to ``ABSENT``: no unknown is in the problem yet, and every value is 0."""
        self.state = torch.full_like(self.pull, ABSENT, dtype=torch.int8)
        self.solution = torch.zeros_like(self.pull)
        self.gradient = self.pull.neg()

    def solve(self, most: int) -> bool:
        """Pivot at most ``most`` times, until no KKT condition is broken; return True if no condition is broken.

        Raises:
            IllConditioned: rounding made the factorisation for the free unknowns fail.

        """
        fewest, patience = len(self.pull) + 1, _PATIENCE
        for _ in range(most):
            self._pivot()
            wrong = self._wrong()
            count = int(wrong.sum())
            if not count:
                return True
            fewest, patience = (count, _PATIENCE) if count < fewest else (fewest, patience - 1)
            if patience < 0:
                wrong[: int(wrong.nonzero()[-1])] = False
            self._exchange(wrong)
        return False

    def result(self, *, converged: bool) -> Solution[torch.Tensor]:
        """Return the x that :meth:`solve` computed last, clamped to the bounds.

        An unknown that is not in the problem (state ``ABSENT``) has the value 0. ``converged`` is what :meth:`solve`
        returned. The stats are the same as in :func:`bounded_least_squares`.
        """
        present = self.state != ABSENT
        inside = self.solution.clamp(self.low, self.high).mul_(present)
        gradient = self._gradient(inside).mul_(present)
        gradient[(inside <= self.low) & (gradient > 0) | (inside >= self.high) & (gradient < 0)] = 0
        violation = float(gradient.abs().amax()) / (float(self.pull.abs().amax()) or 1.0)
        outcome = Outcome.SOLVED if converged else Outcome.STOPPED
        free = int((self.state == FREE).sum())
        stats = {"pivots": self.pivots, "violation": violation, "free": free}
        return Solution(inside, outcome, stats=stats)

    def _pivot(self) -> None:
        self.pivots += 1
        self.factor.become(self.state == FREE)
        order, solution = self.factor.order, self.solution.zero_()
        low, high = self.state == LOW, self.state == HIGH
        right = self.pull
        if bool((low | high).any()):  # usually no unknown is at a bound, and a matrix product is saved
            solution[low], solution[high] = self.low, self.high
            right = self._gradient(solution).neg_()
        solution[order] = self.factor.solve(right[order])
        self.gradient = self._gradient(solution)

    def _gradient(self, solution: torch.Tensor) -> torch.Tensor:
        gram = self.factor.gram
        image = (gram @ solution.to(gram.dtype)).double()
        return image.add_(solution, alpha=self.factor.ridge).sub_(self.pull)

    def _wrong(self) -> torch.Tensor:
        """Return a mask of unknowns that break a KKT condition by more than rounding.

        These are free unknowns outside the bounds, and unknowns at a bound that would lower the error by leaving this
        bound.
        """
        slack = 32 * torch.finfo(self.factor.gram.dtype).eps
        out = (self.solution < self.low - slack * abs(self.low)) | (self.solution > self.high + slack * abs(self.high))
        steep = self.pull.abs().mul_(slack)
        inward = (self.state == LOW) & (self.gradient < -steep) | (self.state == HIGH) & (self.gradient > steep)
        return (self.state == FREE) & out | inward

    def _exchange(self, wrong: torch.Tensor) -> None:
        leaves = wrong & (self.state == FREE)
        self.state[wrong & ~leaves] = FREE
        self.state[leaves & (self.solution < self.low)] = LOW
        self.state[leaves & (self.solution > self.high)] = HIGH


def pivoting(
    gram: torch.Tensor,
    pull: torch.Tensor,
    *,
    low: float,
    high: float,
    anchor: float,
    ridge: float,
    capacity: int,
) -> Pivoting:
    """Make a least-squares problem within bounds, to which the caller adds the unknowns.

    The problem is to find the x with ``low <= x <= high`` that minimises ``|A x - y|² + ridge * |x - anchor|²``. A is
    the matrix of the fit, and y is its target. The caller gives ``AᵀA [T, T]`` as ``gram`` and ``Aᵀy [T]`` as ``pull``.
    ``anchor`` is the value that all entries of x stay near. ``ridge`` is used as it is, not as a fraction of the mean
    diagonal entry of ``gram``.

    The T entries of x are the unknowns. At first all unknowns are left out of the problem and have the value 0. The
    caller adds an unknown by setting its entry of :attr:`Pivoting.state` to ``FREE``. :meth:`Pivoting.solve` may then
    hold some unknowns at a bound. All other unknowns in the problem are free; ``capacity`` is the largest number of
    unknowns that may be free at a time.
    """
    inverse = torch.zeros(capacity, capacity, dtype=torch.float64, device=gram.device)
    order = torch.empty(0, dtype=torch.int64, device=gram.device)
    return Pivoting(Factor(gram, ridge, inverse, order), pull.double() + ridge * anchor, low, high)


def pivoting_bytes(unknowns: int, capacity: int) -> int:
    """Return an upper bound of the bytes to make and solve a problem by :func:`pivoting`, without those of ``gram``."""
    panel = min(_PANEL, capacity)
    panels = _DOUBLE * panel * (3 * capacity + 5 * panel)
    return _DOUBLE * capacity * capacity + panels + unknowns * _BYTES_PER_UNKNOWN + _SMALL


def bounded_least_squares(
    gram: torch.Tensor,
    pull: torch.Tensor,
    *,
    low: float,
    high: float,
    anchor: float = 1.0,
    ridge: float = 1e-10,
    most: int = 1000,
) -> Solution[torch.Tensor]:
    """Find the x within ``[low, high]`` that minimises ``|A x - y|² + ridge * mean(diag AᵀA) * |x - anchor|²``.

    A is the matrix of the fit and y its target; only ``AᵀA`` and ``Aᵀy`` are passed. The value of the returned solution
    is ``x [t]`` float64. The outcome is ``SOLVED`` if no KKT condition is broken by more than rounding. No condition
    number is estimated. The stats are

    - ``pivots``: the number of pivots;
    - ``violation``: the largest violation of a KKT condition, as a fraction of the largest entry of ``Aᵀy + r a``, the
      right side of the normal equations with ridge r and anchor a;
    - ``free``: the number of unknowns strictly between their bounds.

    Args:
        gram: ``AᵀA [t, t]``, float32 or float64; it is not written.
        pull: ``Aᵀy [t]``, float32 or float64; it is not written.
        low: the smallest value that any unknown may have.
        high: the largest value that any unknown may have.
        anchor: the value that the unknowns stay near; an unknown whose column of A is zero gets this value, if the
            bounds allow it.
        ridge: weight of the distance from the anchor; it is raised 100-fold, up to three times, if rounding makes the
            factorisation fail.
        most: largest number of pivots; after these the last point is clamped and returned as ``STOPPED``.

    Invariants: the result lies within the bounds; a ``SOLVED`` result meets the KKT conditions, so that no better
    result exists; a matrix of zeros gives the anchor. The working memory is :func:`pivoting_bytes` of (t, t).

    The result equals that of ``scipy.optimize.lsq_linear(A, y, (low, high))`` with the ridge as further rows of A.

    Raises:
        ValueError: ``low`` is not below ``high``, or the ridge is not positive.

    """
    if not low < high:
        raise ValueError(f"low {low} is not below high {high}: no point lies between them; widen the bounds")
    if not ridge > 0:
        raise ValueError(f"ridge {ridge} is not positive: equal columns would have no single solution; give 1e-10")
    mean = float(gram.diagonal().mean())
    for firmer in FIRMER_RIDGES:
        absolute = ridge * firmer * mean or 1.0
        problem = pivoting(gram, pull, low=low, high=high, anchor=anchor, ridge=absolute, capacity=len(pull))
        problem.state.fill_(FREE)
        try:
            return problem.result(converged=problem.solve(most))
        except IllConditioned:
            del problem  # before the next one is made
    solution = torch.full((len(pull),), anchor, dtype=torch.float64, device=gram.device).clamp_(low, high)
    stats = {"pivots": 0, "violation": float("inf"), "free": 0}
    return Solution(solution, Outcome.SINGULAR, float("inf"), stats)
