"""Models around a text model, as multimodal ones are: text goes through them as through any other model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import agentmem
from agentmem.errors import PromptMismatch, UnsupportedGeneration
from agentmem.hf.forward_context import FRAME
from support import families, tiny, variants

EVERY = pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "mistral3"])
PIXELS = {"pixel_values": torch.zeros(1, 3, 8, 8)}


@EVERY
def test_generation_around_a_text_model_is_stock_below_the_cap(family: str) -> None:
    """A prompt in pieces and decoding, left-padded, twice: ids and masks reach the text model past the wrapper."""
    model, (ids, mask) = families.model(family), variants.left_padded((40, 21))
    options = {"max_new_tokens": 8, "do_sample": False}
    stock = model.generate(ids, attention_mask=mask, **options)
    again = model.generate(stock, attention_mask=torch.cat((mask, torch.ones(2, 8, dtype=mask.dtype)), 1), **options)

    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = model.generate(ids, attention_mask=mask, past_key_values=memory, **options)
        longer = torch.cat((mask, torch.ones(2, 8, dtype=mask.dtype)), 1)
        more = model.generate(ours, attention_mask=longer, past_key_values=memory, **options)
        assert memory.transcript(1) == more[1][mask.shape[1] - 21 : -1].tolist()

    assert torch.equal(ours, stock)
    assert torch.equal(more, again)


@EVERY
def test_what_comes_next_can_be_peeked_at(family: str) -> None:
    """A transient forward through the wrapper gives stock's logits and leaves nothing."""
    model, ids = families.model(family), variants.prompt(30)
    with torch.no_grad(), agentmem.capped(model, **variants.ROOMY) as memory:
        model(ids[:, :24], past_key_values=memory, logits_to_keep=1)
        found, held = memory.peek(ids[0, 24:].tolist()), memory.columns
        stock = model(ids, use_cache=False).logits[0, 24:]

    torch.testing.assert_close(found, stock, rtol=0, atol=5e-5)
    assert held == 24


@EVERY
def test_a_compacted_wrapper_has_run_its_ids_again(family: str) -> None:
    """The probe needs ids, which the text model was never passed; compactions run without faults."""
    model = families.model(family)
    with tiny.capped("replay", model) as memory:
        model.generate(variants.prompt(90), max_new_tokens=12, do_sample=False, past_key_values=memory)
        compactions = memory.report().compactions

    assert len(compactions) >= 2
    assert not any(each.faults for each in compactions)


def test_images_are_refused_by_name() -> None:
    """Before anything runs; without a memory the model takes them as ever."""
    model = families.model("gemma3")
    with agentmem.capped(model, **variants.ROOMY) as memory:
        with variants.refused(
            model, UnsupportedGeneration, "a forward with pixel_values (a value of type Tensor)", "leave it out"
        ):
            model(variants.prompt(8), past_key_values=memory, **PIXELS)
        assert memory.columns == 0
        model(variants.prompt(3), past_key_values=memory)
        assert FRAME.get() is None


def test_a_refusal_leaves_no_frame_behind() -> None:
    """What is refused while a prompt is cut ends the wrapper's own frame, and the next forward is served."""
    model = families.model("gemma3")
    with agentmem.capped(model, **variants.ROOMY) as memory:
        mask = torch.ones(1, 20, dtype=torch.long)
        mask[0, -1] = 0
        with pytest.raises(UnsupportedGeneration, match="ends with a pad"):
            model(variants.prompt(20), attention_mask=mask, past_key_values=memory, logits_to_keep=1)
        with pytest.raises(UnsupportedGeneration, match="must cover"):
            model(variants.prompt(12), attention_mask=mask[:, :7], past_key_values=memory)
        assert FRAME.get() is None
        ours = model(variants.prompt(20)[:, :16], past_key_values=memory).logits
        with pytest.raises(PromptMismatch):
            model.generate(variants.prompt(20, seed=9), past_key_values=memory, max_new_tokens=2)

    torch.testing.assert_close(ours, model(variants.prompt(20)[:, :16]).logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])  # Qwen2.5-VL's own forward takes no mask of all columns
def test_other_forwards_of_a_wrapper_are_its_own(family: str) -> None:
    """In the block a cache of the caller's gives stock's logits bit for bit; after it no hook is left."""
    model: Any = copy.deepcopy(families.model(family))
    hooks = [len(each._forward_pre_hooks) + len(each._forward_hooks) for each in (model, model.get_decoder())]
    ids, mask = variants.left_padded((12, 7))
    stock = variants.foreign(model, ids, mask)
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        ours.generate(variants.prompt(5), max_new_tokens=2)
        found = variants.foreign(model, ids, mask)
        twin = copy.deepcopy(model)

    assert torch.equal(found, stock)
    assert torch.equal(variants.foreign(twin, ids, mask), stock)
    for each in (model, twin):
        parts = (each, each.get_decoder())
        assert [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in parts] == hooks
    assert isinstance(model(ids, attention_mask=mask, use_cache=True).past_key_values, DynamicCache)
