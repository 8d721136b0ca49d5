"""Models as people load them: LoRA adapters, a pipeline, and every attention implementation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import pipeline

import agentmem
from support import families, tiny_chat, variants

# transformers warns of a property that peft still reads
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def adapted() -> Any:
    """A tiny Llama with a random LoRA adapter on its attention and MLP."""
    return get_peft_model(variants.private(), LoraConfig(**LORA, init_lora_weights=False)).eval()  # type: ignore[arg-type]  # read by name


def test_a_lora_model_below_the_cap_is_stock(adapted: Any) -> None:
    """The adapter's tokens, which are not the base model's, through the adapted model's own generate."""
    ids = variants.prompt(30)
    stock, base = (each.generate(input_ids=ids, max_new_tokens=20, do_sample=False) for each in (adapted, _base()))
    with agentmem.capped(adapted, **variants.ROOMY) as memory:
        ours = adapted.generate(input_ids=ids, max_new_tokens=20, do_sample=False, past_key_values=memory)
    with agentmem.wrap(adapted, **variants.ROOMY) as wrapped:
        again = wrapped.generate(ids, max_new_tokens=20, do_sample=False)

    assert not torch.equal(stock, base)
    assert torch.equal(ours, stock)
    assert torch.equal(again, stock)


def test_a_lora_model_compacts_and_its_adapter_can_be_off(adapted: Any) -> None:
    """Probes run with the adapter as it is; with it disabled the tokens are the base model's."""
    with agentmem.wrap(adapted, **variants.TIGHT) as ours:
        ours.generate(variants.prompt(30), max_new_tokens=40, do_sample=False)
        report = ours.report()
    with agentmem.wrap(adapted, **variants.ROOMY) as ours, adapted.disable_adapter():
        plain = ours.generate(variants.prompt(30), max_new_tokens=20, do_sample=False)

    assert report.num_compactions >= 2
    assert not any(each.faults for each in report.compactions)
    assert torch.equal(plain, _base().generate(variants.prompt(30), max_new_tokens=20, do_sample=False))


def _base() -> Any:
    return variants.model()


@pytest.mark.parametrize("passed", [True, False], ids=["passed", "taken from the block"])
def test_a_pipeline_runs_in_a_capped_block(passed: bool) -> None:
    """A text-generation pipeline uses the block's memory, which may also be among its arguments."""
    tokenizer = copy.deepcopy(tiny_chat.tokenizer())
    tokenizer.pad_token = "<pad>"  # noqa: S105  # no password
    pipe = pipeline("text-generation", model=variants.private(), tokenizer=tokenizer, device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    stock = pipe("hello there", **options)

    with agentmem.capped(pipe.model, **variants.ROOMY) as memory:
        ours = pipe("hello there", **options, **({"past_key_values": memory} if passed else {}))

    assert ours == stock
    assert memory.report().num_new_tokens == 11  # the last one is never read


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_every_attention_implementation_is_replaced(family: str, implementation: str) -> None:
    """Whichever the model was loaded with, flash without its package included: the tokens of eager, pads and all."""
    model = copy.deepcopy(families.model(family))
    ids, mask = variants.left_padded((20, 9))
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    stock = model.generate(ids, **options)
    model.config._attn_implementation = implementation  # the setter would look for flash's package
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        found = ours.generate(ids, **options)

    assert torch.equal(found, stock)
    assert model.config._attn_implementation == implementation
