"""One forward for several memories: each gets the logits that it would get alone, and a fault is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import torch

from agentmem.engine import Want, feed
from agentmem.errors import CompactionFailed, UnsupportedModel
from agentmem.hf import CappedCache
from support import tiny, variants

LENGTHS = (21, 5, 13)


@contextmanager
def memories(kind: str, model: Any, count: int = 3, **settings: Any) -> Iterator[list[CappedCache]]:
    """Several memories of one model that have read nothing."""
    with ExitStack() as stack:
        views = [stack.enter_context(tiny.capped(kind, model, **settings)) for _ in range(count)]
        for view in views:
            view.memory.bind(1)
        yield views


def texts(count: int) -> list[list[int]]:
    """Ids for each memory."""
    return [tiny.ids(count, seed)[0].tolist() for seed in range(len(LENGTHS))]


def together(views: list[CappedCache], ids: list[list[int]]) -> list[torch.Tensor]:
    """Feed all at once and commit; the logits of each."""
    wants = [Want(view.engine, each) for view, each in zip(views, ids, strict=True) if each]
    feed([(want, len(want.ids)) for want in wants])
    found = [want.result()[1] for want in wants]
    for want in wants:
        want.engine.commit()
    return found


def raising(error: BaseException, after: int) -> Callable[..., None]:
    """A function that raises an error at every call but the first ones."""
    calls = iter(range(after))

    def call(*_: object) -> None:
        if next(calls, None) is None:
            raise error

    return call


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_packed_sequences_have_the_logits_of_each_alone(variant: str) -> None:
    """Pieces of texts and single tokens in one line, below the cap, against stock transformers without a cache."""
    model, whole = variants.model(variant), texts(40)
    with memories("window", model) as views:
        starts = [0, 0, 0]
        for cut in (LENGTHS, (1, 1, 7), (1, 1, 1), (3, 1, 2), (1, 1, 1)):
            stops = [start + count for start, count in zip(starts, cut, strict=True)]
            spans = list(zip(whole, starts, stops, strict=True))
            found = together(views, [ids[start:stop] for ids, start, stop in spans])
            for logits, (ids, _, stop) in zip(found, spans, strict=True):
                stock = model(torch.tensor([ids[:stop]]), use_cache=False).logits[0, -1]
                torch.testing.assert_close(logits, stock, atol=2e-5, rtol=1e-4)
            starts = stops


@pytest.mark.parametrize("kind", ["window", "heavy-hitters", "replay", "live"])
def test_memories_that_compact_are_as_they_are_alone(kind: str) -> None:
    """Far beyond the cap, with compactions at different times: slots and logits are those of memories fed alone."""
    model, whole = tiny.llama(), texts(90)
    with memories(kind, model) as views, memories(kind, model) as alone:
        for step in range(0, 90, 9):
            packed = together(views, [ids[step : step + 9] for ids in whole])
            for view, ids, logits in zip(alone, whole, packed, strict=True):
                (single,) = together([view], [ids[step : step + 9]])
                torch.testing.assert_close(logits, single, atol=1e-4, rtol=1e-3)
        for one, other in zip(views, alone, strict=True):
            assert len(one.compactions) == len(other.compactions) > 0
            assert one.transcript() == other.transcript()
            held = [view.memory.sequences[0].stores for view in (one, other)]
            assert [store.lengths for store in held[0] if store] == [store.lengths for store in held[1] if store]
            tiny.audit(one.memory)


def test_a_memory_that_cannot_begin_fails_alone() -> None:
    """One memory is too full for its tokens, and its policy never compacts: the others are fed."""
    model, whole = tiny.llama(), texts(60)
    with memories("window", model, mode="manual") as views:
        together(views[:1], [whole[0][:40]])
        wants = [Want(view.engine, ids[:12]) for view, ids in zip(views, whole, strict=True)]
        feed([(want, 12) for want in wants])
        with pytest.raises(Exception, match="cannot take 12 more"):
            wants[0].result()
        assert [want.result()[0] for want in wants[1:]] == [12, 12]


def test_a_fault_in_one_memory_s_attention_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is run again for each alone; nothing of it is left where it failed."""
    model, whole = tiny.llama(), texts(30)
    with memories("window", model) as views:
        together(views, [ids[:10] for ids in whole])
        broken = views[1].memory
        touch = broken.ledger.touch

        def fault(count: int, what: str) -> None:
            if what == "attention":
                raise CompactionFailed("the fault of this test")
            touch(count, what)

        monkeypatch.setattr(broken.ledger, "touch", fault)
        wants = [Want(view.engine, ids[10:13]) for view, ids in zip(views, whole, strict=True)]
        feed([(want, 3) for want in wants])
        with pytest.raises(CompactionFailed, match="of this test"):
            wants[1].result()
        for at in (0, 2):
            stock = model(torch.tensor([whole[at][:13]]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(wants[at].result()[1], stock, atol=2e-5, rtol=1e-4)
            views[at].engine.commit()
        monkeypatch.undo()
        (logits,) = together([views[1]], [whole[1][10:13]])
        stock = model(torch.tensor([whole[1][:13]]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits, stock, atol=2e-5, rtol=1e-4)
        for view in views:
            tiny.audit(view.memory)


@pytest.mark.parametrize("error", [CompactionFailed("of this test"), KeyboardInterrupt()], ids=["fault", "interrupt"])
def test_attention_of_a_forward_that_failed_counts_once(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that fails in another memory and is run again leaves scores as if nothing had failed."""
    model, whole = tiny.llama(), texts(30)
    found = []
    for fails in (False, True):
        with memories("heavy-hitters", model) as views:
            together(views, [ids[:10] for ids in whole])
            with monkeypatch.context() as patch:
                if fails:
                    patch.setattr(views[1].memory.ledger, "touch", raising(error, after=1))
                wants = [Want(view.engine, ids[10:13]) for view, ids in zip(views, whole, strict=True)]
                with suppress(KeyboardInterrupt):
                    feed([(want, 3) for want in wants])
            lost = [want for want in wants if want.outcome is None or want.outcome.error is not None]
            feed([(Want(want.engine, want.ids), 3) for want in lost])
            for view in views:
                view.engine.commit()
                tiny.audit(view.memory)
            found.append([store.scores for view in views for store in view.memory.sequences[0].stores if store])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_an_interrupt_in_the_forward_leaves_every_memory_as_it_was() -> None:
    """Nothing is consumed, nobody owns a memory, and the same tokens can be fed again."""
    model, whole = tiny.llama(), texts(30)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with memories("window", model) as views:
        together(views, [ids[:10] for ids in whole])
        wants = [Want(view.engine, ids[10:13]) for view, ids in zip(views, whole, strict=True)]
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            feed([(want, 3) for want in wants])
        handle.remove()
        assert not any(want.done for want in wants)
        assert [len(view.transcript()) for view in views] == [10, 10, 10]
        for logits, ids in zip(together(views, [ids[10:13] for ids in whole]), whole, strict=True):
            stock = model(torch.tensor([ids[:13]]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits, stock, atol=2e-5, rtol=1e-4)


def test_what_was_fed_and_not_committed_can_be_fed_again() -> None:
    """The turn that wanted it commits; whoever loses the logits loses nothing else."""
    model, whole = tiny.llama(), texts(30)
    with memories("window", model, 1) as (view,):
        for _ in range(2):
            want = Want(view.engine, whole[0][:8])
            feed([(want, 8)])
        assert view.transcript() == []
        view.engine.commit()
        assert view.transcript() == whole[0][:8]


def test_attention_that_was_changed_under_it_is_refused() -> None:
    """Layers that do not ask the memory end the turn with the reason."""
    model, whole = tiny.llama(), texts(30)
    with memories("window", model, 1) as (view,):
        model.config._attn_implementation, ours = "sdpa", model.config._attn_implementation
        try:
            want = Want(view.engine, whole[0][:8])
            feed([(want, 8)])
        finally:
            model.config._attn_implementation = ours
        with pytest.raises(UnsupportedModel, match="0 of 2 layers called the memory"):
            want.result()
        assert view.transcript() == []
