"""Sessions that are fed together are as they would be alone, and what befalls one concerns no other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from agentmem.engine import scheduler
from agentmem.errors import SettingsRefused
from agentmem.hf.forwards import ModelForwards
from agentmem.sessions import Session
from agentmem.testing import tiny_model
from support import tiny_chat
from support.waiting import LIMIT

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was fed together stays together, however busy the machine is."""
    monkeypatch.setattr(scheduler, "LINGER", LIMIT / 4)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sequences and tokens of each forward that feeds sessions."""
    found: list[tuple[int, int]] = []
    packed = ModelForwards.packed

    def watched(self: ModelForwards, ids: Any, positions: Any, ends: Any, step: Any) -> torch.Tensor:
        found.append((len(ends), len(ids)))
        return packed(self, ids, positions, ends, step)

    monkeypatch.setattr(ModelForwards, "packed", watched)
    return found


def alone(made: Any, policy: str, count: int) -> list[tuple[list[int], list[dict[str, torch.Tensor]]]]:
    """Ids and slots of as many sessions as :func:`filled` makes, one after the other."""
    sessions = filled(made, policy, count)
    for each in sessions:
        each.generate(**GREEDY)
    return [(list(each.ids), tiny_chat.slots(each)) for each in sessions]


def filled(made: Any, policy: str, count: int) -> list[Session]:
    """Sessions that have read texts of unequal lengths."""
    return [tiny_chat.filled(made, 20 + 12 * number, seed=number, policy=policy) for number in range(count)]


def close(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    """Whether slots are equal but for rounding."""
    pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a]
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in pairs)


@pytest.mark.parametrize("policy", ["am-halving", "heavy-hitters", "window", "am-halving[probe=live,probe_tokens=24]"])
async def test_tasks_that_reply_at_once_share_forwards(policy: str, forwards: list[tuple[int, int]]) -> None:
    """Ids and slots, compactions included, are those of the same sessions alone, in far fewer forwards."""
    with tiny_chat.runtime(9, share=max(map(tiny_chat.lease, ("am-halving", policy)))) as made:
        expected = alone(made, policy, 4)
        sessions = filled(made, policy, 4)
        forwards.clear()
        await asyncio.gather(*(tiny_chat.events(each, **GREEDY) for each in sessions))
        assert sum(sequences for sequences, _ in forwards) == 4 * 24
        assert len(forwards) < 2 * 24
        for session, (ids, slots) in zip(sessions, expected, strict=True):
            assert list(session.ids) == ids
            assert close(tiny_chat.slots(session), slots)
        assert made.stats.sequences_per_forward > 1
        if policy != "window":  # whose slots suffice
            assert sum(each.stats.compactions for each in sessions) > 0
            assert made.stats.pause_max_seconds >= made.stats.pause_p50_seconds > 0
        tiny_chat.audit(made)


def test_threads_that_reply_at_once_write_what_each_would_alone(forwards: list[tuple[int, int]]) -> None:
    """Whichever thread feeds whom; all of them end."""
    with tiny_chat.runtime(9) as made:
        expected = alone(made, "am-halving", 4)
        sessions = filled(made, "am-halving", 4)
        forwards.clear()
        threads = [threading.Thread(target=each.generate, kwargs=GREEDY) for each in sessions]
        with made.scheduler.lock:  # until all have come
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join()
        assert [list(each.ids) for each in sessions] == [ids for ids, _ in expected]
        assert sum(sequences for sequences, _ in forwards) == 4 * 24
        tiny_chat.audit(made)


async def test_tasks_and_threads_share_a_model() -> None:
    """Synchronous turns beside asynchronous ones, in one runtime and in another of the same model."""
    with tiny_chat.runtime(9) as made, tiny_chat.runtime(2) as beside:
        expected = alone(made, "window", 4)
        sessions = filled(made, "window", 3)
        other = tiny_chat.filled(beside, 20 + 12 * 3, seed=3, policy="window")
        await asyncio.gather(
            tiny_chat.events(sessions[0], **GREEDY),
            asyncio.to_thread(sessions[1].generate, **GREEDY),
            tiny_chat.events(sessions[2], **GREEDY),
            asyncio.to_thread(other.generate, **GREEDY),
        )
        assert [list(each.ids) for each in (*sessions, other)] == [ids for ids, _ in expected]


class Broken:
    """A logits processor that fails, or gives no numbers, after some tokens."""

    def __init__(self, fault: Callable[[torch.Tensor], torch.Tensor], after: int = 5) -> None:
        self.fault, self.left = fault, after

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As transformers calls it."""
        self.left -= 1
        return scores if self.left > 0 else self.fault(scores)


def _raise(scores: torch.Tensor) -> torch.Tensor:
    raise ArithmeticError("the fault of this test")


FAULTS: dict[str, dict[str, Any]] = {
    "a failing processor": {"logits_processor": LogitsProcessorList([Broken(_raise)]), "do_sample": False},
    "scores that are no numbers": {
        "logits_processor": LogitsProcessorList([Broken(lambda scores: scores * float("nan"))]),
        "do_sample": True,
    },
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_ends_its_own_turn_alone(fault: str) -> None:
    """The others write what they would alone, and the one that failed can go on."""
    with tiny_chat.runtime(9) as made:
        expected = alone(made, "am-halving", 3)
        sessions, victim = filled(made, "am-halving", 3), tiny_chat.filled(made, 30, seed=9)
        replies = [tiny_chat.events(each, **GREEDY) for each in sessions]
        failed = tiny_chat.events(victim, max_new_tokens=24, **FAULTS[fault])
        *_, error = await asyncio.gather(*replies, failed, return_exceptions=True)
        assert isinstance(error, ArithmeticError | RuntimeError)
        assert [list(each.ids) for each in sessions] == [ids for ids, _ in expected]
        assert await tiny_chat.events(victim, **GREEDY)
        tiny_chat.audit(made)


async def test_a_hook_that_fails_ends_its_own_turn_alone() -> None:
    """A compaction is part of one turn."""
    with tiny_chat.runtime(9) as made:
        expected = alone(made, "am-halving", 3)
        sessions = filled(made, "am-halving", 3)
        victim = tiny_chat.filled(made, 40, before_compact=lambda _: "whatever")
        replies = [tiny_chat.events(each, **GREEDY) for each in sessions]
        *_, error = await asyncio.gather(*replies, tiny_chat.events(victim, **GREEDY), return_exceptions=True)
        assert isinstance(error, SettingsRefused)
        assert [list(each.ids) for each in sessions] == [ids for ids, _ in expected]


async def test_who_leaves_in_the_middle_disturbs_nobody() -> None:
    """Cancelled among others that go on, a session has read what it had read, and goes on as well."""
    with tiny_chat.runtime(9) as made:
        expected = alone(made, "am-halving", 4)
        sessions = filled(made, "am-halving", 4)
        tasks = [asyncio.create_task(tiny_chat.events(each, **GREEDY, keep_open=True)) for each in sessions]
        while sessions[0].stats.tokens < 30:  # noqa: ASYNC110  # a session knows no loop
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert [list(each.ids) for each in sessions[1:]] == [ids for ids, _ in expected[1:]]
        left = 24 - (len(sessions[0].ids) - sessions[0].reply_start)
        if left > 0:
            await tiny_chat.events(sessions[0], **{**GREEDY, "max_new_tokens": left})
        assert list(sessions[0].ids) == expected[0][0]
        tiny_chat.audit(made)


async def test_a_long_text_takes_what_replies_leave_of_a_forward(forwards: list[tuple[int, int]]) -> None:
    """No forward of several sessions has more tokens than max_batch_tokens, and replies go on while a text is read."""
    with tiny_chat.runtime(9, "full", slots=900, max_batch_tokens=12, chunk=16) as made:
        writers, reader = [tiny_chat.filled(made, 20, seed=at) for at in range(3)], made.session()
        forwards.clear()
        await asyncio.gather(reader.aappend("user", "x" * 600), *(tiny_chat.events(each, **GREEDY) for each in writers))
        shared = [(sequences, tokens) for sequences, tokens in forwards if sequences > 1]
        assert max(tokens for _, tokens in shared) == 12
        assert sum(sequences == 4 for sequences, _ in shared) > 12
        tiny_chat.audit(made)


async def test_models_whose_positions_follow_the_largest_are_fed_one_by_one(forwards: list[tuple[int, int]]) -> None:
    """Their frequencies would change with another session's positions."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope)
    with tiny_chat.runtime(4, "full", on=model) as made:
        assert not made.packs
        sessions = [tiny_chat.filled(made, 10, seed=at) for at in range(2)]
        await asyncio.gather(*(tiny_chat.events(each, max_new_tokens=5, do_sample=False) for each in sessions))
        assert {sequences for sequences, _ in forwards} == {1}
