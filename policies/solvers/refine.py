"""Gradient refinement: take a few bounded steps on keys, β and values of the kept slots together.

The closed-form fits of β and values do not change the kept keys. Changing the keys too lowers the errors of attention
mass and output further, but takes several passes over the queries. The gradient is computed by explicit formulas, so
that no autograd graph of queries x slots is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.solution import Outcome, Solution

_FADING = (0.8, 0.95)
"""Decay rates per step of Adam's mean gradient and mean squared gradient; small, because there are few steps."""
_FLOOR = 0.3
"""Entries of the gradient below this fraction of the gradient's root mean square take shorter steps, so that rounding
errors do not move slots."""
_LONGER, _SHORTER = 1.3, 0.3
_FLOAT = 4
_SMALL = 4096

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys ``[t, d]``, β ``[t, 1]`` and values ``[t, dv]``, or three tensors that belong to them, such as gradients."""


@dataclass(frozen=True, slots=True)
class Reach:
    """The largest changes of a slot: ``keys`` is a fraction of the length of the slot's key, ``bias`` is in nats, and
    ``values`` is a fraction of the length of the segment's longest value.
    """  # noqa: D205 - one sentence

    keys: float = 0.3
    bias: float = 0.3
    values: float = 0.1


NEAR = Reach()


class Refined(NamedTuple):
    """The refined ``keys [t, d]``, ``bias [t]`` (total β) and ``values [t, dv]`` of the kept slots, float32."""

    keys: torch.Tensor
    bias: torch.Tensor
    values: torch.Tensor


def refine(
    whole: LocalAttention,
    kept: LocalAttention,
    values: torch.Tensor,
    fitted: torch.Tensor,
    *,
    steps: int = 8,
    rate: float = 0.05,
    reach: Reach = NEAR,
    mass_weight: float = 1.0,
) -> Solution[Refined]:
    """Change keys, β and values of the kept slots by gradient steps that lower the errors of output and mass.

    The objective is the mean over all queries of ``|o' - o|² / mean |o|² + mass_weight (log m' - log m)²``. o and m are
    a query's output and mass over the whole segment, o' and m' those over the kept slots. Neither o nor o' includes
    slots outside the segment. Every query counts with its weight. The steps are those of Adam. A step that does not
    lower the objective is undone, and the next step is shorter. If no step lowers the objective, the start is returned
    with the outcome ``REFUSED``. The stats ``before`` and ``after`` are the objective at the start and at the result.

    Args:
        whole: attends over all slots.
        kept: attends over the kept slots, with the same queries; its keys and fitted β are the start.
        values: ``[T, dv]`` float32, the values of all slots.
        fitted: ``[t, dv]`` float32, the fitted values of the kept slots, which are the start.
        steps: number of steps tried; each takes one pass over the queries, after two passes at the start.
        rate: length of the first step, as a fraction of the reach.
        reach: the largest changes allowed from the start.
        mass_weight: weight of an error of 1 nat in the log mass relative to an output error of 100 %.

    Invariants: an accepted result has a smaller objective on the given queries than the start; nothing moves beyond the
    reach; a slot that no query attends to does not move; no global state is read or written. The working memory is
    :func:`refine_bytes`.

    Source: the joint optimisation of keys, β and values in arXiv:2602.16284, which has no bound on the changes; Adam,
    arXiv:1412.6980.
    """
    objective = _Objective(whole, values, mass_weight)
    start: Parts = (kept.keys, kept.bias[:, None], fitted)
    walk = _Walk(start, _limits(start, values, reach), rate)
    before, gradient = objective.at(start)
    least = before
    for _ in range(steps):
        point = walk.step(gradient)
        value, there = objective.at(point)
        if value < least:
            walk.gained(point)
            least, gradient = value, there
        else:
            walk.lost()
        del point, there  # before the next ones are made
    keys, bias, moved = walk.point
    outcome = Outcome.REFUSED if walk.point is start else Outcome.SOLVED
    return Solution(Refined(keys, bias.squeeze(-1), moved), outcome, stats={"before": before, "after": least})


def refine_bytes(slots: int, kept: int, queries: int, rows: int, key_dim: int, value_dim: int) -> int:
    """Return the most bytes that :func:`refine` allocates for ``queries`` queries in blocks of ``rows``."""
    target = queries * (value_dim + 1)
    point = kept * (key_dim + value_dim + 1)
    block = rows * (2 * key_dim + 2 * value_dim + 8 + max(slots, 2 * kept))
    lengths = kept * 8 + slots
    return (target + 9 * point + block + lengths) * _FLOAT + _SMALL


class _Objective:
    """The objective that :func:`refine` lowers; it stores every query's output and log mass over the whole segment."""

    def __init__(self, whole: LocalAttention, values: torch.Tensor, mass_weight: float) -> None:
        self.whole = whole
        self.output = values.new_empty(whole.count, values.shape[1])
        self.log_mass = values.new_empty(whole.count)
        self.length = self.total = 0.0
        for rows, block in whole.blocks():
            weights, self.log_mass[rows] = whole.weights(block)
            torch.mm(weights, values, out=self.output[rows])
            del weights  # before the next block is made
            counts = self._counts(rows)
            self.length += float((self.output[rows].square().sum(dim=-1) * counts).sum())
            self.total += float(counts.sum())
        self.length = self.length or 1.0
        self.mass_weight = mass_weight / self.total

    def _counts(self, rows: slice) -> torch.Tensor:
        """Return the weights ``[B]`` of the queries ``rows``."""
        ones = torch.ones_like(self.log_mass[rows, None])
        return self.whole.scaled(ones, rows).square_().squeeze(-1)

    def at(self, point: Parts) -> tuple[float, Parts]:
        """Return the objective and its gradient at ``point``."""
        keys, bias, values = point
        kept = self.whole.over(keys, bias.squeeze(-1))
        gradient = (torch.zeros_like(keys), torch.zeros_like(bias), torch.zeros_like(values))
        value = 0.0
        for rows, block in kept.blocks():
            weights, log_mass = kept.weights(block)
            counts = self._counts(rows)
            output = weights @ values
            missing = output - self.output[rows]
            lost = log_mass.sub_(self.log_mass[rows])
            value += float((missing.square().sum(dim=-1) * counts).sum()) / self.length
            value += float((lost.square() * counts).sum()) * self.mass_weight
            missing.mul_(counts[:, None] * (2 / self.length))
            lost.mul_(counts).mul_(2 * self.mass_weight)
            gradient[2].addmm_(weights.T, missing)
            # Through the softmax: dS = W (dW - <dW, W>), where <dW, W> = <dO, O>; the log mass adds its own W.
            slope = missing @ values.T
            slope.sub_((missing.mul_(output).sum(dim=-1) - lost)[:, None]).mul_(weights)
            gradient[1].add_(slope.sum(dim=0)[:, None])
            gradient[0].addmm_(slope.T, block, alpha=kept.scale)
            del weights, log_mass, lost, output, missing, slope  # before the next block is made
        return value, gradient


class _Walk:
    """The state of a search by Adam steps from the best point so far, at most ``limits`` away from the start.

    A step that lowers the objective makes the next steps longer; a step that does not lower it is undone, and the next
    steps are shorter.
    """

    def __init__(self, start: Parts, limits: Parts, rate: float) -> None:
        self.start, self.limits, self.rate = start, limits, rate
        self.point = start
        self.forget()

    def forget(self) -> None:
        """Reset Adam's averages of earlier gradients."""
        self.mean: list[torch.Tensor | None] = [None] * len(self.start)
        self.square: list[torch.Tensor | None] = [None] * len(self.start)
        self.taken = 0

    def gained(self, point: Parts) -> None:
        """Take ``point`` as the best point, since it lowers the objective, and make the next steps longer."""
        self.point = point
        self.rate *= _LONGER

    def lost(self) -> None:
        """Stay at the best point so far, and make the next steps shorter."""
        self.rate *= _SHORTER
        self.forget()

    def step(self, gradient: Parts) -> Parts:
        """Return the next point to try, given the gradient at the best point so far."""
        self.taken += 1
        keys, bias, values = (self._part(index, part) for index, part in enumerate(gradient))
        return keys, bias, values

    def _part(self, index: int, gradient: torch.Tensor) -> torch.Tensor:
        start, limit = self.start[index], self.limits[index]
        move = self._direction(index, gradient).mul_(limit).mul_(-self.rate / math.sqrt(gradient.shape[1]))
        shift = move.add_(self.point[index]).sub_(start)
        tiny = torch.finfo(shift.dtype).tiny
        length = shift.norm(dim=-1, keepdim=True).clamp_(min=tiny)
        return shift.mul_((limit / length).clamp_(max=1)).add_(start)

    def _direction(self, index: int, gradient: torch.Tensor) -> torch.Tensor:
        """Return Adam's direction, a new tensor: the mean gradient divided by the root of the mean squared gradient."""
        keep, keep_square = _FADING
        mean, square = self.mean[index], self.square[index]
        if mean is None or square is None:
            mean = self.mean[index] = torch.zeros_like(gradient)
            square = self.square[index] = torch.zeros_like(gradient)
        mean.lerp_(gradient, 1 - keep)
        square.mul_(keep_square).addcmul_(gradient, gradient, value=1 - keep_square)
        size = (square / (1 - keep_square**self.taken)).sqrt_()
        size.add_(_FLOOR * float(size.norm()) / math.sqrt(size.numel()) + torch.finfo(size.dtype).tiny)
        return torch.div(mean, size, out=size).div_(1 - keep**self.taken)


def _limits(start: Parts, values: torch.Tensor, reach: Reach) -> Parts:
    """Return the largest allowed changes of each slot's key, β and value, ``[t, 1]`` each."""
    keys, bias, _ = start
    longest = values.norm(dim=-1).amax()
    return (
        keys.norm(dim=-1, keepdim=True).mul_(reach.keys),
        torch.full_like(bias, reach.bias),
        (torch.ones_like(bias) * longest).mul_(reach.values),
    )
