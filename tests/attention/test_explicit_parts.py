"""The explicit path converts as few heads at a time as its bytes allow, and computes what it computes for all heads."""

from __future__ import annotations

import pytest
import torch

from agentmem.attention import explicit, quantised
from agentmem.attention.runs import Fresh, Run
from agentmem.planning.model_shape import LayerShape
from agentmem.settings import SlotDtype
from agentmem.testing import peak_allocated

HEADS, GROUP, SLOTS, TOKENS = 4, 3, 3000, 16


def given(slot_dtype: SlotDtype) -> tuple[torch.Tensor, Run, Fresh]:
    """Queries ``[12, 16, 64]``, and bfloat16 or quantised slots with scores, β and fresh keys."""
    make = torch.Generator().manual_seed(0)
    queries = torch.randn(HEADS * GROUP, TOKENS, 64, generator=make).bfloat16()
    keys, values = (torch.randn(HEADS, SLOTS, 64, generator=make).bfloat16() for _ in range(2))
    fresh = Fresh(*(torch.randn(HEADS, TOKENS, 64, generator=make).bfloat16() for _ in range(2)))
    bias, scores = torch.randn(HEADS, SLOTS, generator=make), torch.zeros(HEADS, SLOTS)
    forms = quantised.formats(slot_dtype, 64, 64)
    if forms is not None:
        return queries, Run(0, forms[0].encode(keys), forms[1].encode(values), bias, scores, forms), fresh
    return queries, Run(0, keys, values, bias, scores), fresh


@pytest.mark.parametrize("slot_dtype", ["auto", "int8", "k8v4"])
def test_heads_in_parts_give_what_they_give_together(slot_dtype: SlotDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, scores of slots and of fresh keys, within float32's rounding."""
    found = []
    for size in (explicit.TILE_BYTES, 1 << 30):
        monkeypatch.setattr(explicit, "TILE_BYTES", size)
        queries, run, fresh = given(slot_dtype)
        output, received = explicit.attend(queries, [run], fresh, 0.125, None, None)
        found.append((output, received, run.scores))
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("slot_dtype", ["auto", "int8", "k8v4"])
@pytest.mark.parametrize("slots", [100, 700, SLOTS])
def test_no_more_is_allocated_than_one_head_needs(slots: int, slot_dtype: SlotDtype, *, apart: bool) -> None:
    """The plan's bytes are kept, whether heads come as one run or apart; long heads are not converted together."""
    queries, run, fresh = given(slot_dtype)
    run = Run(0, run.keys[:, :slots], run.values[:, :slots], None, torch.zeros(HEADS, slots), run.quantised)
    runs = [run]
    if apart:
        heads = (slice(head, head + 1) for head in range(HEADS))
        runs = [Run(at.start, run.keys[at], run.values[at], None, torch.zeros(1, slots), run.quantised) for at in heads]
    layer = LayerShape(HEADS, HEADS * GROUP, 64, 64, slot_dtype=slot_dtype)
    output = HEADS * TOKENS * (GROUP * 64 * 2 + 4)

    peak = peak_allocated(lambda: explicit.attend(queries, runs, fresh, 0.125, None, None))

    assert peak <= explicit.explicit_bytes(layer, TOKENS, slots, 2) + output
    assert slots < SLOTS or peak < HEADS * SLOTS * 128 * 4
