"""Turns at once take forwards in turns; brief calls pass who waits; forks hear of nothing that was before."""

from __future__ import annotations

import asyncio
from statistics import median
from typing import Any

import pytest

from agentmem.errors import RuntimeBusy
from agentmem.hf.forwards import ModelForwards
from agentmem.sessions import TokenEvent
from support import tiny_chat
from support.waiting import until


async def test_a_long_prompt_lets_other_turns_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one session reads a prompt of many pieces, another writes a token after every piece of it or two."""
    fed: list[int] = []
    packed = ModelForwards.packed
    monkeypatch.setattr(
        ModelForwards, "packed", lambda self, ids, *more: (fed.append(len(ids)), packed(self, ids, *more))[1]
    )
    with tiny_chat.runtime(2, "full", slots=900) as made:
        writer, reader = tiny_chat.filled(made, 20), made.session()
        between: list[int] = []
        reading = asyncio.create_task(reader.aappend("user", "x" * 700))
        await until(lambda: any(count > 1 for count in fed))
        async for event in writer.astream(max_new_tokens=12, do_sample=False):
            if isinstance(event, TokenEvent):
                between.append(sum(count > 1 for count in fed))
                fed.clear()
        assert not reading.done()
        assert median(between) <= 2
        assert max(between) <= 5  # a busy machine may let the reader's task run twice in a row
        await reading


async def test_words_and_pins_need_no_place_in_the_queue() -> None:
    """While others wait, a turn is refused, but what needs no forward is done."""
    with tiny_chat.runtime(1, pressure=()) as made:
        session = tiny_chat.filled(made, 20)
        waiting = asyncio.create_task(made.session().aappend("user", "hello"))
        await until(lambda: made.stats.waiting == 1 and made.waiters[0].tried)
        with pytest.raises(RuntimeBusy, match="come first"):
            session.read("on")
        session.pin(2, 6)
        session.say("yes")
        assert session.stats.pending > 3
        session.close()
        await waiting


def test_a_fork_of_a_memory_on_disk_is_not_told_of_what_was_before() -> None:
    """Re-basings of before the fork are no events of its turns, though the memory was away when it was made."""
    options: dict[str, Any] = {"on": tiny_chat.model(max_position_embeddings=160), "rebase": True}
    with tiny_chat.runtime(1, pressure=("disk",), **options) as made:
        session = tiny_chat.filled(made, 200)
        tiny_chat.filled(made, 5)
        assert session.stats.state == "on disk"
        fork = session.fork()
        kinds = [event.type for event in fork.stream(max_new_tokens=2, do_sample=False)]
        assert "rebased" not in kinds
        assert fork.stats.rebases > 0
