"""Compactions that are asked for: pinned tokens, spans that are compacted apart, other policies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentmem import plugins
from agentmem.compaction.request import Request
from agentmem.errors import CapTooSmall, SettingsRefused
from agentmem.hf import CappedCache
from agentmem.memory.pinning import pin, promote
from agentmem.memory.pins import Pins, joined, size, within, without
from agentmem.memory.store import LayerStore
from support import tiny

TOLERANCE = 2e-5


def stores(memory: CappedCache) -> list[LayerStore]:
    """The stores of the only row."""
    return [store for store in memory.memory.sequences[0].stores if store is not None]


def slot(store: LayerStore, head: int, position: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Key and value of the slot that a head has at a position."""
    segment = store.segment(head, 0, 0)
    at = (segment.positions == position).nonzero()
    return None if not len(at) else (segment.keys[at[0, 0]].clone(), segment.values[at[0, 0]].clone())


@pytest.mark.parametrize("kind", ["window", "heavy-hitters", "replay", "replay+spread"])
def test_pinned_tokens_keep_their_slots_bit_for_bit(kind: str) -> None:
    """Through four compactions every head of every layer has the keys, values and positions of all pinned tokens."""
    with tiny.capped(kind) as memory:
        tiny.feed(memory, tiny.ids(20))
        row = memory.memory.sequences[0]
        pin(memory.memory, row, 6, 9)
        pin(memory.memory, row, 14, 16)
        pinned = [6, 7, 8, 14, 15]
        promote(memory.memory, row)  # settles positions, so that slots can be found
        for store in stores(memory):
            store.settle(torch.frombuffer(row.tail, dtype=torch.int32))
        before = [slot(store, head, at) for store in stores(memory) for head in range(2) for at in pinned]
        tiny.feed(memory, tiny.ids(120, seed=1))
        assert len(memory.compactions) >= 4
        after = [slot(store, head, at) for store in stores(memory) for head in range(2) for at in pinned]
        for old, new in zip(before, after, strict=True):
            assert old is not None
            assert new is not None
            assert torch.equal(old[0], new[0])
            assert torch.equal(old[1], new[1])
        tiny.audit(memory.memory)


@pytest.mark.parametrize("kind", ["heavy-hitters", "replay"])
def test_promotion_changes_no_logit(kind: str) -> None:
    """Moving pinned slots to the front leaves what the memory answers as it was; bytes and counts too."""
    with tiny.capped(kind) as memory:
        tiny.feed(memory, tiny.ids(40))
        row, question = memory.memory.sequences[0], tiny.ids(3, seed=2)[0].tolist()
        pin(memory.memory, row, 10, 13)
        pin(memory.memory, row, 20, 21)
        before, bytes_before = memory.peek(question), memory.memory.ledger.resident
        promote(memory.memory, row)

        assert [store.promoted for store in stores(memory)] == [((10, 13), (20, 21))] * 2
        assert row.front(4) == 8
        assert torch.allclose(memory.peek(question), before, atol=TOLERANCE)
        assert memory.memory.ledger.resident == bytes_before
        tiny.audit(memory.memory)


def test_what_is_pinned_after_a_promotion_keeps_its_slots() -> None:
    """A promotion without a compaction, then a pin before what it has promoted: all pins are kept, and only they."""
    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(40))
        row = memory.memory.sequences[0]
        pin(memory.memory, row, 20, 22)
        promote(memory.memory, row)
        pin(memory.memory, row, 10, 12)
        tiny.feed(memory, tiny.ids(60, seed=1))
        assert row.compactions >= 2
        for store in stores(memory):
            assert store.segment(0, 0, 0).positions[:8].tolist() == [0, 1, 2, 3, 10, 11, 20, 21]


def test_an_interrupted_promotion_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt between two layers leaves a memory that answers the same and is finished by the next compaction."""
    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(40))
        row, question = memory.memory.sequences[0], tiny.ids(3, seed=2)[0].tolist()
        pin(memory.memory, row, 10, 13)
        before, real, calls = memory.peek(question), LayerStore.reordered, list[int]()

        def interrupted(self: LayerStore, *given: Any) -> LayerStore:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(self, *given)

        monkeypatch.setattr(LayerStore, "reordered", interrupted)
        with pytest.raises(KeyboardInterrupt):
            memory.compact()
        assert [store.promoted for store in stores(memory)] == [((10, 13),), ()]
        assert torch.allclose(memory.peek(question), before, atol=TOLERANCE)
        tiny.feed(memory, tiny.ids(4, seed=4))
        memory.compact()
        assert [store.promoted for store in stores(memory)] == [((10, 13),)] * 2
        for store in stores(memory):
            assert store.segment(0, 0, 0).positions[:7].tolist() == [0, 1, 2, 3, 10, 11, 12]


def test_an_interrupt_whose_traceback_is_kept_does_not_stop_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are written from a copy of the sequence's array.

    A traceback may keep the tensor while the array grows: older torch then lets it not grow, newer torch reads bytes
    that were freed.
    """
    given: list[torch.Tensor] = []

    def interrupted(_: LayerStore, tail: torch.Tensor) -> None:
        given.append(tail)
        raise KeyboardInterrupt

    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(30))
        sequence = memory.memory.sequences[0]
        with monkeypatch.context() as patch:
            patch.setattr(LayerStore, "settle", interrupted)
            with pytest.raises(KeyboardInterrupt):
                memory.compact(slots=8)
        assert given[0].data_ptr() != sequence.state.tail.buffer_info()[0]
        tiny.feed(memory, tiny.ids(2, seed=1), 1)
        assert sequence.tail[-1] == 31
        assert given[0].tolist() == list(range(30))


def test_a_pin_that_cannot_be_kept_is_refused() -> None:
    """Compacted tokens, tokens that are not there, and more than a compaction could leave: value, limit, remedy."""
    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(60))
        row = memory.memory.sequences[0]
        assert row.intact == 48 - 8
        with pytest.raises(SettingsRefused, match="before 40 have been compacted"):
            pin(memory.memory, row, 20, 50)
        with pytest.raises(SettingsRefused, match=r"50..61 are not among the 60"):
            pin(memory.memory, row, 50, 61)
        pin(memory.memory, row, 0, 4)
        assert row.pins.count(4, 60) == 0
        with pytest.raises(CapTooSmall, match=r"12 pinned tokens.*need 25 slots per head, and a compaction leaves 24"):
            pin(memory.memory, row, 45, 57)
        pin(memory.memory, row, 45, 56)
        assert row.pins.spans == ((0, 4), (45, 56))


SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6)


def tokens(spans: Iterable[tuple[int, int]]) -> set[int]:
    """What is in some of them."""
    return {at for low, high in spans for at in range(low, high)}


@given(SPANS, SPANS, st.integers(0, 30), st.integers(0, 30))
def test_spans_are_sets_of_tokens(
    one: list[tuple[int, int]], other: list[tuple[int, int]], start: int, stop: int
) -> None:
    """Unions, cuts and differences are those of sets, ascending and apart; what is pinned twice counts once."""
    left, right = joined(one), joined(other)
    for made, wanted in (
        (left, tokens(one)),
        (joined(left, right), tokens(one) | tokens(other)),
        (within(left, start, stop), tokens(one) & set(range(start, stop))),
        (without(left, right), tokens(one) - tokens(other)),
    ):
        assert tokens(made) == wanted
        assert size(made) == len(wanted)
        assert made == joined(made)
    assert Pins(left, right).count(start, stop) == len((tokens(one) | tokens(other)) & set(range(start, stop)))


# ---- spans


@pytest.mark.parametrize("kind", ["window", "heavy-hitters", "replay", "replay+spread"])
def test_a_span_is_compacted_apart(kind: str) -> None:
    """Only the span's slots go: everything before it and the recent window stay bit for bit."""
    with tiny.capped(kind) as memory:
        tiny.feed(memory, tiny.ids(60))
        row = memory.memory.sequences[0]
        for store in stores(memory):
            store.settle(torch.frombuffer(row.tail, dtype=torch.int32))
        start, before = 50, [store.segment(head, 0, 0) for store in stores(memory) for head in range(2)]
        kept = [(each.keys[:-10].clone(), each.keys[-8:].clone(), each.slots) for each in before]
        report = memory.engine.compact(row, Request(slots=1, start=start))

        assert report is not None
        assert report.slots_before - report.slots_after == 4  # two layers of two heads gave one of two slots
        after = [store.segment(head, 0, 0) for store in stores(memory) for head in range(2)]
        for (front, recent, slots), new in zip(kept, after, strict=True):
            assert new.slots == slots - 1
            assert torch.equal(new.keys[: len(front)], front)
            assert torch.equal(new.keys[-8:], recent)
        tiny.audit(memory.memory)
        tiny.feed(memory, tiny.ids(60, seed=3))
        tiny.audit(memory.memory)


def test_a_span_is_probed_with_its_own_text() -> None:
    """The probe of a span that is shorter than a probe may be runs the span's tokens and no other."""
    with tiny.capped("replay") as memory:
        tiny.feed(memory, tiny.ids(44))
        report = memory.engine.compact(memory.memory.sequences[0], Request(slots=4, start=38))
        whole = memory.engine.compact(memory.memory.sequences[0], Request(slots=4))
    assert whole is not None
    assert report is None or report.probe_tokens == 6
    assert whole.probe_tokens == memory.plan.probe_tokens


def test_a_focus_is_among_the_queries() -> None:
    """Its text is run in the probe, a quarter of the reference tokens at most."""
    with tiny.capped("replay") as memory:
        tiny.feed(memory, tiny.ids(44))
        report = memory.engine.compact(memory.memory.sequences[0], Request(focus=(5, 6, 7, 8)))
    assert report is not None
    assert report.queries == "focus+replay"


# ---- policies beside the memory's own


def test_another_policy_does_one_compaction() -> None:
    """A memory is planned for all of them; the report says which one ran; a stranger is refused."""
    other = plugins.policy("window")
    with tiny.capped_by(tiny.KINDS["replay"], extra_policies=(other,)) as memory:
        tiny.feed(memory, tiny.ids(44))
        (report,) = memory.compact(policy="window")
        assert (report.policy, report.queries) == ("window", "none")
        with pytest.raises(SettingsRefused, match="planned for 'am-halving', 'window'"):
            memory.compact(policy="keydiff")
    with (
        pytest.raises(SettingsRefused, match="needs scores that are received"),
        tiny.capped_by(tiny.KINDS["replay"], extra_policies=("heavy-hitters",)),
    ):
        pass
