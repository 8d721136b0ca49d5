"""Orthogonal matching pursuit: find slots, and weights for them, that together restore every query's attention mass.

A choice by attention weights judges each slot by itself, so it keeps both of two equal slots. Pursuit chooses the slots
that best restore the mass that is still missing.

The *mass* of a query over some slots is the sum of ``exp(logit)`` over these slots. The matrix Φ ``[N, T]`` has one row
per query and one column per slot. An entry is the query's mass over this one slot, divided by its mass over the whole
segment. w has one weight per slot, which is 0 for slots that are not chosen. The pursuit makes ``Φ w`` as near to 1 as
it can for all queries.

The pursuit works on the Gram matrix ``ΦᵀΦ``, so that the cost of a step is proportional to slots x chosen slots, not to
queries x slots. The condition number of the Gram matrix is the square of that of Φ, so rounding errors grow more. Three
measures make this harmless. A ridge pulls the weights towards 1. The weights are within bounds at every step; they are
not merely clamped after an unbounded fit, because the residual of clamped weights selects the wrong slots. The Gram
matrix is stored as float32, but it is factored in float64 to solve for the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from agentmem.policies.solvers.anchored import FIRMER_RIDGES
from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.nonnegative import (
    ABSENT,
    FREE,
    IllConditioned,
    Pivoting,
    pivoting,
    pivoting_bytes,
)
from agentmem.policies.solvers.selection import top
from agentmem.policies.solvers.solution import Outcome, Solution

_STRIP = 256
_ROUNDS = 3
_BLUR = 8 * torch.finfo(torch.float32).eps
"""Differences below this fraction of a slot's summed masses count as rounding errors of the Gram matrix."""
_MOST_PIVOTS = 200
_FLOAT = 4
_BYTES_PER_SLOT = 80


@dataclass(frozen=True, slots=True)
class Schedule:
    """The number of slots that a pursuit chooses before it fits the weights again.

    A pursuit repeats two steps: it chooses some slots, then fits the weights of all slots chosen so far. The number of
    slots chosen before a fit is the larger of two numbers: ``choose * refit_every``, and ``growth`` times the number of
    slots chosen so far.

    Source: arXiv:2602.16284. The paper chooses ``choose`` slots at a time, and fits after ``refit_every`` such choices.
    Here all these slots are chosen together. The result is the same, since a choice depends only on the last fit.
    """

    choose: int = 4
    refit_every: int = 2
    growth: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError if the schedule would choose no slots."""
        if self.choose < 1 or self.refit_every < 1 or not 0 <= self.growth < math.inf:
            raise ValueError(f"{self} would choose nothing; give choose and refit_every of at least 1, growth of 0 up")

    def batch(self, chosen: int) -> int:
        """Return the number of slots to choose before the next fit, after ``chosen`` slots were chosen."""
        return max(self.choose * self.refit_every, int(self.growth * chosen))


EXACT = Schedule(1, 1)
FAST = Schedule(4, 2)
PROGRESSIVE = Schedule(1, 1, 1 / 8)


class Pursued(NamedTuple):
    """The result of a pursuit: the indices ``kept [t]`` int64, ascending, of the chosen slots, and their weights.

    ``log_weights [t]`` float32 are to be added to the slots' old β.
    """

    kept: torch.Tensor
    log_weights: torch.Tensor


def pursue(
    slots: LocalAttention,
    log_mass: torch.Tensor,
    count: int,
    *,
    schedule: Schedule = FAST,
    ridge: float = 1e-4,
    bound: float = 7.0,
    cutoff: float | None = -7.0,
    keep: torch.Tensor | None = None,
) -> Solution[Pursued]:
    """Choose ``count`` slots and a weight w for each, so that they restore every query's mass: ``Φ w ≈ 1``.

    The *mass* of a query over some slots is the sum of ``exp(logit)`` over these slots. Φ ``[N, T]`` has one row per
    query and one column per slot. An entry is the query's mass over this one slot, divided by the query's mass over the
    whole segment. The pursuit lowers ``|Φ w - 1|² + ridge * mean(diag ΦᵀΦ) * |w - 1|²`` over weights w that are within
    ``e^-bound .. e^bound`` for ``count`` slots and 0 for all other slots. It repeats two steps: it adds the slots whose
    weights lower the error most steeply, then refits all weights exactly.

    If the fit is not better than w = 1 (an unchanged β) on the chosen slots, it is refused, and all log weights are 0.
    The stat ``error`` is the root mean square of ``Φ w - 1`` over the queries (float32 sums make it inexact below
    3e-4). The stat ``fits`` counts the fits, and ``replaced`` the slots that were dropped because of the cutoff.

    Args:
        slots: the attention of the queries over the slots to choose from, with their old β. These slots are a whole
            segment or a part of it.
        log_mass: ``[N]`` float32, the log of each query's mass over the whole segment.
        count: number of slots that stay; all slots stay if there are no more than this.
        schedule: how many slots are chosen before each fit.
        ridge: weight of the distance of the weights from 1, relative to the mean of ``diag ΦᵀΦ`` over all ``slots``.
        bound: largest magnitude of a log weight.
        cutoff: chosen slots whose log weight is no larger than this are replaced by others, in up to three rounds;
            ``None`` replaces none.
        keep: indices of slots that are chosen first and never dropped.

    Invariants: of equally good slots the newer is chosen first; a chosen slot that no query attends to has weight 1; an
    accepted fit has a smaller squared mass error on the fitting queries than w = 1 on the chosen slots. The working
    memory is :func:`pursuit_bytes`.

    Source: arXiv:2602.16284, section 3.3 and appendix C (OMP; the fast variant chooses 4 slots per step and refits the
    weights every second step; cutoff -7). The paper has no term ``|w - 1|²``, and clamps the weights after an unbounded
    fit.

    Raises:
        ValueError: ``keep`` has more slots than ``count``.

    """
    if keep is not None and len(keep) > count:
        raise ValueError(f"{len(keep)} slots must be kept but only {count} may stay; keep fewer or raise the count")
    gram, pull, total = relative_gram(slots, log_mass)
    mean = float(gram.diagonal().mean())
    count = min(count, len(pull))
    for firmer in FIRMER_RIDGES:
        problem = pivoting(
            gram,
            pull,
            low=math.exp(-bound),
            high=math.exp(bound),
            anchor=1.0,
            ridge=ridge * firmer * mean or 1.0,
            capacity=count,
        )
        chase = _Chase(problem, count, schedule)
        try:
            chase.hold(keep)
            chase.fill()
            chase.replace(cutoff)
        except IllConditioned:
            del problem, chase  # before the next ones are made
            continue
        return chase.result(pull, total)
    kept = top(gram.diagonal(), count)
    plain = torch.zeros(count, dtype=torch.float32, device=gram.device)
    stats = {"error": math.inf, "fits": 0, "replaced": 0}
    return Solution(Pursued(kept, plain), Outcome.SINGULAR, math.inf, stats)


def pursuit_bytes(slots: int, kept: int, rows: int, key_dim: int) -> int:
    """Return an upper bound of the bytes that :func:`pursue` allocates for blocks of ``rows`` queries.

    The bound does not depend on the number of queries.
    """
    block = rows * (slots + 2 * key_dim + 4) * _FLOAT
    rest = pivoting_bytes(slots, min(kept, slots))
    return slots * slots * _FLOAT + slots * _BYTES_PER_SLOT + max(block, rest)


def relative_gram(slots: LocalAttention, log_mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return three sums over the queries: ``ΦᵀΦ [T, T]`` float32, ``Φᵀu [T]`` float64 and ``|u|²``.

    Φ ``[N, T]`` has one row per query and one column per slot. u ``[N]`` has one entry per query. For a query with the
    weight q, the entry of u is √q. The entries of the query's row of Φ are √q times the query's mass over each slot,
    divided by the query's mass over the whole segment. ``|u|²`` is therefore the sum of all q. A pursuit seeks one
    weight per slot, w ``[T]``, so that ``Φ w`` is near u. The sums are taken block by block, so that Φ itself is never
    stored.
    """
    count = len(slots.keys)
    gram = slots.keys.new_zeros(count, count)
    pull = torch.zeros(count, dtype=torch.float64, device=gram.device)
    total = 0.0
    strips = [slice(start, min(start + _STRIP, count)) for start in range(0, count, _STRIP)]
    for rows, block in slots.blocks():
        share = slots.scaled(slots.logits(block).sub_(log_mass[rows, None]).exp_(), rows)
        ones = slots.scaled(torch.ones_like(share[:, :1]), rows)
        pull += (share.T @ ones).squeeze(-1)
        total += float(ones.square().sum())
        for strip in strips:  # only the lower triangle is computed here
            gram[strip, : strip.stop].addmm_(share[:, strip].T, share[:, : strip.stop])
        del share, ones  # before the next block is made
    for strip in strips:
        gram[: strip.start, strip] = gram[strip, : strip.start].T
    return gram, pull, total


class _Chase:
    """The state of a pursuit, which chooses ``count`` slots and fits one weight for each chosen slot.

    ``schedule`` says how many slots are chosen before each fit. A slot's weight multiplies the slot's attention mass,
    so that the chosen slots make up for the others. ``problem`` is the least-squares fit of the weights. Choosing a
    slot adds the slot's weight to this fit. The weight of a slot that is not chosen is 0 and is left out of the fit.
    """

    def __init__(self, problem: Pivoting, count: int, schedule: Schedule) -> None:
        self.problem, self.count, self.schedule = problem, count, schedule
        self.held = torch.zeros_like(problem.state, dtype=torch.bool)
        """Slots that may not be dropped."""
        self.fits, self.replaced, self.converged = 0, 0, True

    def hold(self, keep: torch.Tensor | None) -> None:
        """Choose the slots ``keep`` and never drop them."""
        if keep is not None and len(keep):
            self.held[keep] = True
            self.problem.state[keep] = FREE
            self._fit()

    def fill(self) -> None:
        """Add the slots whose weights lower the error most steeply, and refit, until ``count`` are chosen."""
        state = self.problem.state
        while missing := self.count - int((state != ABSENT).sum()):
            new = min(missing, self.schedule.batch(self.count - missing))
            state[self._steepest(new)] = FREE
            self._fit()

    def _steepest(self, count: int) -> torch.Tensor:
        """Return the ``count`` unchosen slots whose weights lower the error most steeply when raised from 0.

        Of slots that are equal within rounding, the newer ones are returned.
        """
        problem = self.problem
        descent = problem.gradient.neg().masked_fill_(problem.state != ABSENT, -math.inf)
        edge = descent.topk(count).values[-1]
        blur = problem.pull.abs().mul_(_BLUR)
        surely, perhaps = descent - blur > edge, descent + blur >= edge
        return top(surely.int() + perhaps, count)

    def replace(self, cutoff: float | None) -> None:
        """Replace chosen slots whose log weight is at most ``cutoff`` by other slots, in up to three rounds.

        A dropped slot may be chosen again. No more slots are dropped than there are slots to choose instead.
        """
        least = 0.0 if cutoff is None else math.exp(cutoff) * (1 + 1e-6)
        for _ in range(_ROUNDS):
            chosen = self.problem.state != ABSENT
            weak = chosen & ~self.held & (self.problem.solution <= least)
            count = min(int(weak.sum()), int((~chosen).sum()))
            if not count:
                break
            dropped = top(self.problem.gradient.masked_fill(~weak, -math.inf), count)
            self.problem.state[dropped] = ABSENT
            self.replaced += count
            self.fill()

    def _fit(self) -> None:
        self.converged = self.problem.solve(_MOST_PIVOTS)
        self.fits += 1

    def result(self, pull: torch.Tensor, total: float) -> Solution[Pursued]:
        """Return the chosen slots and their log weights, which are all 0 unless the fit is better than weights of 1."""
        problem, gram = self.problem, self.problem.factor.gram
        chosen = problem.state != ABSENT
        kept = chosen.nonzero().squeeze(-1)
        solved = problem.result(converged=self.converged)
        weights, outcome = solved.value, solved.outcome
        fitted, plain = (_squared(gram, pull, vector) for vector in (weights, chosen.double()))
        if fitted < plain - _BLUR * total:
            log_weights = weights[kept].log_().float()
        else:
            outcome = Outcome.REFUSED
            log_weights = torch.zeros(len(kept), dtype=torch.float32, device=gram.device)
        error = math.sqrt(max(0.0, total + min(fitted, plain)) / total)
        stats = {"error": error, "fits": self.fits, "replaced": self.replaced}
        return Solution(Pursued(kept, log_weights), outcome, problem.factor.condition(), stats)


def _squared(gram: torch.Tensor, pull: torch.Tensor, weights: torch.Tensor) -> float:
    """Return ``|Φ w - u|² - |u|²`` for the slots' ``weights`` w, where ``gram`` is ``ΦᵀΦ`` and ``pull`` is ``Φᵀu``.

    ``Φ w`` has, for each query, the attention mass of the slots with these weights. u has, for each query, the
    attention mass that is wanted. ``|Φ w - u|²`` is therefore the squared error of the weights; ``|u|²`` is a constant.
    """
    return float(weights @ ((gram @ weights.to(gram.dtype)).double() - 2 * pull))
