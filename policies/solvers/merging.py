"""Merging: slots with nearly equal keys become one slot, whose β is raised so that it weighs as much as all of them."""

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
    """The result of a merging: the indices ``kept [t]`` int64, ascending, of the slots that stay.

    ``bias [t]`` is their new total β, and ``values [t, dv]`` are their new values, both float32.
    """

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
    """Merge the most similar slots, then remove the least important slots, until ``count`` slots are left.

    First, slots are merged in pairs, the most similar pair first. In each pair, the less important slot is merged into
    the more important slot, which becomes its *leader*. A slot that was merged takes part in no further pair. A leader
    can take in more slots, but is not merged into another slot. A leader and the slots merged into it form a *group*; a
    slot without a partner is a group by itself. Second, if more than ``count`` groups are left, the groups with the
    least important leaders are removed as ``rest`` says.

    A group becomes one slot with the key of its leader. The value of this slot is the weighted mean of the values of
    the group's slots. The leader's β grows by ``log(group's weight / leader's weight)``; the group's weight is the sum
    of the weights of its slots. The stat ``merged`` counts the slots that were merged into a kept slot. The stat
    ``evicted`` counts the slots that were dropped.

    Args:
        keys: ``[T, d]`` float32.
        values: ``[T, dv]`` float32.
        bias: ``[T]`` float32, β.
        importance: ``[T]``; of two equally important slots, the later counts as more important.
        count: number of slots that stay; all slots stay if there are no more than this.
        threshold: the smallest cosine between two keys at which their slots may merge.
        log_weights: ``[T]``, the log weight of each slot, e.g. the log of the mean attention that it receives; ``None``
            uses β as the log weight, which is exact if the keys of a group are equal.
        rest: how groups are removed: "evict" drops all slots of the group; "nearest" merges the group into one of the
            slots that stay, the slot most similar to the leader of the group.
        rows: number of slots that are compared with all others at a time.

    Invariants: exactly ``min(count, T)`` slots stay. With ``rest="evict"``, the cosine of a merged slot's key with its
    leader's key is at least ``threshold``. If ``log_weights`` is ``None`` and the keys of each group are equal, merging
    changes no query's mass and output; only evictions change them. The working memory is :func:`merging_bytes`.

    Sources: D2O, arXiv:2406.13035 (a cosine threshold decides between merging into the most similar slot and eviction);
    WeightedKV, arXiv:2503.01330 (the key stays as it is, values are averaged by attention); "Token Merging",
    arXiv:2210.09461 (the logit grows by the log of the group's size).

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
    """Return an upper bound of the bytes that :func:`merge` allocates in PyTorch."""
    block = min(rows, slots) * slots
    comparing = slots * key_dim + max(slots * key_dim, block + block // _FLOAT)
    pooling = 3 * slots * value_dim
    return max(comparing, pooling) * _FLOAT + slots * _BYTES_PER_SLOT + _SMALL


class _Forest:
    """The state of every slot during a merging: alive (a slot of its own), merged into another slot, or evicted.

    Slots are indexed in order of falling importance. ``alive [T]`` is true for slots that are alive. ``parent [T]`` is
    the slot's own index while it is alive, the index of the slot that it was merged into, or -1 after its eviction.
    ``units [T, d]`` are the keys, scaled to length 1.
    """

    def __init__(self, units: torch.Tensor, rows: int) -> None:
        self.units, self.rows = units, rows
        self.parent = torch.arange(len(units), device=units.device)
        self.alive = torch.ones(len(units), dtype=torch.bool, device=units.device)

    def join(self, threshold: float, most: int) -> None:
        """Merge up to ``most`` slots, each into the most similar alive slot that is more important; see :func:`merge`.

        The most similar pair is merged first. Only pairs with a cosine of at least ``threshold`` are merged.
        """
        joined: set[int] = set()
        crowned: set[int] = set()
        waiting = [(-cosine, -slot, lead) for slot, (cosine, lead) in enumerate(self._nearest()) if cosine >= threshold]
        heapq.heapify(waiting)
        while waiting and len(joined) < most:
            _, slot, lead = heapq.heappop(waiting)
            slot = -slot
            if slot in crowned:
                continue
            if lead in joined:  # the leader has joined another: find the next most similar slot and queue again
                cosine, lead = self._nearest_alive(slot)
                if cosine >= threshold:
                    heapq.heappush(waiting, (-cosine, -slot, lead))
                continue
            joined.add(slot)
            crowned.add(lead)
            self.parent[slot] = lead
            self.alive[slot] = False

    def _nearest(self) -> list[tuple[float, int]]:
        """Return, for every slot, the most similar of all more important slots, as a pair (cosine, index).

        All pairs are compared. Hashing by random hyperplanes would compare fewer pairs. It was tried on real keys, with
        4 hash tables of 8 bits. It missed 15 % of the nearest slots with a cosine above 0.9, and was slower up to 4,096
        slots. At 8,192 slots it was twice as fast, but there comparing all pairs takes only 0.13 s.
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
        """Evict the slots ``leave`` together with all slots that were merged into them.

        With ``adopt``, nothing is evicted: each slot of ``leave``, together with the slots merged into it, is merged
        into the slot of ``stay`` with which it has the largest cosine.
        """
        self.alive[leave] = False
        for part in torch.split(leave, self.rows):
            nearest = stay[(self.units[part] @ self.units[stay].mT).argmax(dim=-1)] if adopt and len(stay) else -1
            self.parent[part] = nearest
        orphans = (self.parent >= 0) & ~self.alive[self.parent.clamp(min=0)]
        self.parent[orphans] = self.parent[self.parent[orphans]]


def _pooled(
    parents: torch.Tensor, kept: torch.Tensor, log_weights: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for the group of each kept slot, its log weight ``[t]`` and its weighted mean value ``[t, dv]``.

    The *group* of a kept slot is this slot and all slots merged into it. ``parents [T]`` has, for every slot, the index
    of the kept slot to whose group it belongs, or -1 if it was evicted. The weight of a slot is ``exp`` of its entry of
    ``log_weights [T]``. The weight of a group is the sum of the weights of its slots.
    """
    place = torch.full_like(parents, -1)
    place[kept] = torch.arange(len(kept), device=kept.device)
    members = (parents >= 0).nonzero().squeeze(-1)
    group = place[parents[members]]
    log_weights = log_weights[members]
    # Weights relative to the largest of their group neither overflow nor all become 0.
    peak = log_weights.new_full((len(kept),), -math.inf).scatter_reduce_(0, group, log_weights, "amax")
    weights = (log_weights - peak[group]).exp_()
    mass = torch.zeros_like(peak).index_add_(0, group, weights)
    means = values.new_zeros(len(kept), values.shape[1]).index_add_(0, group, values[members] * weights[:, None])
    return mass.log() + peak, means.div_(mass[:, None])
