"""Every way to run a memory is refused to a second thread while a first one runs it, and does not disturb the first."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

import agentmem
from agentmem.errors import UnsupportedGeneration
from agentmem.hf import CappedCache
from support import tiny, variants
from support import tiny_chat as tc

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def elsewhere(call: Callable[[], object]) -> list[UnsupportedGeneration]:
    """Run a call in another thread to its end; return the refusal that it raised, if any."""
    refused: list[UnsupportedGeneration] = []

    def run() -> None:
        try:
            call()
        except UnsupportedGeneration as error:
            refused.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return refused


def in_forward(model: Any, number: int, act: Callable[[], None]) -> Any:
    """Call ``act`` in the middle of a forward, the ``number``-th from now; return the hook's handle."""
    left = [number]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    return model.model.layers[0].register_forward_hook(hook)


def long_forward(memory: CappedCache) -> object:
    """A direct forward of a prompt that has to be cut into pieces."""
    return memory.model(tiny.ids(40, seed=2), past_key_values=memory, logits_to_keep=1)


DOORS: dict[str, Callable[[CappedCache], object]] = {
    "peek": lambda memory: memory.peek([5]),
    "compact": lambda memory: memory.compact(),
    "forward": long_forward,
    "generate": lambda memory: memory.model.generate(tiny.ids(60), past_key_values=memory, max_new_tokens=1),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_second_thread_is_refused_in_mid_forward(door: str) -> None:
    """The running generate ends with stock's tokens, and the memory has read all of them."""
    model, ids, refused = variants.private(), variants.prompt(30), list[UnsupportedGeneration]()
    stock = model.generate(ids, **OPTIONS)
    with agentmem.capped(model, **variants.ROOMY) as memory:
        handle = in_forward(model, 4, lambda: refused.extend(elsewhere(lambda: DOORS[door](memory))))
        tokens = model.generate(ids, past_key_values=memory, **OPTIONS)
        handle.remove()
        assert memory.transcript() == tokens[0, :-1].tolist()

    assert torch.equal(tokens, stock)
    assert ["in use by thread 'MainThread'" in str(each) for each in refused] == [True]


@pytest.mark.parametrize("door", DOORS)
def test_a_hook_of_the_model_is_refused_in_mid_forward(door: str) -> None:
    """It runs in the thread that owns the memory, and would drop the tokens of the forward that is running."""
    model, ids, refused = variants.private(), variants.prompt(30), list[str]()
    stock = model.generate(ids, **OPTIONS)
    with agentmem.capped(model, **variants.ROOMY) as memory:

        def act() -> None:
            with pytest.raises(UnsupportedGeneration, match="within a forward of the same memory") as found:
                DOORS[door](memory)
            refused.append(str(found.value))

        handle = in_forward(model, 4, act)
        tokens = model.generate(ids, past_key_values=memory, **OPTIONS)
        handle.remove()
        assert memory.transcript() == tokens[0, :-1].tolist()

    assert torch.equal(tokens, stock)
    assert len(refused) == 1


@pytest.mark.parametrize("door", ["peek", "compact"])
def test_a_hook_of_the_model_is_refused_in_mid_compaction(door: str) -> None:
    """The probe's forward has its bytes in the ledger until it ends."""
    with tiny.capped("replay") as memory:
        tiny.feed(memory, tiny.ids(30), pieces=7)

        def act() -> None:
            with pytest.raises(UnsupportedGeneration, match="within a forward of the same memory"):
                DOORS[door](memory)

        handle = in_forward(memory.model, 1, act)
        (report,) = memory.compact()
        handle.remove()
        assert report.faults == ()


def test_a_long_forward_compacts_nothing_that_another_thread_runs() -> None:
    """Where the row is full, cutting the prompt would compact it before the first piece's forward is refused."""
    refused, compactions = list[UnsupportedGeneration](), list[int]()
    with tiny.capped("window") as memory:

        def step(_: object, scores: object) -> object:
            if memory.room() == 0:
                refused.extend(elsewhere(lambda: long_forward(memory)))
                compactions.append(len(memory.compactions))
            return scores

        model: Any = memory.model
        tokens = model.generate(tiny.ids(30), past_key_values=memory, logits_processor=[step], max_new_tokens=40)
        assert memory.transcript() == tokens[0, :-1].tolist()
    assert len(refused) == len(compactions) > 0
    assert compactions == list(range(len(compactions)))


@pytest.mark.parametrize("door", ["compact", "peek"])
def test_a_thread_that_peeks_or_compacts_owns_the_memory(door: str) -> None:
    """A forward in another thread is refused while it does, and goes on afterwards, though the door's error is kept."""
    refused: list[UnsupportedGeneration] = []
    with tiny.capped("replay") as memory:
        tiny.feed(memory, tiny.ids(30), pieces=7)

        def act() -> None:
            refused.extend(elsewhere(lambda: tiny.feed(memory, tiny.ids(1, seed=1))))
            raise KeyboardInterrupt

        model: Any = memory.model
        handle = in_forward(model, 1, act)
        with pytest.raises(KeyboardInterrupt) as kept:
            DOORS[door](memory)
        handle.remove()
        assert len(refused) == 1
        assert memory.transcript() == tiny.ids(30)[0].tolist()
        assert elsewhere(lambda: tiny.feed(memory, tiny.ids(1, seed=1))) == []
        assert kept.value.__traceback__ is not None


def test_a_prompt_is_checked_by_the_thread_that_owns_the_memory() -> None:
    """A prompt that was right before another thread's generate is not run after it."""
    model, ids, late = variants.private(), variants.prompt(20), list[list[UnsupportedGeneration]]()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model.generate(ids, past_key_values=memory, max_new_tokens=1)
        longer = torch.cat((ids, variants.prompt(5, seed=3)), 1)
        module = importlib.import_module("agentmem.hf.attach")
        checked = module.check_generate

        def slow(*args: Any) -> None:
            checked(*args)
            if threading.current_thread() is threading.main_thread():
                late.append(elsewhere(lambda: model.generate(longer, past_key_values=memory, max_new_tokens=1)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "check_generate", slow)
            tokens = model.generate(longer, past_key_values=memory, **OPTIONS)
        assert memory.transcript() == tokens[0, :-1].tolist()
    assert [len(each) for each in late] == [1]


@pytest.mark.parametrize("door", ["peek", "compact"])
def test_a_sessions_view_is_refused_to_a_second_thread(door: str) -> None:
    """The reply is the one of a session that nobody disturbs."""
    with tc.runtime(1) as runtime:
        right = tc.on(tc.filled(runtime, 40), 8)
    refused: list[UnsupportedGeneration] = []
    with tc.runtime(1) as runtime:
        session = tc.filled(runtime, 40)
        model: Any = runtime.model
        handle = in_forward(model, 3, lambda: refused.extend(elsewhere(lambda: DOORS[door](session.view))))
        with suppress(UnsupportedGeneration):
            assert tc.on(session, 8) == right
        handle.remove()
    assert len(refused) == 1
