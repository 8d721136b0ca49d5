"""Very unequal budgets, others at every compaction: the bytes are those of the slots, to the byte."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from agentmem.contracts import BudgetRequest, Budgets, Policy
from agentmem.hf import CappedCache
from agentmem.planning.model_shape import BIAS_BYTES, POSITION_BYTES, SCORE_BYTES
from agentmem.reporting.report import CompactionReport
from support import tiny

LAYERS, HEADS, WIDTH = 3, 2, 16
PINNED = 4 + 8
MODEL = tiny.llama(LAYERS)

Slots = tuple[tuple[int, ...], ...]


class Wild(Budgets):
    """Gives every head one slot, then all that is allowed to one head after the other, in another order every time.

    Adaptive ones allocate any sum besides.
    """

    def __init__(self, head: float, layer: float, *, adaptive: bool = False) -> None:
        self.head_ceiling, self.layer_ceiling, self.adaptive = head, layer, adaptive
        self.allocated: list[Slots] = []

    def allocate(self, request: BudgetRequest) -> Slots:
        """Other slots than the last time."""
        chance = random.Random(len(self.allocated))  # noqa: S311  # a toy
        allocated = self.try_once(request, chance)
        while self.allocated and allocated == self.allocated[-1]:
            allocated = self.try_once(request, chance)
        self.allocated.append(allocated)
        return allocated

    def try_once(self, request: BudgetRequest, chance: random.Random) -> Slots:
        """All that is allowed to one head after the other."""
        allocated = [[min(request.floor, held) for held in heads] for heads in request.held]
        total = chance.randint(0, request.limit) if self.adaptive else request.total
        places = [(layer, head) for layer, heads in enumerate(allocated) for head in range(len(heads))]
        chance.shuffle(places)
        for layer, head in places:
            left = (
                total - sum(map(sum, allocated)),
                request.layer_ceiling - sum(allocated[layer]),
                request.ceiling - allocated[layer][head],
                request.held[layer][head] - allocated[layer][head],
            )
            allocated[layer][head] += max(0, min(left))
        return tuple(map(tuple, allocated))


class ByRequest(Wild):
    """The same request gives the same slots, whoever asks."""

    def allocate(self, request: BudgetRequest) -> Slots:
        """The order follows from what is held."""
        return self.try_once(request, random.Random(str(request.held)))  # noqa: S311  # a toy


def wild(kind: str, budgets: Budgets) -> Policy:
    """The policy of that kind with those budgets."""
    return replace(tiny.KINDS[kind], name="wild", budgets=budgets)


def capped(policy: Policy, **settings: Any) -> Any:
    """The smallest cap that the plan of 48 slots per head asks for; a refusal by the ledger is an error."""
    settings = {"on_failure": "raise"} | settings
    return tiny.capped_by(policy, MODEL, cap=tiny.need(policy, MODEL, **settings), **settings)


def lengths(memory: CappedCache) -> list[list[int]]:
    """Slots held by every head of every layer."""
    return [store.lengths for store in memory.memory.sequences[0].stores if store is not None]


CEILINGS = pytest.mark.parametrize(
    "budgets",
    [(3.0, 2.0, False), (6.0, 3.0, False), (1.5, 1.0, False), (3.0, 2.0, True), (6.0, 3.0, True)],
    ids=["three shares", "all to one head", "equal layers", "adaptive", "adaptive, one head"],
)


@CEILINGS
@pytest.mark.parametrize("kind", ["window", "heavy-hitters", "live+replay"])
def test_allocated_storage_is_the_sum_of_budgets_and_headroom(kind: str, budgets: tuple[float, float, bool]) -> None:
    """Through five compactions with changing budgets: exact for every layer, never padded, the ledger never refuses."""
    toy = Wild(budgets[0], budgets[1], adaptive=budgets[2])
    policy = wild(kind, toy)
    slot = 2 * WIDTH * 4 + BIAS_BYTES + POSITION_BYTES + (SCORE_BYTES if kind == "heavy-hitters" else 0)
    checked: list[int] = []

    def check(event: object) -> None:
        if isinstance(event, CompactionReport):
            checked.append(allocated(memory, toy.allocated[-1], slot))
            assert event.faults == ()
            assert event.bytes_peak <= event.bytes_before + memory.plan.workspace_bytes

    with capped(policy) as memory:
        memory.subscribe(check)
        for token in tiny.ids(10 * tiny.SLOTS)[0]:
            tiny.feed(memory, token[None, None], model=MODEL)
            if len(checked) == 5:
                break
        assert memory.report().peak_bytes <= memory.plan.cap_bytes == tiny.need(policy, MODEL)
    assert len(checked) == 5
    assert all(one != other for one, other in pairwise(toy.allocated))


def allocated(memory: CappedCache, allocated: Slots, slot: int) -> int:
    """Check every store against what its heads were allocated; return the bytes of all."""
    stores = [store for store in memory.memory.sequences[0].stores if store is not None]
    held = [[PINNED + kept for kept in heads] for heads in allocated]
    heads = LAYERS * HEADS
    headroom = (tiny.SLOTS * heads - sum(map(sum, held))) // heads
    for store, layer in zip(stores, held, strict=True):
        assert store.lengths == layer
        assert store.allocated_bytes == (sum(layer) + HEADS * headroom) * slot
        assert store.spec.slot_bytes == slot
    budgets = sum(map(sum, allocated))
    whole = sum(store.allocated_bytes for store in stores)
    assert whole == (budgets + heads * (PINNED + headroom)) * slot
    assert whole == memory.memory.ledger.resident - memory.plan.stored_bytes
    assert 0 <= tiny.SLOTS * heads * slot - whole < heads * slot, "headroom is all that R has room for"
    return whole


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_fuller_head_is_within_what_was_planned(adaptive: bool) -> None:
    """No head ever holds more than its ceiling and headroom, and some head comes near it."""
    toy = Wild(6.0, 3.0, adaptive=adaptive)
    with capped(wild("window", toy)) as memory:
        fullest = 0
        for token in tiny.ids(6 * tiny.SLOTS)[0]:
            tiny.feed(memory, token[None, None], model=MODEL)
            fullest = max(fullest, *map(max, lengths(memory)))
        plan = memory.plan
    least = PINNED if adaptive else plan.limit
    planned = PINNED + plan.most_budget + plan.capacity - least + 1
    assert max(kept for allocated in toy.allocated for heads in allocated for kept in heads) <= plan.most_budget
    assert tiny.SLOTS < fullest <= planned


class Sparing(Budgets):
    """Leaves one layer as it is and takes everything from the others."""

    head_ceiling = layer_ceiling = 3.0
    adaptive = True

    def __init__(self, spared: Sequence[int]) -> None:
        self.spared = list(spared)

    def allocate(self, request: BudgetRequest) -> Slots:
        """All that it holds to the next layer of the list, nothing to the others."""
        layer = self.spared.pop(0)
        return tuple(heads if index == layer else (0,) * len(heads) for index, heads in enumerate(request.held))


@pytest.mark.parametrize("spared", [(0, 0, 1), (0, 1, 2), (2, 1, 1), (2, 2, 0)])
def test_a_layer_that_keeps_all_keeps_its_positions(spared: tuple[int, ...]) -> None:
    """A layer that no compaction touched knows where its slots came from when a later one does touch it."""
    with capped(wild("window", Sparing(spared))) as memory:
        for layer in spared:
            tiny.feed(memory, tiny.ids(memory.room()), model=MODEL)
            before = lengths(memory)
            (report,) = memory.compact()
            assert report.faults == ()
            assert lengths(memory) == [
                held if index == layer else [PINNED] * HEADS for index, held in enumerate(before)
            ]
        row = memory.memory.sequences[0]
        for store in row.stores:
            assert store is not None
            assert store.settled == store.lengths
            for head in range(HEADS):
                positions = store.segment(head, 0, 0).positions.tolist()
                assert positions == [*range(4), *range(row.seen - store.lengths[head] + 4, row.seen)]


# ---- the invariants of every memory


@pytest.mark.parametrize("kind", ["window", "replay"])
def test_unequal_compactions_follow_from_the_tokens_however_they_are_cut(kind: str) -> None:
    """One prompt, pieces of 7 and single tokens give the same budgets, moments and logits."""
    outcomes = []
    for pieces in (1 << 20, 7, 1):
        toy = Wild(4.0, 2.0)
        with capped(wild(kind, toy)) as memory:
            logits = tiny.feed(memory, tiny.ids(150), pieces, model=MODEL)
            outcomes.append((toy.allocated, [each.tokens_seen for each in memory.compactions], logits))
    assert len(outcomes[0][1]) >= 3
    for allocated, moments, logits in outcomes[1:]:
        assert allocated == outcomes[0][0]
        assert moments == outcomes[0][1]
        assert torch.allclose(logits, outcomes[0][2], atol=1e-3)


@pytest.mark.parametrize("kind", ["window", "replay", "heavy-hitters"])
def test_an_unequal_row_in_a_batch_is_the_row_alone(kind: str) -> None:
    """Rows of a batch are allocated their own budgets, and give the tokens that each gives alone."""
    settings = {"max_new_tokens": 40, "do_sample": False}
    prompts = torch.cat([tiny.ids(60, seed=1), tiny.ids(60, seed=2)])
    with tiny.capped_by(wild(kind, ByRequest(4.0, 2.0)), MODEL) as memory:
        together = MODEL.generate(prompts, past_key_values=memory, **settings)
        assert memory.report().num_compactions >= 4
    for row in range(2):
        with tiny.capped_by(wild(kind, ByRequest(4.0, 2.0)), MODEL) as memory:
            alone = MODEL.generate(prompts[row : row + 1], past_key_values=memory, **settings)
        assert together[row].tolist() == alone[0].tolist()
