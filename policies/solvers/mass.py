"""The β fit: find weights of the kept slots that restore every query's attention mass over the segment.

The *mass* of a query over some slots is the sum of ``exp(logit)`` over these slots. The matrix Φ ``[N, t]`` has one row
per query and one column per kept slot. An entry is the query's mass over this one slot, divided by its mass over the
whole segment. The fit finds one weight per kept slot, w ``[t]``, so that ``Φ w ≈ 1`` for every query. A weight w is
applied by adding ``log w`` to the slot's β. Without a fit, w = 1 for every slot; this is the anchor of the fit (see
:mod:`.anchored`), and ``w - 1`` is the shift.
"""

from __future__ import annotations

import math

import torch

from agentmem.policies.solvers.anchored import FIRMER_RIDGES, STRIP, Anchored, Upper, add_gram, factored
from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.nonnegative import bounded_least_squares
from agentmem.policies.solvers.solution import Outcome, Solution


def fit_mass(
    kept: LocalAttention, log_mass: torch.Tensor, *, ridge: float, bound: float, steps: int | None
) -> Solution[torch.Tensor]:
    """Fit weights w of the kept slots so that ``Φ w ≈ 1``: every query's mass over the segment is restored.

    The *mass* of a query over some slots is the sum of ``exp(logit)`` over these slots. Φ ``[N, t]`` has one row per
    query and one column per kept slot. An entry is the query's mass over this one slot, divided by the query's mass
    over the whole segment (all slots, kept or not). The value of the returned solution is ``log w [t]`` float32, to be
    added to the kept slots' old β. If the fit is not better than w = 1 (an unchanged β) on the fitting queries, the
    value is 0.

    ``kept`` is the attention of the queries over the kept slots with their old β. ``log_mass [N]`` float32 is the log
    of each query's mass over the whole segment. The fit minimises
    ``|Φ w - 1|² + ridge * mean(diag ΦᵀΦ) * |w - 1|²`` for w within ``e^-bound .. e^bound``. It clamps the least-squares
    solution, then takes ``steps`` projected-gradient steps. With ``steps=None`` the problem is solved exactly.

    The step size is the inverse of the largest eigenvalue of ``ΦᵀΦ`` with the ridge on its diagonal. The inverse of the
    largest *diagonal entry* would be too long a step: the steps would diverge as soon as columns of Φ overlap.

    Invariants: a slot that no query attends to keeps w = 1; the old β remains part of the new β, since Φ contains it;
    an accepted fit has a smaller squared mass error on the fitting queries than w = 1.

    Source: arXiv:2602.16284, mass matching. The paper has no term ``|w - 1|²``, and takes 2 steps with a bound of 3.
    """
    if steps is None:
        return _exact(kept, log_mass, ridge=ridge, bound=bound)
    for firmer in FIRMER_RIDGES:
        pull = kept.bias.new_zeros(len(kept.bias), 1)
        equations = factored(_gram(kept, log_mass, pull), ridge * firmer)
        if equations is not None:
            break
    else:
        return Solution(torch.zeros_like(kept.bias), Outcome.SINGULAR, math.inf)
    shift = _bounded(equations, pull, bound=bound, steps=steps)
    condition = equations.condition()
    if not equations.gain(pull, shift) > 0:
        return Solution(torch.zeros_like(kept.bias), Outcome.REFUSED, condition)
    log_weights = shift.squeeze(-1).log1p().clamp_(-bound, bound)
    return Solution(log_weights, condition=condition)


def _exact(kept: LocalAttention, log_mass: torch.Tensor, *, ridge: float, bound: float) -> Solution[torch.Tensor]:
    """Do what :func:`fit_mass` does, but solve its problem exactly, by :func:`bounded_least_squares`."""
    residual = kept.bias.new_zeros(len(kept.bias), 1)
    (gram,) = _gram(kept, log_mass, residual, width=len(residual)).strips
    gram.triu_().add_(gram.triu(1).mT)
    pull = residual.squeeze(-1) + gram.sum(dim=-1)
    found = bounded_least_squares(gram, pull, low=math.exp(-bound), high=math.exp(bound), ridge=ridge)
    shift = found.value.float() - 1
    lowered = 2 * residual.squeeze(-1) @ shift - shift @ (gram @ shift)
    if not float(lowered) > 0:
        refused = Outcome.REFUSED if found.accepted else found.outcome
        return Solution(torch.zeros_like(kept.bias), refused, found.condition)
    return Solution(shift.log1p_().clamp_(-bound, bound), found.outcome)


def _gram(kept: LocalAttention, log_mass: torch.Tensor, pull: torch.Tensor, width: int = STRIP) -> Upper:
    """Return ``ΦᵀΦ [t, t]`` and add ``Φᵀm`` to ``pull [t, 1]``: the two parts of the equations of the β fit.

    Φ ``[N, t]`` has one row per query and one column per kept slot. An entry is ``exp(logit)`` of the query at this
    slot, divided by the query's sum of ``exp(logit)`` over the whole segment. The sum of a row is therefore the
    fraction of the query's mass that the kept slots hold. m ``[N]`` is the fraction that is missing: 1 minus this sum.

    The fit seeks a weight for each kept slot, w ``[t]``, so that ``Φ w ≈ 1``. Without bounds, w solves
    ``(ΦᵀΦ + r I) (w - 1) = Φᵀm``, where r is the ridge. If some queries count more than others, each query's row of Φ
    and entry of m are first multiplied by the query's entry of ``kept.roots``, the square root of its factor in the
    squared error.

    Φ is computed in blocks of rows. The result has strips of ``width`` columns.
    """
    gram = Upper.zeros(kept.keys, len(pull), width)
    for rows, block in kept.blocks():
        share = kept.logits(block).sub_(log_mass[rows, None]).exp_()
        missing = kept.scaled(1 - share.sum(dim=-1, keepdim=True), rows)
        kept.scaled(share, rows)
        add_gram(gram, share)
        pull.addmm_(share.T, missing)
        del share  # before the next block is made
    return gram


def _bounded(equations: Anchored, pull: torch.Tensor, *, bound: float, steps: int) -> torch.Tensor:
    """Return the shift ``w - 1``, ``[t, 1]``, of the kept slots' weights w, with ``log w`` within ``±bound``.

    The unbounded solution of the normal equations is clamped to the bounds. It is then improved by ``steps`` gradient
    steps; after each step the result is clamped again.
    """
    low, high = math.expm1(-bound), math.expm1(bound)
    step = 1 / equations.largest()
    shift = equations.shift(pull).clamp_(low, high)
    for _ in range(steps):
        shift.sub_(equations.apply(shift).sub_(pull), alpha=step).clamp_(low, high)
    return shift
