"""The adapter: positions, pads, foreign forwards, and what would fail silently (transformers' masks, lengths, β)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import agentmem
from agentmem import plugins
from agentmem.contracts import BudgetRequest, Budgets, Policy
from oracles import attention as reference
from support import variants

TOLERANCE = 5e-5
"""Absolute, on float32 logits of magnitude 1 to 10."""


class Lopsided(Budgets):
    """Head 0 of every layer gets three of four slots."""

    head_ceiling = 1.5

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Three quarters and one quarter of every layer's equal share."""
        each = request.total // len(request.held)
        return tuple((min(held[0], each * 3 // 4), each - min(held[0], each * 3 // 4)) for held in request.held)


def lopsided() -> Policy:
    """Attention Matching with unequal heads."""
    halving = plugins.policy("am-halving")
    return Policy("lopsided", "unequal heads", "-", halving.compactor, Lopsided(), halving.queries)


# ---- the model, computed again from what the memory holds


@dataclass(frozen=True)
class Held:
    """What a memory holds of one layer, a :class:`reference.Slots` a head, copied in float64."""

    heads: list[reference.Slots]


def held(memory: agentmem.CappedCache) -> list[Held]:
    """Keys, values and β of every layer of row 0."""
    layers = []
    for store in memory.memory.sequences[0].stores:
        assert store is not None
        segments = [store.segment(head, 0, 0) for head in range(2)]
        layers.append(
            Held([reference.Slots(each.keys.double(), each.values.double(), each.bias.double()) for each in segments])
        )
    return layers


def rotate(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``states [h, q, d]``, float64, base 10,000 (arXiv:2104.09864)."""
    half = states.shape[-1] // 2
    angles = positions[:, None].double() / 10_000.0 ** (torch.arange(half).double() / half)
    cos, sin = angles.cos(), angles.sin()
    left, right = states[..., :half], states[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def recomputed(model: Any, layers: list[Held], ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits ``[q, vocabulary]`` of a tiny Llama over the slots held, in float64: nothing of the package runs."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    hidden = weights["model.embed_tokens.weight"][ids]
    tokens = len(ids)

    def norm(name: str, states: torch.Tensor) -> torch.Tensor:
        return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[name]

    def linear(name: str, states: torch.Tensor) -> torch.Tensor:
        return states @ weights[f"{name}.weight"].T

    for index, layer in enumerate(layers):
        at = f"model.layers.{index}"
        states = norm(f"{at}.input_layernorm.weight", hidden)
        q, k, v = (linear(f"{at}.self_attn.{name}_proj", states).view(tokens, -1, 16).transpose(0, 1) for name in "qkv")
        q, k = rotate(q, positions), rotate(k, positions)
        fresh = [reference.Slots(k[head], v[head]) for head in range(2)]
        mixed = reference.attention(q, layer.heads, fresh, 16**-0.5).output.transpose(0, 1).reshape(tokens, -1)
        hidden = hidden + linear(f"{at}.self_attn.o_proj", mixed)
        states = norm(f"{at}.post_attention_layernorm.weight", hidden)
        gate = torch.nn.functional.silu(linear(f"{at}.mlp.gate_proj", states))
        hidden = hidden + linear(f"{at}.mlp.down_proj", gate * linear(f"{at}.mlp.up_proj", states))
    return linear("lm_head", norm("model.norm.weight", hidden))


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("policy", ["am-halving", lopsided()], ids=["equal heads", "unequal heads"])
def test_logits_after_compactions_are_those_of_the_slots_held(policy: str | Policy, tokens: int) -> None:
    """A forward over compacted slots gives what plain mathematics over their K, V and β gives: no β is lost."""
    model, ids = variants.model(), variants.prompt(100)[0]
    with torch.no_grad(), agentmem.capped(model, policy=policy, **variants.TIGHT) as memory:
        model(ids[None, : 100 - tokens], past_key_values=memory, logits_to_keep=1)
        memory.compact()
        before = held(memory)
        biases = torch.cat([head.bias for layer in before for head in layer.heads if head.bias is not None])
        ours = model(ids[None, 100 - tokens :], past_key_values=memory).logits[0]

    assert memory.report().num_compactions >= 2
    assert biases.abs().max() > 0.1
    expected = recomputed(model, before, ids[100 - tokens :], torch.arange(100 - tokens, 100))
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=TOLERANCE)


def test_the_recomputation_is_the_model() -> None:
    """Without any memory the plain mathematics gives stock's logits: the oracle itself is right."""
    model, ids = variants.model(), variants.prompt(30)[0]
    nothing = [Held([reference.Slots(torch.zeros(0, 16).double(), torch.zeros(0, 16).double())] * 2)] * 2

    with torch.no_grad():
        stock = model(ids[None]).logits[0]

    torch.testing.assert_close(
        recomputed(model, nothing, ids, torch.arange(30)), stock.double(), rtol=0, atol=TOLERANCE
    )


# ---- positions


def spied_positions(model: Any, run: Callable[[], object]) -> list[list[list[int]]]:
    """The position ids of every forward of ``run`` that reaches the rotary embedding."""
    seen: list[list[list[int]]] = []
    handle = model.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs.get("position_ids", args[-1])).tolist()), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    return seen


def test_positions_go_on_after_a_compaction() -> None:
    """New tokens take the next position, however many slots are left; every slot knows the position it came from."""
    model, ids = variants.model(), variants.prompt(50)
    with agentmem.capped(model, policy="window", **variants.TIGHT) as memory:
        places = spied_positions(model, lambda: model.generate(ids, max_new_tokens=30, past_key_values=memory))
        row = memory.memory.sequences[0]
        row.stores[0].settle(torch.tensor(row.tail.tolist(), dtype=torch.int32))  # type: ignore[union-attr]
        head = row.stores[0].segment(0, 0, 0)  # type: ignore[union-attr]

    assert memory.report().num_compactions == 2
    assert [place for forward in places for place in forward[0]] == list(range(79))
    assert row.next_position == 79
    assert head.positions[:4].tolist() == [0, 1, 2, 3]
    assert head.positions[4:].tolist() == list(range(79 - len(head.positions) + 4, 79))


def test_a_probe_stands_at_the_following_positions() -> None:
    """A replay runs at the positions after the newest token and leaves the memory's own positions alone."""
    model, ids = variants.model(), variants.prompt(30)
    with torch.no_grad(), agentmem.capped(model, **variants.TIGHT) as memory:
        model(ids, past_key_values=memory, logits_to_keep=1)
        places = spied_positions(model, memory.compact)
        seen, columns = memory.memory.sequences[0].next_position, memory.get_seq_length()

    assert places == [[list(range(30, 30 + memory.plan.probe_tokens))]]
    assert (seen, columns) == (30, 30)


def test_custom_positions_are_kept() -> None:
    """Positions that a caller chooses reach the rotary embedding and the slots, and equal stock's logits."""
    model, ids = variants.model(), variants.prompt(20)
    places = torch.cat((torch.arange(12), torch.arange(100, 108)))[None]
    with torch.no_grad():
        stock = model(ids, position_ids=places, past_key_values=DynamicCache(config=model.config)).logits
        with agentmem.capped(model, **variants.ROOMY) as memory:
            first = model(ids[:, :12], position_ids=places[:, :12], past_key_values=memory).logits
            second = model(ids[:, 12:], position_ids=places[:, 12:], past_key_values=memory).logits
            following = memory.memory.sequences[0].next_position

    torch.testing.assert_close(torch.cat((first, second), 1), stock, rtol=0, atol=TOLERANCE)
    assert following == 108


def test_the_sequence_length_counts_columns_and_not_slots() -> None:
    """After compactions get_seq_length is every column seen, so that a next turn feeds only what is new."""
    model, ids = variants.model(), variants.prompt(90)
    with torch.no_grad(), agentmem.capped(model, policy="window", **variants.TIGHT) as memory:
        model(ids, past_key_values=memory, logits_to_keep=1)
        assert memory.get_seq_length() == 90
        assert memory.usage().total_slots < 90 * 4
        longer = torch.cat((ids, variants.prompt(3, seed=7)), 1)
        places = spied_positions(model, lambda: model.generate(longer, max_new_tokens=1, past_key_values=memory))

    assert places == [[[90, 91, 92]]]


# ---- pads


def padded(ids: torch.Tensor, before: Sequence[int], after: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with pads around them, and their mask."""
    width = max(b + ids.shape[1] + a for b, a in zip(before, after, strict=True))
    tokens = torch.zeros(len(before), width, dtype=torch.long)
    for row, start in enumerate(before):
        tokens[row, start : start + ids.shape[1]] = ids[row]
    return tokens, (tokens != 0).long()


def test_pads_are_not_stored() -> None:
    """Left, right and interior pads take no slot, and real tokens get stock's logits."""
    model, ids = variants.model(), variants.prompt(10, rows=3)
    tokens, mask = padded(ids, before=(4, 0, 2), after=(0, 4, 2))
    mask[1, 5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        stock = model(tokens, attention_mask=mask, position_ids=places).logits
        with agentmem.capped(model, **variants.ROOMY) as memory:
            ours = model(tokens, attention_mask=mask, position_ids=places, past_key_values=memory).logits
            rows = [row.seen for row in memory.memory.sequences]
            total_slots = memory.usage().total_slots
            columns = memory.get_seq_length()

    real = mask.bool()
    torch.testing.assert_close(ours[real], stock[real], rtol=0, atol=TOLERANCE)
    assert rows == [10, 9, 10]
    assert total_slots == (10 + 9 + 10) * 4
    assert columns == 14


def test_a_row_of_pads_alone_is_finite() -> None:
    """A forward in which one row has only pads gives it no slot and no NaN."""
    model, ids = variants.model(), variants.prompt(6, rows=2)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    with torch.no_grad(), agentmem.capped(model, **variants.ROOMY) as memory:
        logits = model(ids, attention_mask=mask, past_key_values=memory).logits
        assert [row.held for row in memory.memory.sequences] == [24, 0]

    assert torch.isfinite(logits).all()


# ---- what would fail silently


def test_the_mask_is_registered_with_the_attention() -> None:
    """Every attention name of ours has a mask of ours: with the attention alone sdpa would get no mask at all."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        name = model.config._attn_implementation
        model.generate(variants.prompt(5), max_new_tokens=2, past_key_values=memory)

    assert name == "agentmem_sdpa"
    assert name in AttentionInterface._global_mapping
    assert name in AttentionMaskInterface._global_mapping


def test_an_attention_that_is_changed_in_the_block_is_noticed() -> None:
    """A model whose attention implementation is swapped under a memory is refused instead of forgetting the past."""
    model = variants.private()
    model.set_attn_implementation("eager")
    with torch.no_grad(), agentmem.capped(model, **variants.ROOMY) as memory:
        model(variants.prompt(8), past_key_values=memory)
        model.set_attn_implementation("sdpa")
        with pytest.raises(agentmem.UnsupportedModel, match=r"0 of 2 layers.*attention implementation"):
            model(variants.prompt(1), past_key_values=memory)
        assert memory.get_seq_length() == 8


def test_autocast_keeps_working() -> None:
    """Under autocast keys and values come in different dtypes: tokens equal stock's, and slots have autocast's."""
    model, ids = variants.model(), variants.prompt(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = variants.greedy(model, ids, 10)
        with agentmem.capped(model, **variants.ROOMY) as memory:
            ours = variants.greedy(model, ids, 10, past_key_values=memory)
            store = memory.memory.sequences[0].stores[0]
        with agentmem.capped(model, **variants.TIGHT) as tight:
            model.generate(ids, max_new_tokens=30, past_key_values=tight)

    assert torch.equal(ours.sequences, stock.sequences)
    # Linear layers round to bfloat16, 2^-8 of logits up to 10, a few times over.
    torch.testing.assert_close(variants.steps(ours), variants.steps(stock), rtol=0, atol=0.25)
    assert store is not None
    assert store.spec.dtype == torch.bfloat16
    assert tight.report().num_compactions >= 2


@pytest.mark.parametrize("policy", variants.POLICIES)
def test_a_memory_born_under_inference_mode_is_written_outside_it(policy: str) -> None:
    """Storage allocated under inference_mode takes tokens and compactions outside it, and the other way round."""
    model, ids = variants.model(), variants.prompt(60)
    with agentmem.capped(model, policy=policy, **variants.TIGHT) as memory:
        for start in range(0, 60, 15):
            with torch.inference_mode() if start % 2 == 0 else torch.no_grad():
                model(ids[:, start : start + 15], past_key_values=memory)

    assert memory.report().num_compactions == 2
    assert not any(report.faults for report in memory.compactions)


def test_gradients_do_not_reach_the_slots() -> None:
    """A forward with gradients enabled stores plain tensors."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model(variants.prompt(8), past_key_values=memory)
        stores = [store for store in memory.memory.sequences[0].stores if store is not None]

        assert not any(store.keys.requires_grad or store.values.requires_grad for store in stores)


# ---- faults in a forward


def test_a_forward_that_fails_between_two_layers_leaves_nothing_behind() -> None:
    """An exception in the second layer takes back what the first appended; the next forward is none the worse."""
    model, ids = variants.private(), variants.prompt(20)
    with torch.no_grad():
        stock = model(ids).logits
        with agentmem.capped(model, **variants.ROOMY) as memory:
            first = model(ids[:, :12], past_key_values=memory).logits
            handle = model.model.layers[1].register_forward_pre_hook(_explode)
            with pytest.raises(RuntimeError, match="power cut"):
                model(ids[:, 12:], past_key_values=memory)
            handle.remove()
            assert (memory.get_seq_length(), memory.usage().total_slots) == (12, 12 * 4)
            second = model(ids[:, 12:], past_key_values=memory).logits

    torch.testing.assert_close(torch.cat((first, second), 1), stock, rtol=0, atol=TOLERANCE)


def test_an_interrupt_between_two_layers_leaves_nothing_behind() -> None:
    """Ctrl-C, which torch's hooks do not see, is taken back too, and a foreign forward right after it is stock's."""
    model, ids = variants.private(), variants.prompt(20)
    mask = torch.ones_like(ids)
    stock = variants.foreign(model, ids, mask)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), agentmem.capped(model, **variants.ROOMY) as memory:
        model(ids[:, :12], past_key_values=memory)
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 12:], past_key_values=memory)
        handle.remove()
        between = variants.foreign(model, ids, mask)
        model(ids[:, 12:], past_key_values=memory)
        seen = memory.memory.sequences[0].seen, memory.get_seq_length(), memory.usage().total_slots

    assert torch.equal(between, stock)
    assert seen == (20, 20, 80)


def _explode(*_: object) -> None:
    raise RuntimeError("power cut")
