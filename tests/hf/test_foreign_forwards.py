"""Forwards that are not ours, on an attached model or beside it: bit for bit what they are without a memory."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import DynamicCache

import agentmem
from support import variants


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "phi3"])
def test_another_cache_is_served_bit_for_bit(variant: str, implementation: str) -> None:
    """Inside a capped block, forwards on another cache and without any give exactly stock's bits."""
    model = variants.private(variant)
    model.set_attn_implementation(implementation)
    ids = variants.prompt(12, rows=2)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        stock, bare = variants.foreign(model, ids, mask), model(ids, use_cache=False).logits
        with agentmem.capped(model, **variants.ROOMY) as memory:
            model(variants.prompt(9), past_key_values=memory)
            inside, inside_bare = variants.foreign(model, ids, mask), model(ids, use_cache=False).logits
            assert memory.get_seq_length() == 9

    assert torch.equal(inside, stock)
    assert torch.equal(inside_bare, bare)


def test_an_eager_model_is_capped_too() -> None:
    """A model with attn_implementation="eager" generates its own tokens under a cap, and compacts."""
    model, ids = variants.private(), variants.prompt(40)
    model.set_attn_implementation("eager")
    stock = model.generate(ids, max_new_tokens=20, do_sample=False)

    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=memory)
    with agentmem.capped(model, **variants.TIGHT) as memory:
        model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=memory)

    assert torch.equal(ours, stock)
    assert memory.report().num_compactions >= 1


def test_another_thread_with_its_own_cache_is_undisturbed() -> None:
    """While one thread generates under a cap, generate in another thread gives exactly stock's logits."""
    model, ids = variants.model(), variants.prompt(20, seed=5)
    stock = variants.steps(variants.greedy(model, ids, 25))
    results: list[torch.Tensor] = []
    with agentmem.capped(model, **variants.TIGHT) as memory:
        other = threading.Thread(
            target=lambda: results.append(
                variants.steps(variants.greedy(model, ids, 25, past_key_values=DynamicCache(config=model.config)))
            )
        )
        unaware = threading.Thread(target=lambda: results.append(variants.steps(variants.greedy(model, ids, 25))))
        other.start()
        unaware.start()
        model.generate(variants.prompt(50), max_new_tokens=30, past_key_values=memory)
        other.join()
        unaware.join()

    assert memory.report().num_compactions >= 2
    assert [torch.equal(result, stock) for result in results] == [True, True]


def test_a_model_that_shares_the_config_is_undisturbed() -> None:
    """Another model on the same config object keeps its own bits, in the block and from inside a subscriber."""
    model = variants.private()
    other = type(model)(model.config).eval()
    ids, mask = variants.prompt(12, rows=2), torch.ones(2, 12, dtype=torch.long)
    stock = variants.foreign(other, ids, mask)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), agentmem.capped(model, **variants.TIGHT) as memory:
        memory.subscribe(lambda _: seen.append(variants.foreign(other, ids, mask)))
        model(variants.prompt(60), past_key_values=memory, logits_to_keep=1)
        seen.append(variants.foreign(other, ids, mask))

    assert len(seen) > 3
    assert all(torch.equal(each, stock) for each in seen)


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_capped_models_on_one_config_end_in_any_order(first_out: int) -> None:
    """Whichever of two capped models on one config object closes first, the other stays right; then all is restored."""
    models = [variants.private()]
    models.append(type(models[0])(models[0].config).eval())
    ids = variants.prompt(30)
    stock = [model.generate(ids, max_new_tokens=15, do_sample=False) for model in models]
    wrapped = [agentmem.wrap(model, **variants.ROOMY) for model in models]

    wrapped[first_out].close()
    ours = wrapped[1 - first_out].generate(ids, max_new_tokens=15, do_sample=False)
    wrapped[1 - first_out].close()

    assert torch.equal(ours, stock[1 - first_out])
    assert models[0].config._attn_implementation == "sdpa"


def test_an_interrupted_generate_does_not_reach_a_model_on_the_same_config() -> None:
    """After Ctrl-C in the middle of a wrapped model's layer, another model on its config still gives stock's bits."""
    model = variants.private()
    other = type(model)(model.config).eval()
    ids = variants.prompt(12)
    stock = variants.foreign(other, ids, torch.ones_like(ids))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with agentmem.wrap(model, **variants.ROOMY) as ours:
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            ours.generate(ids, max_new_tokens=2)
        handle.remove()
        between = variants.foreign(other, ids, torch.ones_like(ids))
        again = ours.generate(ids, max_new_tokens=2, do_sample=False)

    assert torch.equal(between, stock)
    assert torch.equal(again, model.generate(ids, max_new_tokens=2, do_sample=False))
