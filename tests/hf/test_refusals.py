"""Misuse is loud: each refusal comes before any forward and names the value, the limit and the remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, T5Config
from transformers.models.t5 import T5ForConditionalGeneration

import agentmem
from agentmem.errors import (
    SettingsRefused,
    UnsupportedGeneration,
    UnsupportedModel,
)
from agentmem.testing import tiny_model
from support import variants

# ---- settings


@pytest.mark.parametrize(("seed", "taken"), [(1 << 64, (1 << 64) - 1), (-(1 << 63) - 1, -(1 << 63))])
def test_a_seed_that_no_generator_takes_is_refused(seed: int, taken: int) -> None:
    """With the value and the limit, where torch would only speak of an overflow; the last before it is taken."""
    model = variants.private()
    with (
        pytest.raises(SettingsRefused, match=rf"^seed: Input should be .+ to {taken} \(got {seed}\)"),
        agentmem.capped(model, cap="1MiB", seed=seed),
    ):
        pass
    with agentmem.wrap(model, cap="4MiB", seed=taken) as memory:
        memory.generate(variants.prompt(5), max_new_tokens=1)


# ---- arguments of generate

MODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "beams": ({"num_beams": 3}, ("num_beams=3", "use num_beams=1")),
    "prompt lookup": ({"prompt_lookup_num_tokens": 4}, ("prompt_lookup_num_tokens=4", "leave it out")),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, ("penalty_alpha=0.6", "use sampling")),
    "DoLa": ({"dola_layers": "low"}, ("dola_layers='low'", "leave it out")),
    "static cache": ({"cache_implementation": "static"}, ("cache_implementation='static'", "leave it out")),
    "guidance": ({"guidance_scale": 1.5}, ("guidance_scale=1.5", "second cache")),
    "no cache": ({"use_cache": False}, ("use_cache=False", "leave use_cache out")),
    "weights": (
        {"output_attentions": True, "return_dict_in_generate": True},
        ("output_attentions=True", "leave it out"),
    ),
    "early exit": ({"assistant_early_exit": 1}, ("assistant_early_exit=1", "leave it out")),
    "multi-token prediction": ({"use_mtp": True}, ("use_mtp=True", "leave it out")),
}
EVERY_MODE = pytest.mark.parametrize(("options", "fragments"), MODES.values(), ids=list(MODES))


@EVERY_MODE
def test_a_mode_is_refused_as_an_argument(options: dict[str, Any], fragments: tuple[str, ...]) -> None:
    """Generation modes that need another kind of cache are refused by name."""
    model = variants.model()
    with agentmem.wrap(model, **variants.ROOMY) as ours, variants.refused(model, UnsupportedGeneration, *fragments):
        ours.generate(variants.prompt(5), max_new_tokens=2, **options)


@pytest.mark.parametrize("place", ["keyword", "position", "model"])
@EVERY_MODE
def test_a_mode_is_refused_in_a_config(options: dict[str, Any], fragments: tuple[str, ...], place: str) -> None:
    """The same modes are refused in a generation config: given by keyword, by position, or the model's own."""
    model = variants.private()
    config = GenerationConfig(max_new_tokens=2)
    for name, value in options.items():
        setattr(config, name, value)
    args: tuple[Any, ...] = (variants.prompt(5),)
    kwargs: dict[str, Any] = {}
    if place == "model":
        model.generation_config, kwargs = config, {"generation_config": GenerationConfig(do_sample=False)}
    elif place == "position":
        args = (*args, config)
    else:
        kwargs = {"generation_config": config}
    with agentmem.wrap(model, **variants.ROOMY) as ours, variants.refused(model, UnsupportedGeneration, *fragments):
        ours.generate(*args, **kwargs)


def test_values_that_change_nothing_are_accepted() -> None:
    """One beam, a guidance of 1 and use_cache=True are no modes."""
    model = variants.model()
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        output = ours.generate(variants.prompt(5), max_new_tokens=2, num_beams=1, guidance_scale=1.0, use_cache=True)

    assert output.sequences.shape == (1, 7)


def test_a_config_with_the_hybrid_cache_of_old_is_accepted() -> None:
    """cache_implementation="hybrid" comes with published Gemma configs, and transformers drops it by itself."""
    model = variants.private("gemma3_text")
    model.generation_config.cache_implementation = "hybrid"
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        assert ours.generate(variants.prompt(5), max_new_tokens=2).sequences.shape == (1, 7)


def test_an_argument_outranks_the_config() -> None:
    """num_beams=1 as an argument makes a config with beams harmless, as in generate itself."""
    model = variants.private()
    model.generation_config.num_beams = 4
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        assert ours.generate(variants.prompt(5), max_new_tokens=2, num_beams=1).sequences.shape == (1, 7)


def test_assisted_decoding_is_refused() -> None:
    """An assistant model is refused."""
    model = variants.model()
    with (
        agentmem.wrap(model, **variants.ROOMY) as ours,
        variants.refused(model, UnsupportedGeneration, "assistant_model=Qwen2ForCausalLM: ", "leave it out"),
    ):
        ours.generate(variants.prompt(5), max_new_tokens=2, assistant_model=variants.model("qwen2"))


def test_a_generation_loop_from_a_repository_is_refused() -> None:
    """A repository's loop manages caches of its own."""
    model = variants.model()
    fragments = ("custom_generate='someone/loop'", "pass a callable")
    with agentmem.wrap(model, **variants.ROOMY) as ours, variants.refused(model, UnsupportedGeneration, *fragments):
        ours.generate(variants.prompt(5), max_new_tokens=2, custom_generate="someone/loop", trust_remote_code=True)


# ---- models


def test_a_model_in_training_is_refused() -> None:
    """Dropout cannot be replayed."""
    model = variants.private().train()
    with variants.refused(model, UnsupportedModel, "training mode", "model.eval()"):
        agentmem.wrap(model, **variants.ROOMY)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, on importing its compiler
@pytest.mark.parametrize("way", ["function", "method"])
def test_a_compiled_model_is_refused(way: str) -> None:
    """A compiled model is refused, whichever way it was compiled (nothing is compiled before the first call)."""
    model = variants.private()
    if way == "function":
        compiled: Any = torch.compile(model)
    else:
        model.compile()
        compiled = model
    with variants.refused(model, UnsupportedModel, "compiled", "pass the uncompiled model"):
        agentmem.wrap(compiled, **variants.ROOMY)


def test_something_that_is_no_model_is_refused() -> None:
    """What has no generate is refused by its type."""
    with pytest.raises(
        UnsupportedModel, match=r"Linear is no transformers causal language model.*AutoModelForCausalLM"
    ):
        agentmem.wrap(torch.nn.Linear(2, 2), **variants.ROOMY)


def test_an_encoder_decoder_is_refused() -> None:
    """T5 is refused by its family."""
    small = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    model = T5ForConditionalGeneration(T5Config(**small)).eval()
    with pytest.raises(UnsupportedModel, match=r"'t5' is not supported; supported are .*llama"):
        agentmem.wrap(model, **variants.ROOMY)


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_oss", "gemma2", "mamba", "qwen3_5_text", "deepseek_v3", "bloom", "mixtral", "gemma3n_text"]
)
def test_a_family_that_no_test_covers_is_refused(family: str) -> None:
    """Learned positions, attention sinks, soft-capping, recurrent state, MLA, ALiBi, KV sharing: refused by name."""
    config = AutoConfig.for_model(family)
    with pytest.raises(UnsupportedModel, match=rf"model_type '{family}' is not supported; supported are .*qwen3"):
        agentmem.plan(config, cap="24MiB")


def test_an_unsupported_model_is_left_as_it_was() -> None:
    """A refused model keeps its attention and its generate."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2)).eval()
    with pytest.raises(UnsupportedModel, match="gpt2"), agentmem.capped(model, cap="24MiB"):
        pass

    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


def test_a_model_around_a_supported_text_model_is_refused() -> None:
    """A multimodal Gemma attends to images in both directions: only its text model is supported."""
    config = AutoConfig.for_model("gemma3")
    with pytest.raises(UnsupportedModel, match="'gemma3' is not supported"):
        agentmem.plan(config, cap="24MiB")


@pytest.mark.parametrize(
    ("family", "change"),
    [("gemma3_text", {"use_bidirectional_attention": True}), ("gemma3_text", {"attn_logit_softcapping": 30.0})],
)
def test_attention_that_is_changed_in_a_supported_family_is_refused(family: Any, change: dict[str, Any]) -> None:
    """Soft-capping and bidirectional attention are refused by name, whatever the family."""
    model = tiny_model(family, **change)
    (name, value), *_ = change.items()
    with variants.refused(model, UnsupportedModel, f"{name}={value!r}"):
        agentmem.wrap(model, **variants.ROOMY)


def test_layers_with_another_state_are_refused() -> None:
    """A supported family whose config asks for layers of another kind is refused by layer."""
    kinds = ["full_attention", "linear_attention"]
    config = AutoConfig.for_model("qwen3", num_hidden_layers=2, layer_types=kinds)
    with pytest.raises(UnsupportedModel, match=r"layer 1 keeps its state in a LinearAttentionLayer"):
        agentmem.plan(config, cap="24MiB")


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}


def test_dynamic_rope_is_refused_where_a_probe_runs() -> None:
    """A probe would meet keys under other frequencies; policies without a probe run."""
    model = tiny_model("llama", **DYNAMIC)
    with variants.refused(model, UnsupportedModel, "rope_type 'dynamic'", "'am-halving'", "without a probe"):
        agentmem.wrap(model, **variants.ROOMY)

    with agentmem.wrap(model, policy="window", **variants.TIGHT) as ours:
        assert ours.generate(variants.prompt(30), max_new_tokens=30).report.num_compactions >= 1
    with agentmem.wrap(model, policy_options={"probe": "live"}, **variants.TIGHT) as ours:
        assert ours.generate(variants.prompt(30), max_new_tokens=30).report.num_compactions >= 1


def test_adapters_that_learn_prompts_are_refused() -> None:
    """A prompt-learning adapter puts keys of its own into the cache; other adapters are looked through."""
    model = variants.private()

    def adapted(prompts: bool) -> Any:
        settings = SimpleNamespace(is_prompt_learning=prompts)
        return SimpleNamespace(get_base_model=lambda: model, active_peft_config=settings)

    with variants.refused(model, UnsupportedModel, "prompt-learning", "merge or disable"):
        agentmem.wrap(adapted(prompts=True), **variants.ROOMY)
    with agentmem.wrap(adapted(prompts=False), **variants.ROOMY) as ours:
        assert ours.generate(variants.prompt(5), max_new_tokens=2).sequences.shape == (1, 7)


# ---- Phi-3


@pytest.fixture
def phi() -> Any:
    """A Phi-3 that switches rope factors, and drops its cache, at 65 ids."""
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10_000.0}
    return tiny_model("phi3", rope_parameters=scaling | {"rope_type": "longrope"}, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (40, {"max_new_tokens": 30}),
        (80, {"max_new_tokens": 5}),
        (40, {"max_length": 80}),
        (60, {}),
        (40, {"generation_config": GenerationConfig(max_new_tokens=30)}),
    ],
    ids=["crossing", "beyond from the start", "max_length", "the default of 20 new tokens", "config"],
)
def test_phi3_is_refused_where_it_would_drop_its_cache(phi: Any, length: int, options: dict[str, Any]) -> None:
    """A run that may pass original_max_position_embeddings is refused with the length that would do."""
    settings = variants.ROOMY | {"policy": "window"}
    with agentmem.wrap(phi, **settings) as ours, variants.refused(phi, UnsupportedGeneration, "65", "at most 64"):
        ours.generate(variants.prompt(length), **options)


def test_phi3_counts_the_probe_and_earlier_turns(phi: Any) -> None:
    """The probe's positions and the conversation so far count towards the switch; below it Phi-3 is stock."""
    stock = phi.generate(variants.prompt(40), max_new_tokens=24, do_sample=False)
    with agentmem.wrap(phi, policy="window", **variants.ROOMY) as ours:
        first = ours.generate(variants.prompt(40), max_new_tokens=24, do_sample=False)
        assert torch.equal(first.sequences, stock)
        longer = torch.cat((first.sequences, variants.prompt(4)), 1)
        new = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 1}
        for ids in (longer, longer[:, 63:]):
            with variants.refused(phi, UnsupportedGeneration, "69 ids", "at most 64"):
                ours.generate(ids, **new)
    with (
        agentmem.wrap(phi, **variants.ROOMY) as ours,
        variants.refused(phi, UnsupportedGeneration, "80 ids (earlier turns and the probe included)"),
    ):
        ours.generate(variants.prompt(40), max_new_tokens=24)


# ---- plans


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rows": 0}, "rows: 0 is no whole number of at least 1"),
        ({"rows": -1}, "rows: -1 is no whole number"),
        ({"rows": "2"}, "rows: '2' is no whole number"),
        ({"itemsize": -1}, "itemsize: -1 is no whole number"),
        ({"model": "a/name"}, "'a/name' is neither a transformers model nor a config; load one with"),
        ({"model": None}, "None is neither a transformers model nor a config"),
    ],
)
def test_a_plan_of_nothing_is_refused(given: dict[str, Any], said: str) -> None:
    """Counts below one, and what is no model."""
    with pytest.raises(agentmem.SettingsRefused, match=said):
        agentmem.plan(**{"model": tiny_model("llama").config, "cap": "24MiB", **given})
