"""Tokens that are no longer pinned: their slots go back among the others, in order, and are compacted with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agentmem.compaction.request import Request
from agentmem.errors import SettingsRefused
from agentmem.hf import CappedCache
from agentmem.memory.pinning import pin, promote, settle, unpin
from agentmem.memory.positions import rebase
from agentmem.memory.state import copy
from agentmem.memory.store import LayerStore
from agentmem.testing import tiny_model
from support import tiny

NAMES = ("keys", "values", "bias", "positions")


def stores(memory: CappedCache) -> list[LayerStore]:
    """The stores of the only row, with all positions."""
    row = memory.memory.sequences[0]
    found = [store for store in row.stores if store is not None]
    for store in found:
        settle(row, store)
    return found


def heads(memory: CappedCache) -> list[dict[str, torch.Tensor]]:
    """Copies of what every head of every layer holds, in its order."""
    segments = [store.segment(head, 0, 0) for store in stores(memory) for head in range(len(store.lengths))]
    return [{name: getattr(each, name).clone() for name in NAMES} for each in segments]


def in_order(held: dict[str, torch.Tensor], front: int = 0) -> dict[str, torch.Tensor]:
    """The same slots with those behind the first ``front`` ones sorted by their positions."""
    order = torch.cat([torch.arange(front), front + held["positions"][front:].argsort()])
    return {name: tensor[order] for name, tensor in held.items()}


def same(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> bool:
    """Whether two memories hold the same slots in the same order, bit for bit."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(one[name], other[name]) for one, other in pairs for name in NAMES)


@pytest.mark.parametrize("kind", ["window", "heavy-hitters", "replay"])
def test_what_is_unpinned_goes_back_to_its_place(kind: str) -> None:
    """Never compacted, a memory is then as one that pinned nothing, slot by slot; no bytes were gained or lost."""
    with tiny.capped(kind) as memory, tiny.capped(kind) as twin:
        for each in (memory, twin):
            tiny.feed(each, tiny.ids(40))
        core = memory.memory
        row, before = core.sequences[0], core.ledger.resident
        for start, stop in ((4, 5), (10, 13), (20, 21)):
            pin(core, row, start, stop)
        promote(core, row)
        assert not same(heads(memory), heads(twin))
        unpin(row, 0, 40)
        assert row.pins.all == ()
        assert row.front(4) == 9, "it stands at the front until the next promotion"
        promote(core, row)
        assert row.front(4) == 4
        assert same(heads(memory), heads(twin))
        assert core.ledger.resident == before
        for each in (memory, twin):
            tiny.feed(each, tiny.ids(30, seed=1))
        assert row.compactions == 1
        assert same(heads(memory), heads(twin))
        tiny.audit(core)


@pytest.mark.parametrize("kind", ["window", "heavy-hitters", "replay", "replay+spread"])
def test_what_was_compacted_around_is_compacted_with_the_rest(kind: str) -> None:
    """After compactions the slots go back by position; a part stays pinned; the next compactions take what is not."""
    with tiny.capped(kind) as memory:
        tiny.feed(memory, tiny.ids(20))
        core = memory.memory
        row = core.sequences[0]
        pin(core, row, 6, 9)
        pin(core, row, 14, 16)
        tiny.feed(memory, tiny.ids(60, seed=1))
        assert row.compactions >= 2
        before, question = heads(memory), tiny.ids(3, seed=2)[0].tolist()
        answer = memory.peek(question)
        unpin(row, 7, 15)
        assert row.pins.spans == ((6, 7), (15, 16))
        promote(core, row)
        assert [store.promoted for store in stores(memory)] == [((6, 7), (15, 16))] * 2
        for held, old in zip(heads(memory), before, strict=True):
            assert held["positions"][:6].tolist() == [0, 1, 2, 3, 6, 15]
            rest = held["positions"][6:].tolist()
            assert {7, 8, 14} <= set(rest)
            assert rest == sorted(rest)
            assert same([in_order(held)], [in_order(old)])
        assert torch.allclose(memory.peek(question), answer, atol=2e-5)
        tiny.feed(memory, tiny.ids(90, seed=3))
        tiny.audit(core)
        for held in heads(memory):
            assert held["positions"][:6].tolist() == [0, 1, 2, 3, 6, 15]
        if kind == "window":
            assert not {7, 8, 14} & {at for held in heads(memory) for at in held["positions"].tolist()}


def test_a_promotion_and_its_inverse_at_once() -> None:
    """One replacement a store, in which some tokens come to the front, some leave it, and some stay."""
    with tiny.capped("window") as memory, tiny.capped("window") as twin:
        for each in (memory, twin):
            tiny.feed(each, tiny.ids(40))
        core = memory.memory
        row = core.sequences[0]
        pin(core, row, 10, 16)
        pin(core, row, 25, 27)
        promote(core, row)
        unpin(row, 11, 14)
        unpin(row, 26, 27)
        pin(core, row, 7, 9)
        pin(core, row, 20, 22)
        promote(core, row)
        front = [7, 8, 10, 14, 15, 20, 21, 25]
        order = [*range(4), *front, *(at for at in range(4, 40) if at not in front)]
        wanted = [{name: tensor[order] for name, tensor in held.items()} for held in heads(twin)]
        assert same(heads(memory), wanted)


def test_an_interrupt_between_two_layers_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some stores have moved it back and some have not: the memory answers the same, is copied whole, and goes on."""
    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(40))
        core = memory.memory
        row, question = core.sequences[0], tiny.ids(3, seed=2)[0].tolist()
        pin(core, row, 10, 13)
        promote(core, row)
        unpin(row, 10, 13)
        before, real, calls = memory.peek(question), LayerStore.reordered, list[int]()

        def interrupted(self: LayerStore, *given: Any) -> LayerStore:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(self, *given)

        monkeypatch.setattr(LayerStore, "reordered", interrupted)
        with pytest.raises(KeyboardInterrupt):
            memory.compact()
        assert [store.promoted for store in stores(memory)] == [(), ((10, 13),)]
        assert not row.arranged
        assert torch.allclose(memory.peek(question), before, atol=2e-5)
        tiny.feed(memory, tiny.ids(4, seed=4))
        other = copy(core)
        assert row.arranged
        assert all(store is not None and store.promoted == () for store in (*row.stores, *other.sequences[0].stores))
        other.close()
        tiny.feed(memory, tiny.ids(40, seed=5))
        tiny.audit(core)


def test_what_is_still_whole_can_be_pinned_again() -> None:
    """Unpinned and still at the front, it is pinned without moving; once it was compacted with the rest, it is not."""
    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(20))
        core = memory.memory
        row = core.sequences[0]
        pin(core, row, 6, 9)
        tiny.feed(memory, tiny.ids(40, seed=1))
        assert row.intact > 9
        before = row.stores
        unpin(row, 6, 9)
        with pytest.raises(SettingsRefused, match="have been compacted"):
            pin(core, row, 5, 9)
        pin(core, row, 6, 9)
        promote(core, row)
        assert row.stores == before
        unpin(row, 7, 9)
        tiny.feed(memory, tiny.ids(40, seed=2))
        with pytest.raises(SettingsRefused, match="have been compacted"):
            pin(core, row, 6, 9)
        assert row.pins.spans == ((6, 7),)


def test_unpinning_is_refused_for_tokens_that_are_not_there() -> None:
    """As pinning is; tokens that are not pinned stay as they are."""
    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(20))
        core = memory.memory
        row = core.sequences[0]
        pin(core, row, 6, 9)
        for start, stop in ((19, 21), (-1, 3), (5, 5)):
            with pytest.raises(SettingsRefused, match=rf"^unpin: tokens {start}..{stop} are not among the 20"):
                unpin(row, start, stop)
        unpin(row, 0, 6)
        unpin(row, 19, 21, coming=1)
        assert row.pins.spans == ((6, 9),)


def test_a_span_near_what_was_unpinned_is_compacted_apart() -> None:
    """A compaction of a span takes what was unpinned in it, and nothing before it."""
    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(40))
        core = memory.memory
        row = core.sequences[0]
        pin(core, row, 10, 13)
        pin(core, row, 20, 22)
        promote(core, row)
        unpin(row, 10, 13)
        unpin(row, 20, 22)
        report = memory.engine.compact(row, Request(slots=1, start=12))
        assert report is not None
        for held in heads(memory):
            assert held["positions"].tolist() == [*range(12), 31, *range(32, 40)]


def test_unpinned_slots_that_were_rebased_go_back_in_order() -> None:
    """Heads close gaps each for itself, so the same token stands at other positions; each head is in order again."""
    model = tiny_model("llama", num_hidden_layers=2, max_position_embeddings=96)
    with tiny.capped("replay", model, rebase=True) as memory:
        tiny.feed(memory, tiny.ids(30), model=model)
        core = memory.memory
        row = core.sequences[0]
        pin(core, row, 10, 12)
        pin(core, row, 20, 22)
        for seed in range(4):
            tiny.feed(memory, tiny.ids(40, seed=seed), model=model)
        assert row.moves
        unpin(row, 10, 12)
        unpin(row, 21, 22)
        moves = row.moves
        rebase(core, memory.engine.forwards, row, 40)
        before = heads(memory)
        promote(core, row)
        assert row.moves >= moves
        for held, old in zip(heads(memory), before, strict=True):
            front, rest = held["positions"][:5].tolist(), held["positions"][5:].tolist()
            assert front[:4] == [0, 1, 2, 3]
            assert rest == sorted(set(rest))
            assert same([in_order(held)], [in_order(old)])
        tiny.feed(memory, tiny.ids(60, seed=9), model=model)
        tiny.audit(core)
