"""Attention sinks: one more logit in each query head's denominators, against float64 loops, within their bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import agentmem
from agentmem import hf
from agentmem.attention.explicit import explicit_bytes
from agentmem.attention.ragged import attend
from agentmem.attention.runs import Fresh, Run
from agentmem.errors import UnsupportedModel
from agentmem.planning.model_shape import LayerShape
from agentmem.testing import peak_allocated
from support import families, tiny, variants

HEADS, GROUP, DIM = 2, 3, 16
SCALE = 0.4


def _draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _oracle(
    queries: torch.Tensor, held: list[tuple[torch.Tensor, ...]], fresh: Fresh | None, window: int | None, sinks: Any
) -> torch.Tensor:
    """``[Hq, q, d]`` float64 from the definition: weights are exp(logit) over the sum of all and exp(sink)."""
    output = torch.zeros(queries.shape, dtype=torch.float64)
    for row in range(queries.shape[0]):
        keys, values, bias = held[row // GROUP]
        for token in range(queries.shape[1]):
            pairs = [(k, v, float(b)) for k, v, b in zip(keys, values, bias, strict=True)]
            if fresh is not None:
                own = zip(fresh.keys[row // GROUP], fresh.values[row // GROUP], strict=True)
                pairs += [(k, v, 0.0) for k, v in list(own)[: token + 1]]
            pairs = pairs if window is None else pairs[-window:]
            masses = [math.exp(SCALE * float(queries[row, token].double() @ k.double()) + b) for k, _, b in pairs]
            total = sum(masses) + math.exp(float(sinks[row]))
            for mass, (_, value, _) in zip(masses, pairs, strict=True):
                output[row, token] += mass / total * value.double()
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("held", "tokens", "window"),
    [((9, 9), 1, None), ((9, 4), 1, None), ((9, 9), 5, None), ((9, 4), 5, None), ((9, 9), 5, 6), ((0, 0), 5, None)],
    ids=["decode", "decode, ragged", "chunk", "chunk, ragged", "window", "first chunk"],
)
def test_attention_with_sinks_is_the_oracle(
    held: tuple[int, ...], tokens: int, window: int | None, dtype: torch.dtype
) -> None:
    """Every query head has its own sink, whatever it shares; slots carry β."""
    queries = _draw(1, HEADS * GROUP, tokens, DIM).to(dtype)
    sinks = _draw(2, HEADS * GROUP).to(dtype)
    heads = [
        (_draw(3 + at, count, DIM).to(dtype), _draw(5 + at, count, DIM).to(dtype), _draw(7 + at, count))
        for at, count in enumerate(held)
    ]
    fresh = None
    if tokens > 1:
        fresh = Fresh(_draw(9, HEADS, tokens, DIM).to(dtype), _draw(10, HEADS, tokens, DIM).to(dtype))
    if len(set(held)) == 1:
        keys, values, bias = (torch.stack(each) for each in zip(*heads, strict=True))
        runs = [Run(0, keys, values, bias)]
    else:
        runs = [Run(at, keys[None], values[None], bias[None]) for at, (keys, values, bias) in enumerate(heads)]

    found, _ = attend(queries, runs, fresh, SCALE, window=window, sinks=sinks)

    wanted = _oracle(queries, heads, fresh, window, sinks)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("slots", "tokens"), [(600, 1), (600, 40), (64, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_with_sinks_keeps_to_its_bytes(slots: int, tokens: int, dtype: torch.dtype) -> None:
    """What the explicit path is planned for."""
    layer = LayerShape(HEADS, HEADS * GROUP, DIM, DIM, sinks=True)
    queries, sinks = _draw(1, HEADS * GROUP, tokens, DIM).to(dtype), _draw(2, HEADS * GROUP)
    run = Run(0, _draw(3, HEADS, slots, DIM).to(dtype), _draw(4, HEADS, slots, DIM).to(dtype), _draw(5, HEADS, slots))
    fresh = None
    if tokens > 1:
        fresh = Fresh(_draw(9, HEADS, tokens, DIM).to(dtype), _draw(10, HEADS, tokens, DIM).to(dtype))
    output = queries.numel() * queries.itemsize

    peak = peak_allocated(lambda: attend(queries, [run], fresh, SCALE, sinks=sinks))

    assert peak - output <= explicit_bytes(layer, tokens, slots, queries.itemsize)


def test_a_plan_counts_the_explicit_path_where_there_are_sinks() -> None:
    """A config does not say so: the tested families are known, and the self-check of any other tells."""
    fields = {"num_hidden_layers": 2, "vocab_size": 256, "hidden_size": 256, "num_attention_heads": 8}
    config = AutoConfig.for_model("gpt_oss", **fields)
    shape = hf.describe(config, itemsize=4)
    counted = agentmem.plan(config, cap="1GiB", max_slots=4096, chunk=64, itemsize=4)

    assert not shape.layers[1].sinks
    assert counted.forward_bytes >= explicit_bytes(shape.layers[1], 64, counted.capacity, 4)


def test_sinks_that_no_plan_has_counted_are_refused() -> None:
    """A model whose class passes sinks although its family is known to have none."""
    model = variants.private()
    for layer in model.model.layers:
        attention = layer.self_attn
        original = type(attention).forward

        def forward(*args: Any, own: Any = attention, original: Any = original, **kwargs: Any) -> Any:
            return original(own, *args, s_aux=torch.zeros(4), **kwargs)

        attention.forward = forward
    with agentmem.capped(model, **variants.ROOMY) as memory:
        with pytest.raises(UnsupportedModel, match=r"layer 0 passes attention sinks \(s_aux\)"):
            model(variants.prompt(5), past_key_values=memory)
        for layer in model.model.layers:
            del layer.self_attn.forward
        model(variants.prompt(5), past_key_values=memory)


def test_scores_leave_out_what_the_sinks_took() -> None:
    """Heavy hitters sum real weights: compactions by received attention run on gpt-oss."""
    model = families.model("gpt_oss")
    with tiny.capped("heavy-hitters", model) as memory:
        model.generate(variants.prompt(90), max_new_tokens=12, do_sample=False, past_key_values=memory)
        report = memory.report()

    assert report.num_compactions >= 2
    assert not any(each.faults for each in report.compactions)
