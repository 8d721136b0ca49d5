"""Conversations: a second ``generate`` goes on over the same memory, feeding only what is new."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
)

import agentmem
from support import variants

LENGTHS = (21, 50, 34)


@pytest.mark.parametrize("variant", ["llama", "gemma3_text"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_second_turn_with_the_whole_conversation(masked: bool, variant: str) -> None:
    """The conversation so far with new tokens at its end gives stock's next turn; only what is new is fed."""
    model, new = variants.model(variant), variants.prompt(12, seed=9)

    def turns(cache: Any) -> torch.Tensor:
        first = model.generate(variants.prompt(20), max_new_tokens=10, do_sample=False, past_key_values=cache)
        longer = torch.cat((first, new), 1)
        mask = {"attention_mask": torch.ones_like(longer)} if masked else {}
        return model.generate(longer, max_new_tokens=10, do_sample=False, past_key_values=cache, **mask)  # type: ignore[no-any-return]

    stock = turns(DynamicCache(config=model.config))
    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = turns(memory)
        seen = memory.memory.sequences[0].seen

    assert torch.equal(ours, stock)
    assert seen == 20 + 10 + 12 + 10 - 1


def test_a_second_turn_with_new_tokens_only() -> None:
    """New tokens under a mask over everything continue like stock."""
    model, new = variants.model(), variants.prompt(12, seed=9)

    def turns(cache: Any) -> torch.Tensor:
        model.generate(variants.prompt(20), max_new_tokens=10, do_sample=False, past_key_values=cache)
        mask = torch.ones(1, 29 + 12, dtype=torch.long)
        return model.generate(new, attention_mask=mask, max_new_tokens=10, do_sample=False, past_key_values=cache)  # type: ignore[no-any-return]

    stock = turns(DynamicCache(config=model.config))
    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = turns(memory)

    assert torch.equal(ours, stock)


def test_a_second_turn_of_a_padded_batch() -> None:
    """A left-padded batch goes on over its compactions: columns, pads and rows stay in step with stock's numbering."""
    model, (ids, mask) = variants.model(), variants.left_padded(LENGTHS)

    def turns(cache: Any) -> torch.Tensor:
        first = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, past_key_values=cache)
        longer = torch.cat((first, variants.prompt(6, rows=3, seed=9)), 1)
        wide = torch.cat((mask, torch.ones(3, 14, dtype=torch.long)), 1)
        return model.generate(longer, attention_mask=wide, max_new_tokens=8, do_sample=False, past_key_values=cache)  # type: ignore[no-any-return]

    stock = turns(DynamicCache(config=model.config))
    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = turns(memory)
    with agentmem.capped(model, **variants.TIGHT) as tight:
        capped = turns(tight)
        positions = [row.next_position for row in tight.memory.sequences]

    assert torch.equal(ours, stock)
    assert capped.shape == stock.shape
    assert positions == [length + 8 + 6 + 8 - 1 for length in LENGTHS]
    assert tight.report().num_compactions >= 3
