"""Torch's ambient state (autocast, default dtype and device, modes) and what it must not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import pytest
import torch

import agentmem
from agentmem import plugins
from support import variants
from support.tiny import tokenizer

POLICIES = (
    "am-halving",
    "am-halving[budgets=global]",
    "am-pursuit[budgets=global]",
    "merge",
    "snapkv",
    "r-kv",
    "g-kv",
    "heavy-hitters",
    "tova",
    "keydiff",
    "key-norm",
    "head-roles",
    "window",
    "random-subset",
)
RANDOM = "am-halving[probe=random]"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Another dtype for tensors that name none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """Operations that are not deterministic raise, and memory that was not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def ambient(name: str) -> AbstractContextManager[object]:
    """The state of that name."""
    if name in {"float64", "bfloat16"}:
        return default_dtype(getattr(torch, name))
    states = {"meta": torch.device("meta"), "grad": torch.enable_grad(), "inference": torch.inference_mode()}
    return deterministic() if name == "deterministic" else states[name]


def slots(policy: str, state: AbstractContextManager[object] | None = None) -> tuple[list[torch.Tensor], list[str]]:
    """What the stores hold after compacting under a state, and the faults."""
    model, ids = variants.model(), variants.prompt(60)
    made = plugins.policy(policy)
    with agentmem.capped(model, policy=made, tokenizer=tokenizer, **variants.TIGHT) as memory:
        with state or torch.no_grad():
            for start in range(0, 60, 5):
                model(input_ids=ids[:, start : start + 5], past_key_values=memory, logits_to_keep=1)
        stores = [store for store in memory.memory.sequences[0].stores if store is not None]
        held = [run for store in stores for each in store.runs(None, scored=True) for run in (each.keys, each.values)]
        bias = [each.bias for store in stores for each in store.runs(None, scored=True) if each.bias is not None]
        copies = [each.clone() for each in (*held, *bias)]
        assert not any(each.requires_grad for each in copies)
    report = memory.report()
    assert report.num_compactions
    return copies, [fault for each in report.compactions for fault in each.faults]


@cache
def plain(policy: str) -> list[torch.Tensor]:
    """What the stores hold without any state."""
    return slots(policy)[0]


@pytest.mark.parametrize("name", ["float64", "bfloat16", "meta", "grad", "inference", "deterministic"])
@pytest.mark.parametrize("policy", [*POLICIES, RANDOM])
def test_ambient_state_changes_no_slot(policy: str, name: str) -> None:
    """Whatever dtype, device or mode is the default, a policy commits the very slots that it commits without."""
    held, faults = slots(policy, ambient(name))

    assert faults == []
    for ours, expected in zip(held, plain(policy), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", [*POLICIES, RANDOM])
def test_no_fit_fails_under_autocast(policy: str, dtype: torch.dtype) -> None:
    """A policy's arithmetic runs without autocast, so every layer is fitted as it is without."""
    _, faults = slots(policy, torch.autocast("cpu", dtype))

    assert faults == []


@pytest.mark.parametrize("variant", ["llama", "qwen3, half sliding", "gemma3_text"])
def test_tokens_below_the_cap_equal_stock_under_the_same_autocast(variant: str) -> None:
    """Attention computes in autocast's dtype, as stock does, so that no key is held in another one."""
    model = variants.model(variant)
    for seed in range(8):
        ids = variants.prompt(40, seed=seed)
        with torch.autocast("cpu", torch.bfloat16):
            stock = variants.greedy(model, ids, 12)
            with agentmem.capped(model, **variants.ROOMY) as memory:
                ours = variants.greedy(model, ids, 12, past_key_values=memory)
                store = memory.memory.sequences[0].stores[0]
        assert store is not None
        assert store.spec.dtype == torch.bfloat16
        exact = variants.steps(variants.greedy(model, ids, 1))[:, 0]
        naive = (variants.steps(stock)[:, 0] - exact).abs().max()  # what bfloat16 alone costs stock
        assert (variants.steps(ours)[:, 0] - exact).abs().max() <= 2 * naive
        margin = variants.steps(stock)[0].float().topk(2).values.diff().abs().min()
        assert margin < 4 * naive or torch.equal(ours.sequences, stock.sequences)


@pytest.mark.parametrize("policy", ["am-halving", "heavy-hitters"])
def test_autocast_may_come_and_go(policy: str) -> None:
    """A memory that began with or without autocast goes on the other way; the slots keep the first keys' dtype."""
    model, ids = variants.model(), variants.prompt(80)
    for first in (True, False):
        with torch.no_grad(), agentmem.capped(model, policy=policy, **variants.TIGHT) as memory:
            for step, piece in enumerate(ids.split(10, 1)):
                with torch.autocast("cpu", torch.bfloat16, enabled=(step % 2 == 0) == first):
                    logits = model(input_ids=piece, past_key_values=memory, logits_to_keep=1).logits
            assert torch.isfinite(logits).all()
            memory.peek([5, 6])
        assert [each.faults for each in memory.report().compactions] == [()] * memory.report().num_compactions


def test_compacting_by_hand_under_autocast_does_not_fail() -> None:
    """A compaction that is asked for outside a forward runs its fits without autocast, and its probe with it."""
    model, ids = variants.model(), variants.prompt(36)
    dtypes: list[torch.dtype] = []
    hook = model.get_decoder().layers[0].mlp.register_forward_hook(lambda _m, _a, out: dtypes.append(out.dtype))
    with torch.no_grad(), agentmem.capped(model, **variants.TIGHT) as memory, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, past_key_values=memory, logits_to_keep=1)
        dtypes.clear()
        (report,) = memory.compact(slots=10)
    hook.remove()

    assert report.faults == ()
    assert set(dtypes) == {torch.bfloat16}
