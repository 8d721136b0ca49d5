"""Merging: slots with nearly the same key become one, which answers for the weight of all."""

from __future__ import annotations

import heapq
import math
from typing import Literal, NamedTuple, get_args

import torch

from agentmem.policies.solvers.solution import Solution

Rest = Literal["evict", "nearest"]

_FLOAT = 4
_BYTES_PER_SLOT = 160
_SMALL = 4096


class Merged(NamedTuple):
    """``kept [t]`` int64 ascending, their total ``bias [t]`` and ``values [t, dv]``, float32."""

    kept: torch.Tensor
    bias: torch.Tensor
    values: torch.Tensor


def merge(
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    importance: torch.Tensor,
    count: int,
    *,
    threshold: float = 0.9,
    log_weights: torch.Tensor | None = None,
    rest: Rest = "evict",
    rows: int = 128,
) -> Solution[Merged]:
    """Merge the most similar slots, then drop the least important ones, until ``count`` are left.

    A slot joins the most similar of those that are more important than itself, the most similar pair first; a slot that
    others have joined stays. A group keeps the key of its most important slot; its value is the mean of all by weight,
    and that slot's β grows by the log of the group's weight over its own. Stats: ``merged``, the slots that
    went into a kept one, and ``evicted``, those that left without a trace.

    Args:
        keys: ``[T, d]`` float32.
        values: ``[T, dv]`` float32.
        bias: ``[T]`` float32, β.
        importance: ``[T]``; of equally important slots the later leads.
        count: how many slots stay; all of them do when there are no more.
        threshold: the least cosine between two keys that merge.
        log_weights: ``[T]``, of each slot, e.g. the log of the mean attention that it gets; ``None`` means β, which is
            exact where keys coincide.
        rest: what becomes of the least important when too few are similar: they leave, with those that joined them, or
            join the nearest that stays.
        rows: slots that are compared with all others at a time.

    Invariants: exactly ``min(count, T)`` slots stay; no slot joins one whose key has a smaller cosine with its own,
    unless ``rest="nearest"``; where the keys of each group coincide, every query's mass and output stay what they
    were, but for those evicted. The working memory is :func:`merging_bytes`.

    Source: the cosine threshold between evicting and merging into the nearest, D2O, arXiv:2406.13035; the retained key
    and values averaged by attention, WeightedKV, arXiv:2503.01330; the log of the size in the logit, "Token Merging",
    arXiv:2210.09461.

    Raises:
        ValueError: ``rest`` is unknown.

    """
    if rest not in get_args(Rest):
        raise ValueError(f"rest: {rest!r} is unknown; choose one of {', '.join(get_args(Rest))}")
    total = len(keys)
    ranked = importance.flip(0).argsort(descending=True, stable=True).neg_().add_(total - 1)
    forest = _Forest(torch.nn.functional.normalize(keys[ranked], dim=-1), rows)
    forest.join(threshold, max(0, total - count))
    alive = forest.alive.nonzero().squeeze(-1)
    if len(alive) > count:
        forest.drop(alive[:count], alive[count:], adopt=rest == "nearest")
        alive = alive[:count]
    del forest.units
    parents = torch.empty(total, dtype=torch.int64, device=keys.device)
    parents[ranked] = torch.where(forest.parent >= 0, ranked[forest.parent.clamp(min=0)], -1)
    kept = ranked[alive].sort().values
    own = bias if log_weights is None else log_weights
    grouped, means = _pooled(parents, kept, own, values)
    evicted = int((parents < 0).sum())
    stats = {"merged": total - len(kept) - evicted, "evicted": evicted}
    return Solution(Merged(kept, bias[kept] + grouped - own[kept], means), stats=stats)


def merging_bytes(slots: int, rows: int, key_dim: int, value_dim: int) -> int:
    """An upper bound of what :func:`merge` allocates in PyTorch."""
    block = min(rows, slots) * slots
    comparing = slots * key_dim + max(slots * key_dim, block + block // _FLOAT)
    pooling = 3 * slots * value_dim
    return max(comparing, pooling) * _FLOAT + slots * _BYTES_PER_SLOT + _SMALL


class _Forest:
    """Who joined whom, among slots by falling importance: ``parent [T]``, itself while alive, -1 when evicted."""

    def __init__(self, units: torch.Tensor, rows: int) -> None:
        self.units, self.rows = units, rows
        self.parent = torch.arange(len(units), device=units.device)
        self.alive = torch.ones(len(units), dtype=torch.bool, device=units.device)

    def join(self, threshold: float, most: int) -> None:
        """Let up to ``most`` slots join the most similar one before them, the most similar pair first."""
        joined: set[int] = set()
        crowned: set[int] = set()
        waiting = [(-cosine, -slot, lead) for slot, (cosine, lead) in enumerate(self._nearest()) if cosine >= threshold]
        heapq.heapify(waiting)
        while waiting and len(joined) < most:
            _, slot, lead = heapq.heappop(waiting)
            slot = -slot
            if slot in crowned:
                continue
            if lead in joined:  # that one is gone: ask again, and wait
                cosine, lead = self._nearest_alive(slot)
                if cosine >= threshold:
                    heapq.heappush(waiting, (-cosine, -slot, lead))
                continue
            joined.add(slot)
            crowned.add(lead)
            self.parent[slot] = lead
            self.alive[slot] = False

    def _nearest(self) -> list[tuple[float, int]]:
        """For every slot the cosine with the most similar one before it, and that one.

        All pairs are compared: on real keys buckets of random hyperplanes (4 tables of 8 bits, which miss 15 % of the
        nearest above 0.9) are slower up to 4,096 slots, and twice as fast at 8,192, where this takes 0.13 s.
        """
        found: list[tuple[float, int]] = []
        for start in range(0, len(self.units), self.rows):
            block = self.units[start : start + self.rows]
            cosines = block @ self.units[: start + len(block)].mT
            cosines.masked_fill_(torch.ones_like(cosines, dtype=torch.bool).triu_(start), -math.inf)
            best = cosines.max(dim=-1)
            found += zip(best.values.tolist(), best.indices.tolist(), strict=True)
            del cosines  # before the next block is made
        return found

    def _nearest_alive(self, slot: int) -> tuple[float, int]:
        cosines = (self.units[:slot] @ self.units[slot]).masked_fill_(~self.alive[:slot], -math.inf)
        best = cosines.max(dim=0)
        return float(best.values), int(best.indices)

    def drop(self, stay: torch.Tensor, leave: torch.Tensor, *, adopt: bool) -> None:
        """Slots that ``leave`` and those that joined them are evicted, or adopted by the nearest of those that stay."""
        self.alive[leave] = False
        for part in torch.split(leave, self.rows):
            nearest = stay[(self.units[part] @ self.units[stay].mT).argmax(dim=-1)] if adopt and len(stay) else -1
            self.parent[part] = nearest
        orphans = (self.parent >= 0) & ~self.alive[self.parent.clamp(min=0)]
        self.parent[orphans] = self.parent[self.parent[orphans]]


def _pooled(
    parents: torch.Tensor, kept: torch.Tensor, log_weights: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each kept slot the log of its group's weight ``[t]`` and the group's mean value ``[t, dv]``."""
    place = torch.full_like(parents, -1)
    place[kept] = torch.arange(len(kept), device=kept.device)
    members = (parents >= 0).nonzero().squeeze(-1)
    group = place[parents[members]]
    log_weights = log_weights[members]
    # Relative to the heaviest of each group, so that weights of any size neither overflow nor vanish together.
    peak = log_weights.new_full((len(kept),), -math.inf).scatter_reduce_(0, group, log_weights, "amax")
    weights = (log_weights - peak[group]).exp_()
    mass = torch.zeros_like(peak).index_add_(0, group, weights)
    means = values.new_zeros(len(kept), values.shape[1]).index_add_(0, group, values[members] * weights[:, None])
    return mass.log() + peak, means.div_(mass[:, None])
