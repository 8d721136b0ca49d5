"""Highest attention: compute each slot's importance over all reference queries, and choose the most important slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from agentmem.policies.solvers.attention import LocalAttention

Score = Literal["rms", "max", "mean"]


@dataclass(frozen=True, slots=True)
class Importance:
    """The importance ``scores [T]`` of each slot, and the log of each query's mass, ``log_mass [N]``; both float32.

    The mass of a query is the sum of ``exp(logit)`` over all slots of the segment.
    """

    scores: torch.Tensor
    log_mass: torch.Tensor


def importance(attention: LocalAttention, score: Score = "rms") -> Importance:
    """Compute each slot's root mean square ("rms"), maximum or mean attention weight over all queries.

    Source: arXiv:2602.16284, "highest attention"; the paper finds that rms works best.

    Invariants: scores lie in [0, 1]; the size of the blocks changes the scores by rounding only; a constant added to
    every logit of a query changes nothing; a query of weight 2 counts like two queries of weight 1, except for the
    maximum, which does not depend on weights.
    """
    scores = attention.bias.new_zeros(len(attention.keys))
    log_mass = attention.bias.new_empty(attention.count)
    for rows, block in attention.blocks():
        weights, log_mass[rows] = attention.weights(block)
        if score == "max":
            torch.maximum(scores, weights.amax(dim=0), out=scores)
        else:
            attention.scaled(weights, rows)
            scores += (weights.square_() if score == "rms" else attention.scaled(weights, rows)).sum(dim=0)
        del weights  # before the next block is made
    if score != "max":
        scores /= attention.count if attention.roots is None else float(attention.roots.square().sum())
    return Importance(scores.sqrt_() if score == "rms" else scores, log_mass)


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the ``count`` largest ``scores [T]``, ascending, int64.

    Slots are in order of position. Of slots with equal scores, the one with the later index, the newer one, is chosen.
    """
    newest_first = scores.flip(0).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[newest_first[:count]] = True
    return chosen.flip(0).nonzero().squeeze(-1)
