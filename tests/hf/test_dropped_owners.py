"""Owners that become garbage without being closed: the model is restored, whatever thread the collector runs on."""

from __future__ import annotations

import gc
import importlib
import threading
from typing import Any
from weakref import ref

import pytest
import torch

import agentmem
from agentmem.testing import tiny_model
from support import tiny_chat, variants
from support.waiting import LIMIT

ATTACH = importlib.import_module("agentmem.hf.attach")
"""The module; the package has a function of its name."""


def untouched(model: Any) -> bool:
    """Whether nothing of ours is on a model."""
    hooks = [len(each._forward_pre_hooks) + len(each._forward_hooks) for each in model.modules()]
    plain = "agentmem" not in str(model.config._attn_implementation)
    return plain and not any(hooks) and "generate" not in vars(model) and model not in ATTACH._ATTACHMENTS


def used(model: Any) -> Any:
    """A wrapped model that has generated."""
    wrapped = agentmem.wrap(model, **variants.TIGHT)
    wrapped.generate(variants.prompt(20), max_new_tokens=2)
    return wrapped


def opened(model: Any) -> Any:
    """A runtime of that model with a session, a fork of it that has its own memory, and one on disk."""
    made = agentmem.Runtime(
        model, tiny_chat.tokenizer(), cap=4 * tiny_chat.lease(on=model), **tiny_chat.SETTINGS, share=0.25
    )
    session = tiny_chat.filled(made, 30)
    fork = session.fork()
    tiny_chat.on(fork, 2)
    away = tiny_chat.filled(made, 30)
    with made.scheduler.lock:
        away.holding.preempt("disk", made.folder)
    return made


@pytest.mark.parametrize("make", [used, opened])
def test_a_dropped_owner_leaves_the_model_as_it_was(make: Any) -> None:
    """Hooks, attention and generate are what they were once the owner is collected; stock tokens come out again."""
    model = tiny_model("llama")
    stock = model.generate(variants.prompt(20), max_new_tokens=5, do_sample=False)
    owner = make(model)
    gone = ref(owner)
    assert not untouched(model)

    del owner
    gc.collect()
    assert gone() is None
    assert untouched(model)
    assert torch.equal(model.generate(variants.prompt(20), max_new_tokens=5, do_sample=False), stock)


def test_a_dropped_owner_takes_only_its_own() -> None:
    """Others on the same model go on, and one that was closed is not undone twice."""
    model = tiny_model("llama")
    dropped, kept, closed = used(model), used(model), used(model)
    closed.reset()
    closed.close()
    del dropped, closed
    gc.collect()

    assert not untouched(model)
    kept.reset()
    kept.generate(variants.prompt(3), max_new_tokens=2)
    kept.close()
    assert untouched(model)


@pytest.mark.parametrize("other_thread", [False, True])
def test_a_collection_while_models_are_attached_does_not_wait(*, other_thread: bool) -> None:
    """An owner that is collected while the lock is held is undone by whoever holds it, and nobody stands still."""
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    owners = [used(model)]

    def collected() -> None:
        owners.clear()
        gc.collect()

    with ATTACH._LOCK:
        thread = threading.Thread(target=collected, daemon=True)
        if other_thread:
            thread.start()
            thread.join(LIMIT)
        else:
            collected()
        assert not thread.is_alive()
        assert not untouched(model)
    with agentmem.wrap(other, **variants.TIGHT):
        assert untouched(model)
    assert untouched(other)


def test_a_dropped_model_is_freed_with_its_owner() -> None:
    """Neither the owner nor what waits for it keeps a model alive that nobody else has."""
    model = tiny_model("llama")
    owner, gone = used(model), ref(model)
    del model, owner
    gc.collect()

    assert gone() is None
