"""The score column: what compactors carry from one compaction to the next, and what attention adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from agentmem.contracts import Compaction, Compactor, HeadCompaction, Policy, ScoreColumn, Segment, SegmentShape
from agentmem.engine import Engine
from agentmem.memory.forwards import Arriving
from agentmem.memory.memory import Memory
from agentmem.planning.capacity import make_plan
from agentmem.planning.model_shape import LayerShape, ModelShape
from agentmem.policies.budgets.uniform import Uniform
from agentmem.settings import Settings
from oracles import attention as reference
from support import tiny
from support.no_model import engine

FUSED = LayerShape(kv_heads=2, query_heads=4, key_dim=8, value_dim=8)
EXPLICIT = replace(FUSED, value_dim=5)
"""Keys and values of other widths take the explicit path of attention."""
LAYERS = pytest.mark.parametrize("layer", [FUSED, EXPLICIT], ids=["fused", "explicit"])
SLOTS, TARGET, FIRST, RECENT = 24, 14, 2, 4


class Carrying(Compactor):
    """Keeps every second slot and the newest, and gives each kept slot a number that says which slot it was.

    The number is the slot's position and a hundredth of the compaction, so that it tells where it came from.
    """

    def __init__(self, scores: ScoreColumn = "carried", *, silent: bool = False) -> None:
        self.scores, self.silent = scores, silent
        self.seen: list[list[tuple[list[int], list[float]]]] = []

    def workspace(self, shape: SegmentShape) -> int:
        """Indices and scores."""
        return shape.heads * shape.slots * 24 + 1024

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """Look at what came back, then number what stays."""
        results, looked = [], []
        for head, count in zip(segment.heads, slots, strict=True):
            assert head.scores is not None
            looked.append((head.positions.tolist(), head.scores.tolist()))
            kept = torch.arange(head.slots)[-2 * count :: 2][-count:]
            mark = head.positions[kept] + (len(self.seen) + 1) / 100
            results.append(HeadCompaction(kept, scores=None if self.silent else mark))
        self.seen.append(looked)
        return Compaction(tuple(results))


def opened(compactor: Compactor, layer: LayerShape, layers: int = 1) -> Engine:
    """The engine of a memory of 24 slots per head without a model."""
    shape = ModelShape("one", (layer,) * layers, 4, hidden=32, intermediate=32, vocabulary=64)
    policy = Policy("mine", "-", "-", compactor, Uniform())
    wish = {"keep_first": FIRST, "keep_recent": RECENT, "min_reclaim": 2, "max_slots": SLOTS, "target": TARGET}
    plan = make_plan(shape, Settings.of(cap=1 << 30, chunk=8, **wish), policy)
    cap = plan.resident_bytes + plan.workspace_bytes
    memory = Memory(shape, Settings.of(cap=cap, chunk=8, on_failure="raise", **wish), policy)
    memory.bind(1)
    return engine(memory)


def feed(runs: Engine, count: int, *, taken_back: bool = False) -> torch.Tensor:
    """Feed so many tokens in forwards of at most 8; return the last forward's queries and keys' attention output."""
    row, layers = runs.memory.sequences[0], runs.memory.shape.layers
    output = torch.empty(0)
    while count:
        piece = runs.piece([[True] * min(count, 8)], 8)
        step = runs.begin([Arriving([7] * piece, range(row.next_position, row.next_position + piece), slice(None))])
        for index, layer in enumerate(layers):
            keys, values = torch.randn(1, 2, piece, layer.key_dim), torch.randn(1, 2, piece, layer.value_dim)
            output = step.attend(index, torch.randn(1, 4, piece, layer.key_dim), keys, values, 0.35)
        if taken_back:
            runs.abandon()
        else:
            runs.commit()
        count -= piece
    return output


def scores(memory: Memory) -> list[torch.Tensor]:
    """The score column of every head of the first layer, as far as it is filled."""
    store = memory.sequences[0].stores[0]
    assert store is not None
    assert store.scores is not None
    pairs = zip(store.starts, store.lengths, strict=True)
    return [store.scores[start : start + length].clone() for start, length in pairs]


def columns(memory: Memory) -> list[tuple[list[float], bool]]:
    """The filled scores of each layer and head, and whether a free slot has a score."""
    found = []
    for store in memory.sequences[0].stores:
        assert store is not None
        assert store.scores is not None
        for start, length, room in zip(store.starts, store.lengths, store.capacities, strict=True):
            free = store.scores[start + length : start + room]
            found.append((store.scores[start : start + length].tolist(), bool(free.any())))
    return found


# ---- carried


@LAYERS
def test_a_compactor_gets_back_what_it_gave(layer: LayerShape) -> None:
    """Kept slots have the number that the last compaction gave them, newer slots and the prefix have 0."""
    compactor = Carrying()
    runs = opened(compactor, layer)
    memory = runs.memory
    feed(runs, 70)
    assert len(compactor.seen) >= 4
    assert all(score == 0 for head in compactor.seen[0] for score in head[1])
    for index, looked in enumerate(compactor.seen[1:], start=1):
        for positions, found in looked:
            newest = memory.compactions[index - 1].tokens_seen - RECENT
            for position, score in zip(positions, found, strict=True):
                expected = position + index / 100 if position < newest else 0.0
                assert score == pytest.approx(expected, abs=1e-4)
            assert any(found)
            assert not all(found)


@LAYERS
@pytest.mark.parametrize("pieces", [1, 5])
def test_attention_adds_nothing_to_what_is_carried(layer: LayerShape, pieces: int) -> None:
    """Decoding and prefilling leave the column as it is, on the fused and on the explicit path."""
    runs = opened(Carrying(), layer)
    memory = runs.memory
    feed(runs, SLOTS)
    runs.compact(memory.sequences[0])
    before = scores(memory)
    assert all(bool(head[FIRST:-RECENT].all()) for head in before)
    for _ in range(2):
        feed(runs, pieces)
    after = scores(memory)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(other[: len(one)], one)
        assert not other[len(one) :].any()
        assert len(other) == len(one) + 2 * pieces


@LAYERS
def test_what_is_silent_keeps_its_numbers(layer: LayerShape) -> None:
    """A compactor that returns no scores leaves the kept slots theirs."""
    compactor = Carrying()
    runs = opened(compactor, layer)
    memory = runs.memory
    feed(runs, SLOTS)
    runs.compact(memory.sequences[0])
    given = [dict(zip(positions, found, strict=True)) for positions, found in looked_at(memory)]
    compactor.silent = True
    feed(runs, 20)
    assert len(compactor.seen) == 2
    for numbers, (positions, found) in zip(given, looked_at(memory), strict=True):
        for position, score in zip(positions, found, strict=True):
            assert score == numbers.get(position, 0.0)
        assert any(found)


def looked_at(memory: Memory) -> list[tuple[list[int], list[float]]]:
    """Positions and scores of every head's segment now."""
    store = memory.sequences[0].stores[0]
    assert store is not None
    store.settle(torch.tensor(memory.sequences[0].tail.tolist(), dtype=torch.int32))
    segments = [store.segment(head, FIRST, RECENT) for head in range(2)]
    return [(each.positions.tolist(), [] if each.scores is None else each.scores.tolist()) for each in segments]


@pytest.mark.parametrize("kind", ["received", "carried"])
def test_a_forward_that_is_taken_back_leaves_no_scores(kind: ScoreColumn) -> None:
    """Older slots have the scores that they had, and the next token in its place begins at 0."""
    runs = opened(Carrying(kind), FUSED, layers=2)
    memory = runs.memory
    for held, pieces in ((12, (5, 1)), (SLOTS + 5, (5, 1, 2))):
        feed(runs, held - memory.sequences[0].seen)
        before = columns(memory)
        assert not any(free for _, free in before)
        for count in pieces:
            feed(runs, count, taken_back=True)
            assert columns(memory) == before
            tiny.audit(memory)


# ---- received


@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize("reached", [1, 2, 3])
def test_a_forward_that_is_run_again_counts_once(pieces: int, reached: int) -> None:
    """Wherever the first one ended, the scores are those of a memory in which nothing failed."""
    found = []
    for fails in (False, True):
        torch.manual_seed(5)
        runs = opened(Carrying("received"), FUSED, layers=3)
        feed(runs, 10)
        state = torch.get_rng_state()
        if fails:
            step = runs.begin([Arriving([7] * pieces, range(10, 10 + pieces), slice(None))])
            for layer in range(reached):
                keys, values = torch.randn(2, 1, 2, pieces, 8)
                step.attend(layer, torch.randn(1, 4, pieces, 8), keys, values, 0.35)
        torch.set_rng_state(state)
        feed(runs, pieces)
        found.append(columns(runs.memory))
    assert found[1] == found[0]


@pytest.mark.parametrize("quantised", [False, True])
def test_the_scores_before_a_forward_are_counted_until_its_commit(quantised: bool) -> None:
    """Under a cap without a byte to spare: exactly the plan's share when the memory is full, nothing afterwards."""
    layer = replace(FUSED, key_dim=32, value_dim=32, slot_dtype="int8") if quantised else FUSED
    runs = opened(Carrying("received"), layer, layers=3)
    memory = runs.memory
    feed(runs, SLOTS - 1)
    step = runs.begin([Arriving([7], range(SLOTS - 1, SLOTS), slice(None))])
    for index in range(3):
        query, key, value = (torch.randn(1, heads, 1, layer.key_dim) for heads in (4, 2, 2))
        step.attend(index, query, key, value, 0.35)
        assert memory.ledger.resident == memory.plan.resident_bytes + (index + 1) * 2 * SLOTS * 4
        tiny.audit(memory)
    assert memory.ledger.resident == memory.plan.resident_bytes + memory.plan.undo_bytes
    runs.commit()
    assert memory.ledger.resident == memory.plan.resident_bytes
    feed(runs, 40)
    tiny.audit(memory)
    assert memory.ledger.resident == memory.plan.resident_bytes


def test_a_full_store_is_grown_beside_the_scores_before_a_forward() -> None:
    """The last layer's new store and the other layers' earlier scores fit together under the smallest cap."""
    runs = opened(Carrying("received"), replace(FUSED, key_dim=32, value_dim=32), layers=8)
    feed(runs, SLOTS // 2)
    feed(runs, 8)
    plan, memory = runs.memory.plan, runs.memory
    assert plan.workspace_bytes >= plan.undo_bytes + plan.move_bytes
    assert memory.ledger.peak <= memory.ledger.cap == plan.resident_bytes + plan.workspace_bytes


@LAYERS
def test_what_is_received_is_the_attention_of_all_queries_since(layer: LayerShape) -> None:
    """The column is the oracle's sum over every query that saw the slot, whatever path attention takes."""
    runs = opened(Carrying("received"), layer)
    memory = runs.memory
    queries, keys, values = (torch.randn(heads, 12, width) for heads, width in ((4, 8), (2, 8), (2, layer.value_dim)))
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        step = runs.begin([Arriving([7] * (stop - start), range(start, stop), slice(None))])
        span = slice(start, stop)
        step.attend(0, queries[None, :, span], keys[None, :, span], values[None, :, span], 0.35)
        runs.commit()
    fresh = [reference.Slots(key, value) for key, value in zip(keys, values, strict=True)]
    empty = [reference.Slots(each.keys[:0], each.values[:0]) for each in fresh]
    expected = reference.attention(queries, empty, fresh, 0.35).own
    for found, received in zip(scores(memory), expected, strict=True):
        torch.testing.assert_close(found.double(), received, atol=1e-5, rtol=0)


def test_a_probe_adds_nothing_to_what_is_received() -> None:
    """Queries of a transient forward are not the model's own."""
    with tiny.capped("heavy-hitters") as memory:
        tiny.feed(memory, tiny.ids(20))
        before = scores(memory.memory)
        memory.peek([5, 6, 7])
        assert all(torch.equal(one, other) for one, other in zip(before, scores(memory.memory), strict=True))


# ---- none


@pytest.mark.parametrize(("kind", "column"), [("none", False), ("received", True), ("carried", True)])
def test_a_column_is_there_for_those_who_want_one(kind: ScoreColumn, column: bool) -> None:
    """Four bytes a slot, counted, or nothing."""

    class Newest(Carrying):
        def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
            assert all((head.scores is not None) == column for head in segment.heads)
            pairs = zip(segment.heads, slots, strict=True)
            return Compaction(tuple(HeadCompaction(torch.arange(head.slots - n, head.slots)) for head, n in pairs))

    runs = opened(Newest(kind), FUSED, layers=2)
    memory = runs.memory
    feed(runs, 40)
    assert memory.compactions
    for store in memory.sequences[0].stores:
        assert store is not None
        assert (store.scores is not None) == column
        assert store.spec.slot_bytes == 16 * 4 + 8 + 4 * column
        assert store.allocated_bytes == store.held_bytes == SLOTS * 2 * store.spec.slot_bytes
    assert memory.ledger.resident == memory.plan.resident_bytes
