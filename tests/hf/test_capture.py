"""Reading a text while watching attention, and the name of a model's weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from agentmem.calibration import Terms
from agentmem.calibration.windows import Window
from agentmem.contracts import Compaction, HeadCompaction
from agentmem.errors import UnsupportedModel
from agentmem.hf import describe
from agentmem.hf.capture import attended, reading
from agentmem.hf.fingerprint import fingerprint
from agentmem.hf.forward_context import FRAME
from agentmem.testing import Family, tiny_model

FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
TERMS = Terms(context=48, ahead=16, keep_first=4, keep_recent=8)


def windows_of(model: Any) -> list[int | None]:
    """The sliding window of every layer."""
    return [layer.window for layer in describe(model.config, itemsize=4).layers]


def ids(count: int) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_reads_as_the_model_does(family: Family) -> None:
    """In one piece and in two, over sliding windows too, the logits are those of the model's own forward."""
    model = tiny_model(family, sliding_window=24) if family == "mistral" else tiny_model(family)
    text = ids(64)
    with torch.no_grad():
        expected = model(input_ids=text[None], use_cache=False).logits[0]
    with reading(model, windows_of(model)) as reader:
        whole = reader.read(text, logits=True)
        parts = reader.read(text[40:], start=40, past=reader.read(text[:40]).layers, logits=True)

    assert whole.logits is not None
    assert parts.logits is not None
    torch.testing.assert_close(whole.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.logits, expected[40:], rtol=1e-4, atol=1e-4)


def test_reading_leaves_the_model_as_it_was() -> None:
    """Gradients are wanted of the same parameters as before, attention has its name, no forward is in progress."""
    model = tiny_model("llama")
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    name = model.config._attn_implementation
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with reading(model, [None, None]) as reader:
        reader.read(ids(8), logits=True, gradient=True)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with pytest.raises(IndexError):
            reader.read(torch.tensor([1000]))

    assert [parameter.requires_grad for parameter in model.parameters()] == [
        parameter is not frozen for parameter in model.parameters()
    ]
    assert model.config._attn_implementation == name
    assert FRAME.get() is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_reader_needs_every_layer() -> None:
    """Where some layer's attention does not come by, the reading is refused."""
    model = tiny_model("llama")

    with pytest.raises(UnsupportedModel, match="2 of 3 layers"), reading(model, [None] * 3) as reader:
        reader.read(ids(8))


def test_gradients_of_attention_outputs_are_right() -> None:
    """The gradient of a loss for a layer's attention output predicts what a small change of its values does."""
    model = tiny_model("llama", dtype=torch.float64)
    text, direction = ids(24), torch.randn(2, 16, 16, dtype=torch.float64)
    with reading(model, [None, None]) as reader:
        context = reader.read(text[:16])
        ahead = reader.read(text[16:], start=16, past=context.layers, logits=True, gradient=True)
        assert ahead.logits is not None
        (gradient,) = torch.autograd.grad(ahead.logits[:, 5].sum(), [ahead.layers[0].output])
        layer = context.layers[0]
        step = 1e-4
        moved = replace(layer, values=layer.values + step * direction)
        other = reader.read(text[16:], start=16, past=[moved, context.layers[1]], logits=True)
        assert other.logits is not None
        asked = ahead.layers[0]
        change = attended(asked.queries, asked.keys, asked.values, moved, asked.scale) - asked.output

    measured = float((other.logits - ahead.logits.detach())[:, 5].sum())
    assert measured == pytest.approx(float((gradient * change).detach().sum()), rel=0.02)


def test_hidden_slots_are_gone_and_bias_weighs() -> None:
    """Attention over a context compacted in place is attention over the kept slots with their β, in plain loops."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_model("llama")
    with reading(model, [None, None]) as reader:
        window = Window(reader, ids(64), TERMS)
        kept = [torch.tensor([1, 7, 30]), torch.tensor([0, 35])]
        bias = [torch.randn(len(each), generator=generator) for each in kept]
        values = [torch.randn(len(each), 16, generator=generator) for each in kept]
        heads = tuple(HeadCompaction(*each) for each in zip(kept, bias, values, strict=True))
        past = window.compacted(1, Compaction(heads))
        asked = window.untouched.layers[1]
        output = attended(asked.queries, asked.keys, asked.values, past, asked.scale)
        context = window.context.layers[1]

    for query, position in itertools.product(range(4), (0, 9)):
        head = query // 2
        pinned = [*range(4), *range(40, 48)]
        slots = [(context.keys[head, at], context.values[head, at], 0.0) for at in pinned]
        slots += [
            (context.keys[head, 4 + int(at)], value, float(beta))
            for at, value, beta in zip(kept[head], values[head], bias[head], strict=True)
        ]
        slots += [(asked.keys[head, at], asked.values[head, at], 0.0) for at in range(position + 1)]
        asking = asked.queries[query, position].double()
        mass = [math.exp(float(asking @ key.double()) * asked.scale + beta) for key, _, beta in slots]
        expected = sum(part * value.double() for part, (_, value, _) in zip(mass, slots, strict=True)) / sum(mass)
        torch.testing.assert_close(output[query, position].double(), expected, rtol=1e-4, atol=1e-4)


# ---- fingerprints


def test_a_fingerprint_knows_weights_and_not_their_precision() -> None:
    """Float32 and bfloat16 loads agree; another seed, another size and one changed layer do not."""
    model = tiny_model("llama")
    name = fingerprint(model)
    other = tiny_model("llama")
    with torch.no_grad():
        other.get_decoder().layers[1].self_attn.k_proj.weight.mul_(1.5)

    assert name == fingerprint(tiny_model("llama")) == fingerprint(tiny_model("llama").to(torch.bfloat16))
    assert len({name, *map(fingerprint, (tiny_model("llama", seed=1), tiny_model("qwen2"), other))}) == 4
