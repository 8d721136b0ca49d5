"""The value fit: values for the kept slots that restore every query's attention output over the segment."""

from __future__ import annotations

import math

import torch

from agentmem.policies.solvers.anchored import FIRMER_RIDGES, add_gram, factored
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
    """Fit ``X C ≈ Y``: X the weights over the kept slots with their new β, Y the output of the whole segment.

    ``values [T, dv]`` and ``anchor [t, dv]`` (the kept slots' own values) are float32. Minimises
    ``|X C - Y|² + ridge * mean(diag XᵀX) * |C - anchor|²``; no slot's value moves further from its own than
    ``bound`` times the longest value of the segment.

    The value is ``C [t, dv]`` float32, or the anchor where no fit is better; the stat ``bounded`` counts the slots
    whose shift was cut to the bound.

    Invariants: a slot without evidence keeps its value; fewer queries than slots, one query, equal queries and
    duplicate keys give finite values; the accepted fit has a smaller squared output error on the fitting queries than
    the anchor.

    Source: arXiv:2602.16284, output matching; there without anchor. Both softmaxes are local to the segment.
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
    return Solution(anchor + shift, Outcome.SOLVED, condition, {"bounded": bounded})


def _bounded(shift: torch.Tensor, limit: float) -> tuple[torch.Tensor, int]:
    """``shift [t, dv]`` with no row longer than ``limit``, in place, and how many rows were cut."""
    length = shift.norm(dim=-1, keepdim=True)
    return shift.mul_((limit / length).clamp_(max=1)), int((length > limit).sum())


def _gram(
    whole: LocalAttention, kept: LocalAttention, values: torch.Tensor, anchor: torch.Tensor, pull: torch.Tensor
) -> torch.Tensor:
    """The upper triangle of the Gram ``XᵀX [t, t]``, added up over blocks of queries.

    The pull ``Xᵀ (Y - X anchor)`` is added to ``pull``.
    """
    gram = anchor.new_zeros(len(anchor), len(anchor))
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
