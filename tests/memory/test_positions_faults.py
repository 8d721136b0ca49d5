"""Re-basing that is interrupted, refused, or comes between other work of the memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from agentmem import api
from agentmem.contracts import Part
from agentmem.errors import UnsupportedModel
from agentmem.hf import CappedCache
from agentmem.memory.ledger import Ledger
from agentmem.memory.positions import rebase
from agentmem.memory.rotation import shift_keys
from agentmem.planning.model_shape import LayerShape
from agentmem.reference_queries.stored import QuerySample
from agentmem.testing import tiny_model
from support import tiny, variants
from support.few_positions import LIMIT, check_order, model, near_the_end, state, stores, watched

# ---- interrupts


def counted(patch: pytest.MonkeyPatch, call: int) -> Callable[[], int]:
    """Let the ``call``-th turn of keys or queries end with KeyboardInterrupt; tells how many there were."""
    calls = [0]

    def interrupted(*given: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        shift_keys(*given)

    for module in ("slot_spec", "positions"):  # slots and stored queries
        patch.setattr(f"agentmem.memory.{module}.shift_keys", interrupted)
    return lambda: calls[0]


def more(memory: CappedCache) -> list[float]:
    """A forward that must be preceded by a re-basing; its logits."""
    logits: list[float] = tiny.feed(memory, tiny.ids(3, seed=7), model=model()).tolist()
    return logits


@functools.cache
def undisturbed(kind: str) -> tuple[list[Any], list[float]]:
    """The memory after a forward that re-bases, and the forward's logits."""
    with tiny.capped(kind, model(), rebase=True) as memory:
        near_the_end(memory, model(), 110)
        logits = more(memory)
        assert memory.memory.sequences[0].moves == 1
        return state(memory), logits


@pytest.mark.parametrize("call", [1, 2, 5, 8, 9, 13])
def test_an_interrupted_re_basing_goes_on(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a head, between layers, before and among the stored queries: the next forward gives the undisturbed bits."""
    with tiny.capped("live", model(), rebase=True) as memory:
        near_the_end(memory, model(), 110)
        with monkeypatch.context() as patch:
            calls = counted(patch, call)
            with pytest.raises(KeyboardInterrupt):
                more(memory)
            assert calls() == call
        row = memory.memory.sequences[0]
        tiny.audit(memory.memory)
        assert row.moving is not None
        assert (row.next_position, row.shift, row.moves, row.seen) == (110, 0, 0, 110)
        logits = more(memory)
        (report,) = memory.report().rebases
        assert (state(memory), logits) == undisturbed("live")
    assert report.kl is None, "what it was before nobody can tell any more"


@pytest.mark.parametrize("name", ["positions._divergence", "memory.Memory.record"])
def test_a_re_basing_has_its_report_whatever_comes_after_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while what it changed is measured, or before the report is listed, loses no report."""
    with tiny.capped("live", model(), rebase=True) as memory:
        near_the_end(memory, model(), 110)
        with monkeypatch.context() as patch:
            patch.setattr(f"agentmem.memory.{name}", stop)
            with pytest.raises(KeyboardInterrupt):
                more(memory)
        for _ in range(2):
            (report,) = memory.report().rebases
            assert (report.position_before, report.position_after) == (110, memory.memory.sequences[0].next_position)
            assert memory.memory.sequences[0].moves == 1
            memory.memory.take_back()


def stop(*_: object) -> None:
    """Interrupt what calls it."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", [2, 5])
def test_a_compaction_finishes_an_interrupted_re_basing_first(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand too: its probe runs at the new positions, and the memory is that of one that was not interrupted."""
    found = []
    for broken in (True, False):
        with watched(model()) as seen, tiny.capped("replay", model(), rebase=True) as memory:
            near_the_end(memory, model(), 110)
            if broken:
                with monkeypatch.context() as patch:
                    counted(patch, call)
                    with pytest.raises(KeyboardInterrupt):
                        rebase(memory.memory, memory.engine.forwards, memory.memory.sequences[0])
            else:
                rebase(memory.memory, memory.engine.forwards, memory.memory.sequences[0])
            seen.clear()
            (report,) = memory.compact(slots=4)
            assert not report.faults
            assert max(seen) < 64 + 16
            found.append((state(memory), more(memory)))
    assert found[0] == found[1]


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupted_forward_is_taken_back_before_a_re_basing(layer: int) -> None:
    """What it had appended in some layers is no part of what moves."""
    with tiny.capped("live", model(), rebase=True) as memory:
        near_the_end(memory, model(), 110)

        def interrupt(*_: object) -> None:
            handle.remove()
            raise KeyboardInterrupt

        handle = model().model.layers[layer].self_attn.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny.feed(memory, tiny.ids(1), model=model())
        logits = more(memory)
        check_order(memory)
        wanted, undisturbed_logits = undisturbed("live")
        assert [store.seen for store in stores(memory)] == [113, 113]
        assert torch.allclose(torch.tensor(logits), torch.tensor(undisturbed_logits), atol=1e-4)
        assert state(memory)[:7] == wanted[:7]


def test_a_compaction_that_was_interrupted_is_re_based_and_goes_on() -> None:
    """Half the layers compacted, then a re-basing, then the rest: order, counts and bytes are right."""
    policy = tiny.KINDS["replay"]
    assert policy.compactor is not None
    faulty = replace(policy, compactor=tiny.Faulty(policy.compactor, 1, [KeyboardInterrupt()]))
    with tiny.capped_by(faulty, model(), rebase=True) as memory:
        tiny.feed(memory, tiny.ids(48), model=model())
        with pytest.raises(KeyboardInterrupt):
            memory.compact()
        row = memory.memory.sequences[0]
        rebase(memory.memory, memory.engine.forwards, row)
        check_order(memory)
        tiny.feed(memory, tiny.ids(200), model=model())
        check_order(memory)
        assert memory.compactions[0].faults == ()


# ---- refusals


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_follows_the_largest_position_is_refused(kind: str) -> None:
    """By name and with the remedy, before any work and leaving the model alone; without the option it runs."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.5] * 8, "original_max_position_embeddings": 64}
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, **(factors if kind == "longrope" else {})}
    of = tiny_model("llama", max_position_embeddings=LIMIT, rope_parameters=rope)
    name, hooks = of.config._attn_implementation, len(of._forward_pre_hooks)
    with variants.refused(of, UnsupportedModel, repr(kind), "default, linear, llama3, yarn"):
        api.wrap(of, cap=1 << 24, policy="window", rebase=True, **tiny.SETTINGS)
    assert (of.config._attn_implementation, len(of._forward_pre_hooks), "generate" in vars(of)) == (name, hooks, False)
    with api.capped(of, cap=1 << 24, policy="window", **tiny.SETTINGS) as memory:
        tiny.feed(memory, tiny.ids(60), model=of)
        assert len(memory.compactions) == 1


# ---- what is run behind a row


def test_another_policy_s_probe_stays_in_reach() -> None:
    """A policy beside the memory's own may run a longer probe: room is left for the longest."""
    with (
        watched(model()) as seen,
        tiny.capped_by(tiny.KINDS["window"], model(), extra_policies=("am-halving",), rebase=True, chunk=32) as memory,
    ):
        for seed in range(60):
            tiny.feed(memory, tiny.ids(3, seed=seed), model=model())
            memory.compact(policy="am-halving", slots=6)
        assert memory.memory.sequences[0].moves >= 2
    assert max(seen) < LIMIT


def test_a_peek_stays_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last positions it re-bases first, like a forward; and it finishes a re-basing that was interrupted."""
    question = tiny.ids(16, seed=5)[0].tolist()
    with watched(model()) as seen, tiny.capped("window", model(), rebase=True) as memory:
        for seed in range(14):
            tiny.feed(memory, tiny.ids(8, seed=seed), model=model())
        assert memory.memory.sequences[0].next_position == 112
        with monkeypatch.context() as patch:
            counted(patch, 5)
            with pytest.raises(KeyboardInterrupt):
                memory.peek(question)
        answer = memory.peek(question)
        assert memory.memory.sequences[0].moves == 1
        assert torch.equal(memory.peek(question), answer)
    assert max(seen) < LIMIT


def test_samples_know_whose_queries_they_keep() -> None:
    """The ring of the newest and the stride of all, however tokens are cut into forwards: each row tells its token."""
    layer = LayerShape(1, 1, 2, 2, None)
    for source in ("live", "context", "random"):
        for size in (1, 5, 8):
            for step in (1, 3, 7, 11):
                sample = QuerySample(Part(source), layer, size, torch.zeros(1), Ledger(1 << 20))
                for first in range(0, 60, step):
                    offered = torch.arange(first, first + step).float()[None, :, None].expand(1, step, 2)
                    sample.offer(offered, first)
                    kept = sample.tokens(first + step)
                    assert kept.dtype == torch.int32
                    assert kept.tolist() == sample.queries[0, : sample.filled, 0].tolist()
