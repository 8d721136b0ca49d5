"""Batches of unequal prompts: what a row's part of a forward costs beside the model's own bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import agentmem
from agentmem.memory import forwards
from agentmem.testing import peak_allocated, tiny_model

LENGTHS = {"padded": (1024, 1000, 900), "alike": (1024, 1024, 1024)}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_batch_in_mid_prompt_stays_within_its_cap(lengths: tuple[int, ...]) -> None:
    """Peak of a capped ``generate`` minus that of the plain forward is at most a cap that was planned to suffice."""
    model = tiny_model("llama", num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=1, head_dim=64)
    ids, mask = torch.zeros(3, 1024, dtype=torch.long), torch.zeros(3, 1024, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = 3 + torch.arange(length) % 100, 1
    settings = {"keep_first": 4, "keep_recent": 16, "chunk": 1024, "max_slots": 1060}
    plan = agentmem.plan(model, cap=1 << 34, policy="window", rows=3, **settings)
    cap = plan.resident_bytes + plan.workspace_bytes

    def plain() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def capped() -> None:
        with agentmem.capped(model, cap=cap, policy="window", **settings) as memory:
            model.generate(ids, attention_mask=mask, past_key_values=memory, max_new_tokens=2, do_sample=False)

    assert peak_allocated(capped) - peak_allocated(plain) <= cap


def test_the_rows_of_a_left_padded_batch_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row appends and attends with are views into the forward's own tensors, whose bytes are the model's."""
    model, seen = tiny_model("llama"), list[int]()
    append_one = forwards.append_one

    def watched(
        memory: Any, row: Any, layer: int, queries: Any, keys: Any, values: Any, scale: float, *more: Any
    ) -> Any:
        seen.extend(each.untyped_storage().nbytes() // each.nbytes for each in (queries, keys, values))
        return append_one(memory, row, layer, queries, keys, values, scale, *more)

    monkeypatch.setattr(forwards, "append_one", watched)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    with agentmem.capped(model, cap="1MiB", policy="window", keep_first=1, keep_recent=8) as memory, torch.no_grad():
        model(input_ids=3 * mask, attention_mask=mask, past_key_values=memory, logits_to_keep=1)
    assert len(seen) == 2 * 3 * 3
    assert min(seen) >= len(mask)
