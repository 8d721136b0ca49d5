"""Every supported family: below the cap it is stock, above it it runs, and sliding layers see their windows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import agentmem
from support import variants

TOLERANCE = 5e-5
"""Absolute, on float32 logits of magnitude 1 to 10: a few hundred roundings of 6e-8, summed in another order."""
EVERY_VARIANT = pytest.mark.parametrize("variant", variants.VARIANTS)


@EVERY_VARIANT
def test_greedy_below_the_cap_is_stock(variant: str) -> None:
    """Greedy tokens equal stock's and every step's logits agree, past the windows and with a prompt in pieces."""
    model, ids = variants.model(variant), variants.prompt(70)
    stock = variants.greedy(model, ids, 30)

    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = variants.greedy(model, ids, 30, past_key_values=memory)
        report = memory.report()

    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(variants.steps(ours), variants.steps(stock), rtol=0, atol=TOLERANCE)
    assert report.num_compactions == 0
    assert report.num_prompt_tokens == 70


@EVERY_VARIANT
def test_sampling_below_the_cap_is_stock(variant: str) -> None:
    """The same seed draws the same tokens, and the global random state ends where stock leaves it."""
    model, ids = variants.model(variant), variants.prompt(40, seed=2)

    def sampled(**kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(11)
        output = model.generate(ids, max_new_tokens=20, do_sample=True, temperature=0.8, top_p=0.95, **kwargs)
        return output, torch.get_rng_state()

    tokens, state = sampled()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        our_tokens, our_state = sampled(past_key_values=memory)

    assert torch.equal(our_tokens, tokens)
    assert torch.equal(our_state, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY_VARIANT
def test_half_precision_is_as_good_as_stock(variant: str, dtype: torch.dtype) -> None:
    """In 16 bits the logits are at most twice as far from a float64 model as stock's are, piece after piece."""
    model, ids = variants.model(variant, dtype), variants.prompt(64, seed=3)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        truth = exact(ids).logits
        stock = model(ids).logits.double()
        with agentmem.capped(model, **variants.ROOMY) as memory:
            pieces = [model(piece, past_key_values=memory).logits for piece in ids.split((16, 16, 16, 15, 1), 1)]

    ours = torch.cat(pieces, 1).double()
    assert pieces[0].dtype == dtype
    assert (ours - truth).abs().mean() <= 2 * (stock - truth).abs().mean()
    assert (ours - truth).abs().max() <= 2 * (stock - truth).abs().max()


@pytest.mark.parametrize("policy", variants.POLICIES)
@pytest.mark.parametrize("variant", variants.COMPACTABLE)
def test_every_policy_runs_above_the_cap(variant: str, policy: str) -> None:
    """Past its slots a memory compacts, holds no more than its capacity, and goes on with finite logits."""
    model, ids = variants.model(variant), variants.prompt(70)
    held = []

    with agentmem.capped(model, policy=policy, **variants.TIGHT) as memory:
        memory.subscribe(lambda _: held.append(max(_full_lengths(memory))))
        ours = variants.greedy(model, ids, 30, past_key_values=memory)
        report = memory.report()

    assert ours.sequences.shape == (1, 100)
    assert torch.isfinite(variants.steps(ours)).all()
    assert report.num_compactions >= 3
    assert not any(compaction.faults for compaction in report.compactions)
    assert max(held) == 40
    assert report.peak_bytes <= report.cap_bytes


@pytest.mark.parametrize("variant", variants.SLIDING_ONLY)
def test_sliding_windows_alone_are_stock_under_the_smallest_cap(variant: str) -> None:
    """Where every layer slides, a text of nine windows gives stock's tokens and logits, and nothing is compacted."""
    model, ids = variants.model(variant), variants.prompt(150)
    stock = variants.greedy(model, ids, 60)
    plan = agentmem.plan(model, cap="64MiB", chunk=16)

    with agentmem.capped(model, cap=plan.resident_bytes + plan.workspace_bytes, chunk=16) as memory:
        ours = variants.greedy(model, ids, 60, past_key_values=memory)
        usage, compactions = memory.usage(), memory.compactions

    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(variants.steps(ours), variants.steps(stock), rtol=0, atol=TOLERANCE)
    assert compactions == ()
    assert usage.total_slots <= 2 * 2 * (variants.WINDOW - 1 + 16)


@pytest.mark.parametrize("chunk", [1, 5, variants.WINDOW - 1, variants.WINDOW, variants.WINDOW + 1, 64])
def test_any_chunk_serves_a_sliding_window(chunk: int) -> None:
    """Pieces shorter than, as long as and longer than the window give stock's tokens."""
    model, ids = variants.model("mistral, sliding"), variants.prompt(60, seed=4)
    stock = model.generate(ids, max_new_tokens=30, do_sample=False)

    with agentmem.capped(model, cap="64MiB", chunk=chunk) as memory:
        ours = model.generate(ids, max_new_tokens=30, do_sample=False, past_key_values=memory)

    assert torch.equal(ours, stock)


def test_a_sliding_layer_keeps_its_window_while_the_full_one_is_compacted() -> None:
    """Gemma's first layer slides: it holds exactly the newest keys of stock, whatever the full layer has forgotten."""
    model, ids = variants.model("gemma3_text"), variants.prompt(90)
    stock = DynamicCache(config=model.config)
    with torch.no_grad(), agentmem.capped(model, **variants.TIGHT) as memory:
        model(ids, past_key_values=memory, logits_to_keep=1)
        model(ids, past_key_values=stock)
        assert memory.report().num_compactions >= 3
        store = memory.memory.sequences[0].stores[0]
        assert store is not None
        held = torch.stack([store.segment(head, 0, 0).keys[-31:] for head in range(2)])

    torch.testing.assert_close(held, stock.layers[0].keys[0, :, -31:], rtol=0, atol=1e-5)


def _full_lengths(memory: agentmem.CappedCache) -> list[int]:
    """Slots of every head of every full layer now."""
    stores = [
        store for store in memory.memory.sequences[0].stores if store is not None and store.spec.shape.window is None
    ]
    return [length for store in stores for length in store.lengths]


def test_the_default_model_below_the_cap_is_stock(
    default_model: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    """32 greedy tokens of the default model equal stock generate."""
    model, tokenizer = default_model
    inputs = tokenizer("The tide turned in the night, and by morning", return_tensors="pt")
    settings = {"min_new_tokens": 32, "max_new_tokens": 32, "do_sample": False}
    stock = model.generate(**inputs, **settings)

    with agentmem.capped(model, cap="24MiB") as memory:
        ours = model.generate(**inputs, **settings, past_key_values=memory)

    assert torch.equal(ours, stock)
