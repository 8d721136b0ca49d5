"""A message or text that fails before any of it was read changes nothing; what was read in part is gone on with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from agentmem.errors import MemoryCapExceeded, UnsupportedModel
from agentmem.sessions import Session
from support import tiny_chat as tc

READS: list[Callable[[Session], object]] = [
    lambda session: session.append("user", "x" * 30, pin=True),
    lambda session: session.read(tc.ids(40), pin=True),
]
READING = pytest.mark.parametrize("read", READS, ids=["append", "read"])


def state(session: Session) -> tuple[Any, ...]:
    """All that reading changes."""
    reply = session.reply
    said = None if reply is None else (list(reply.ids), reply.text, reply.end)
    pins = session.memory.sequences[0].pins
    return list(session.ids), list(session.pending), session.dialogue, list(session.entries), said, pins


@READING
def test_a_model_in_training_is_refused_before_any_work(read: Callable[[Session], object]) -> None:
    """Though the memory is full: nothing is compacted, and what is read again is read once."""
    model = copy.deepcopy(tc.model("llama", 2))
    with tc.runtime(2, on=model, slots=128) as runtime:
        session, twin = (runtime.session() for _ in range(2))
        for each in (session, twin):
            each.append("user", "y" * 80)
            each.generate(max_new_tokens=14, do_sample=False, keep_open=True)
        before = state(session)
        model.train()
        for _ in range(2):
            with pytest.raises(UnsupportedModel, match="training mode"):
                read(session)
            assert state(session) == before
        with pytest.raises(UnsupportedModel, match="training mode"):
            session.generate(max_new_tokens=1)
        with pytest.raises(UnsupportedModel, match="training mode"):
            session.compact()
        assert (state(session), session.stats.compactions) == (before, 0)
        model.eval()
        for each in (session, twin):
            read(each)
        assert state(session)[:2] == state(twin)[:2]
        assert tc.on(session, 4) == tc.on(twin, 4)


@READING
@pytest.mark.parametrize(("policy", "mode"), [("full", "auto"), ("am-halving", "manual"), ("am-halving", "off")])
def test_what_does_not_fit_a_memory_that_does_not_compact_is_refused_whole(
    policy: str, mode: str, read: Callable[[Session], object]
) -> None:
    """Not read in part: what is shorter can be read afterwards, and all places up to the last."""
    with tc.runtime(1, policy, mode=mode, slots=128) as runtime:
        session = runtime.session()
        session.append("user", "y" * 100)
        before = state(session)
        with pytest.raises(MemoryCapExceeded, match="cannot take"):
            read(session)
        assert state(session) == before
        room = session.memory.sequences[0].room
        session.read(tc.ids(room + 1 - len(session.pending)))
        assert (session.memory.sequences[0].room, len(session.pending)) == (0, 1)
        with pytest.raises(MemoryCapExceeded, match="cannot take"):
            session.read(tc.ids(1))


@READING
def test_a_fault_in_the_first_forward_takes_the_message_back(read: Callable[[Session], object]) -> None:
    """The reply is open again; a fault behind a part that was read leaves the rest to the next turn."""
    model, left = copy.deepcopy(tc.model("llama", 2)), [1]
    with tc.runtime(2, on=model, slots=128) as runtime:
        session, twin = (runtime.session() for _ in range(2))
        for each in (session, twin):
            each.append("user", "hello")
            each.generate(max_new_tokens=3, do_sample=False, keep_open=True)

        def hook(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise MemoryError("layer")

        before = state(session)
        handle = model.model.layers[1].register_forward_pre_hook(hook)
        with pytest.raises(MemoryError):
            read(session)
        assert state(session) == before
        tc.audit(runtime)
        left[0] = 2
        with pytest.raises(MemoryError):
            read(session)
        handle.remove()
        assert len(session.ids) > len(before[0])
        assert len(session.pending) > 1
        read(twin)
        assert list(session.ids) == list(twin.ids)
        assert tc.on(session, 4) == tc.on(twin, 4)
        tc.audit(runtime)
