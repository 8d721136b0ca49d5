"""The value fit: find values of the kept slots that restore every query's attention output over the segment.

X ``[N, t]`` has the attention weights of the N queries over the t kept slots with their new β. Y ``[N, dv]`` has the
queries' attention outputs over the whole segment. The fit finds new values C ``[t, dv]`` so that ``X C ≈ Y``. The
anchor of the fit (see :mod:`.anchored`) is the kept slots' own values, and ``C - anchor`` is the shift.
"""

from __future__ import annotations

import math

import torch

from agentmem.policies.solvers.anchored import FIRMER_RIDGES, Upper, add_gram, factored
from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.solution import Outcome, Solution


def fit_values(
    whole: LocalAttention,
    kept: LocalAttention,
    values: torch.Tensor,
    anchor: torch.Tensor,
    *,
    ridge: float,
    bound: float,
) -> Solution[torch.Tensor]:
    """Fit values C so that ``X C ≈ Y``: X has the weights over the kept slots, Y the outputs over the whole segment.

    ``whole`` is the attention of the queries over all slots of the segment; ``kept`` is their attention over the kept
    slots with the new β. ``values [T, dv]`` float32 are the values of all slots, and ``anchor [t, dv]`` float32 are the
    kept slots' own values. The fit minimises
    ``|X C - Y|² + ridge * mean(diag XᵀX) * |C - anchor|²``. Then every slot's shift from its own value is shortened to
    at most ``bound`` times the length of the segment's longest value.

    The value of the returned solution is ``C [t, dv]`` float32, or the anchor if the fit is not better. The stat
    ``bounded`` counts the slots whose shift was shortened.

    Invariants: a slot that no query attends to keeps its value; fewer queries than slots, one query, equal queries and
    duplicate keys give finite values; an accepted fit has a smaller squared output error on the fitting queries than
    the anchor.

    Source: arXiv:2602.16284, output matching. The paper has no term ``|C - anchor|²``. Neither the weights X nor the
    outputs Y include slots outside the segment.
    """
    for firmer in FIRMER_RIDGES:
        pull = torch.zeros_like(anchor)
        equations = factored(_gram(whole, kept, values, anchor, pull), ridge * firmer)
        if equations is not None:
            break
    else:
        return Solution(anchor, Outcome.SINGULAR, math.inf, {"bounded": 0})
    shift, bounded = _bounded(equations.shift(pull), bound * float(values.norm(dim=-1).amax()))
    condition = equations.condition()
    if not equations.gain(pull, shift) > 0:
        return Solution(anchor, Outcome.REFUSED, condition, {"bounded": bounded})
    return Solution(shift.add_(anchor), Outcome.SOLVED, condition, {"bounded": bounded})


def _bounded(shift: torch.Tensor, limit: float) -> tuple[torch.Tensor, int]:
    """Shorten rows of ``shift [t, dv]`` in place to the length ``limit``; return ``shift`` and how many were longer."""
    length = shift.norm(dim=-1, keepdim=True)
    return shift.mul_((limit / length).clamp_(max=1)), int((length > limit).sum())


def _gram(
    whole: LocalAttention, kept: LocalAttention, values: torch.Tensor, anchor: torch.Tensor, pull: torch.Tensor
) -> Upper:
    """Return ``XᵀX [t, t]`` and add ``XᵀE`` to ``pull [t, dv]``: the two parts of the equations of the value fit.

    X ``[N, t]`` has the attention weights of the N queries over the t kept slots. Y ``[N, dv]`` has the queries'
    attention outputs over the whole segment. ``anchor [t, dv]`` has the kept slots' own values. E is what the outputs
    with these values lack: ``Y - X anchor``.

    The fit seeks new values C ``[t, dv]`` of the kept slots so that ``X C ≈ Y``. C solves
    ``(XᵀX + r I) (C - anchor) = XᵀE``, where r is the ridge. If some queries count more than others, each query's rows
    of X and E are first multiplied by the query's entry of ``whole.roots``, the square root of its factor in the
    squared error.

    X and E are computed in blocks of rows.
    """
    gram = Upper.zeros(anchor, len(anchor))
    for rows, block in whole.blocks():
        weights, _ = whole.weights(block)
        missing = weights @ values
        del weights  # before those of the kept slots are made
        weights, _ = kept.weights(block)
        missing.addmm_(weights, anchor, alpha=-1)
        whole.scaled(missing, rows)
        whole.scaled(weights, rows)
        add_gram(gram, weights)
        pull.addmm_(weights.T, missing)
        del weights, missing  # before the next block is made
    return gram
