"""What re-basing reads out of a model: frequencies, and keys that arrive where the model itself would put them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from agentmem.errors import UnsupportedModel
from agentmem.hf import describe
from agentmem.hf.capture import reading
from agentmem.hf.rope import refuse_rebase, rotations
from agentmem.memory.rotation import shift_keys
from agentmem.testing import Family, tiny_model
from oracles.rope import frequencies

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}
LONG = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 1024}
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3")
LOCAL: dict[str, Any] = {"rope_type": "default", "rope_theta": 500.0}
"""Of the sliding layers of Gemma 3; the other layers have another."""


def model_of(family: Family, rope: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with that RoPE: of Gemma 3 in its full layers, of Phi-3 in half of a key's dims."""
    parameters: dict[str, Any] = dict(ROPES[rope])
    if family == "gemma3_text":
        parameters = {"full_attention": parameters, "sliding_attention": dict(LOCAL)}
    if family == "phi3":
        parameters["partial_rotary_factor"] = 0.5
    return tiny_model(family, dtype=dtype, rope_parameters=parameters)


CASES: list[tuple[Family, str]] = [(family, rope) for family in FAMILIES for rope in ROPES]
CASES += [("gemma3_text", rope) for rope in ROPES] + [("phi3", "default")]


def stored(model: Any, positions: list[int]) -> list[torch.Tensor]:
    """Every layer's keys ``[H, n, d]`` of one and the same token, read alone at each of the positions.

    A token alone attends to itself, so that nothing but the rotation of its key depends on where it is.
    """
    windows = [layer.window for layer in describe(model.config, itemsize=4).layers]
    with reading(model, windows) as reader:
        reads = [reader.read(torch.tensor([7]), start=position).layers for position in positions]
    return [torch.cat([layers[index].keys for layers in reads], dim=1) for index in range(len(windows))]


BEFORE = [0, 1, 3, 40, 900, 4000, 4001, 60_000, 131_071]
AFTER = [0, 0, 2000, 20, 890, 17, 131_000, 500, 3]


def errors_in_units(model: Any) -> list[torch.Tensor]:
    """Per layer, how far shifted keys are from those of the model's own forward, in the dtype's unit times the pair."""
    before, after = torch.tensor(BEFORE, dtype=torch.int32), torch.tensor(AFTER, dtype=torch.int32)
    found = []
    for keys, expected, rotation in zip(stored(model, BEFORE), stored(model, AFTER), rotations(model), strict=True):
        for head in keys:
            shift_keys(head, before, after - before, rotation)
        norms = torch.hypot(*expected.double()[..., : rotation.width].chunk(2, dim=-1)).repeat(1, 1, 2)
        error = (keys.double() - expected.double()).abs()
        assert torch.equal(keys[..., rotation.width :], expected[..., rotation.width :])
        found.append(error[..., : rotation.width] / norms / torch.finfo(keys.dtype).eps)
    return found


# A stored key costs a unit each for cosine and sine (computed in float32, times the attention factor, cast), half a
# unit for each product and for the sum, of |low| + |high| ≤ √2 pairs; there are two of them, and the shift is a third.
UNITS = 3 * 2 * math.sqrt(2)


@pytest.mark.parametrize(("family", "rope"), CASES)
def test_a_shifted_key_is_the_one_of_a_forward_there(family: Family, rope: str) -> None:
    """In every layer and in either direction, with no error that grows with the position."""
    for units in errors_in_units(model_of(family, rope)):
        assert units.max() <= UNITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_half_precision_costs_its_own_roundings_only(family: Family, dtype: torch.dtype) -> None:
    """The same bound in units of the shorter dtype."""
    for units in errors_in_units(model_of(family, "default", dtype)):
        assert units.max() <= UNITS


@pytest.mark.parametrize(("family", "rope"), CASES)
def test_frequencies_are_those_of_the_papers(family: Family, rope: str) -> None:
    """To the float32 in which models compute them; width and layer types are respected."""
    model = model_of(family, rope)
    width = 8 if family == "phi3" else 16
    kinds = model.config.layer_types if family == "gemma3_text" else ["full_attention"] * 2

    for rotation, kind in zip(rotations(model), kinds, strict=True):
        wanted = LOCAL if kind == "sliding_attention" else ROPES[rope]
        expected = torch.tensor(frequencies(width, wanted), dtype=torch.float64)
        assert rotation.width == width
        # The exponent is rounded before the power is taken, which ln(theta) multiplies; a few operations follow.
        bound = (math.log(wanted["rope_theta"]) + 8) * torch.finfo(torch.float32).eps
        assert ((rotation.frequencies - expected).abs() <= bound * expected).all()


def test_the_ropes_of_the_table_differ() -> None:
    """No two have the same frequencies, and YaRN and Llama 3 neither leave all pairs alone nor slow all down alike."""
    found = {name: frequencies(16, rope) for name, rope in ROPES.items()}
    plain = {name: frequencies(16, rope | {"rope_type": "default"}) for name, rope in ROPES.items()}
    slowed = {name: {round(a / b, 6) for a, b in zip(plain[name], found[name], strict=True)} for name in ROPES}

    assert len(set(map(tuple, found.values()))) == len(ROPES)
    assert slowed["linear"] == {4.0}
    assert {1.0, 4.0} < slowed["yarn"]
    assert {1.0, 8.0} < slowed["llama3"]


def test_layers_of_a_type_share_one_rotation() -> None:
    """Each layer gets its own type's, and a type's frequencies are kept once."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model("gemma3_text", num_hidden_layers=3, layer_types=kinds)

    found = rotations(model)

    assert found[0] is found[2]
    assert not torch.equal(found[0].frequencies, found[1].frequencies)
    assert found[0].frequencies.dtype == torch.float64


def test_a_model_that_was_cast_whole_turns_by_its_rounded_frequencies() -> None:
    """``model.to(bfloat16)`` rounds the frequencies too; the rotation has what the model now multiplies by."""
    model = model_of("llama", "default").to(torch.bfloat16)
    exact = torch.tensor(frequencies(16, ROPES["default"]), dtype=torch.float64)

    found = rotations(model)[0].frequencies

    assert torch.equal(found, exact.to(torch.bfloat16).double())
    assert not torch.allclose(found, exact, rtol=1e-4)
    assert max(units.max() for units in errors_in_units(model)) <= UNITS


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ("llama", {"rope_parameters": LONG | {"rope_type": "longrope", "factor": 4.0}}, "'longrope'"),
        ("phi3", {"rope_parameters": LONG | {"rope_type": "longrope"}, "head_dim": 16}, "'longrope'"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}},
            "full_attention layers of 'gemma3_text' have rope_type 'dynamic'",
        ),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "not known here"),
        ("gpt2", {"n_positions": 4096}, "the layers of 'gpt2' have no RoPE"),
    ],
)
def test_ropes_that_do_not_hold_still_are_refused(family: str, fields: dict[str, Any], message: str) -> None:
    """By the name of the rope_type, with what re-basing handles and what to do instead."""
    base: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096}
    if family == "phi3":
        base["original_max_position_embeddings"] = 1024
    config = AutoConfig.for_model(family, **(base | fields))

    with pytest.raises(UnsupportedModel, match=message) as refusal:
        refuse_rebase(config)

    assert "default, linear, llama3, yarn" in str(refusal.value)
    assert "Leave re-basing off and end before position 4096" in str(refusal.value)


def test_only_layer_types_in_use_are_asked() -> None:
    """What a configuration says of layers that the model does not have is of no account."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    parameters = {"full_attention": dict(ROPES["default"]), "sliding_attention": dynamic}
    both, full = (
        AutoConfig.for_model("gemma3_text", num_hidden_layers=2, layer_types=kinds, rope_parameters=parameters)
        for kinds in (["sliding_attention", "full_attention"], ["full_attention"] * 2)
    )

    refuse_rebase(full)
    with pytest.raises(UnsupportedModel, match="sliding_attention layers"):
        refuse_rebase(both)


@pytest.mark.parametrize("rope", ROPES)
def test_a_model_is_refused_by_its_own_configuration(rope: str) -> None:
    """``rotations`` refuses what ``refuse_rebase`` refuses, and nothing that holds still."""
    model = model_of("llama", rope)
    assert len(rotations(model)) == 2

    model.config.rope_parameters["rope_type"] = "dynamic"

    with pytest.raises(UnsupportedModel, match="dynamic"):
        rotations(model)


def test_a_rotary_module_without_frequencies_is_refused() -> None:
    """A model on the meta device, or one whose rotary module was replaced, has nothing to read."""
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModel, match="no tensor 'inv_freq' at hand"):
        rotations(tiny_model("llama").to("meta"))

    model.get_decoder().rotary_emb = torch.nn.Identity()

    with pytest.raises(UnsupportedModel, match=r"LlamaModel\.rotary_emb has no tensor 'inv_freq'"):
        rotations(model)
