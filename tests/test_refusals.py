"""Misuse is loud: each refusal comes before any forward and names the value, the limit and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import variants
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, T5Config
from transformers.models.t5 import T5ForConditionalGeneration

import agentmem
from agentmem.errors import (
    AgentmemError,
    CapBypassed,
    CapTooSmall,
    MemoryCapExceeded,
    MemoryClosed,
    MemoryUnused,
    PromptMismatch,
    SettingsRefused,
    UnknownPolicy,
    UnsupportedGeneration,
    UnsupportedModel,
)
from agentmem.testing import tiny_model


@contextmanager
def no_layer_runs(model: Any) -> Iterator[None]:
    """Fail if any decoder layer of ``model`` is entered in the block."""
    entered: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, index=index: entered.append(index))
        for index, layer in enumerate(model.get_decoder().layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert entered == []


@contextmanager
def refused(model: Any, error: type[AgentmemError], *fragments: str) -> Iterator[None]:
    """The block raises exactly that error, its message has the fragments in order, and no layer ran."""
    with no_layer_runs(model), pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, fragments))) as caught:
        yield
    assert caught.type is error


# ---- arguments of generate

MODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "beams": ({"num_beams": 3}, ("num_beams=3", "use num_beams=1")),
    "prompt lookup": ({"prompt_lookup_num_tokens": 4}, ("prompt_lookup_num_tokens=4", "leave it out")),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, ("penalty_alpha=0.6", "use sampling")),
    "DoLa": ({"dola_layers": "low"}, ("dola_layers='low'", "leave it out")),
    "static cache": ({"cache_implementation": "static"}, ("cache_implementation='static'", "leave it out")),
    "guidance": ({"guidance_scale": 1.5}, ("guidance_scale=1.5", "second cache")),
    "no cache": ({"use_cache": False}, ("use_cache=False", "leave use_cache out")),
    "weights": ({"output_attentions": True, "return_dict_in_generate": True}, ("output_attentions=True", "leave it out")),
    "early exit": ({"assistant_early_exit": 1}, ("assistant_early_exit=1", "leave it out")),
    "multi-token prediction": ({"use_mtp": True}, ("use_mtp=True", "leave it out")),
}
EVERY_MODE = pytest.mark.parametrize(("options", "fragments"), MODES.values(), ids=list(MODES))


@EVERY_MODE
def test_a_mode_is_refused_as_an_argument(options: dict[str, Any], fragments: tuple[str, ...]) -> None:
    """Generation modes that need another kind of cache are refused by name."""
    model = variants.model()
    with agentmem.wrap(model, **variants.ROOMY) as ours, refused(model, UnsupportedGeneration, *fragments):
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
    with agentmem.wrap(model, **variants.ROOMY) as ours, refused(model, UnsupportedGeneration, *fragments):
        ours.generate(*args, **kwargs)


def test_values_that_change_nothing_are_accepted() -> None:
    """One beam, a guidance of 1 and use_cache=True are no modes."""
    model = variants.model()
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        output = ours.generate(variants.prompt(5), max_new_tokens=2, num_beams=1, guidance_scale=1.0, use_cache=True)

    assert output.sequences.shape == (1, 7)


def test_an_argument_outranks_the_config() -> None:
    """num_beams=1 as an argument makes a config with beams harmless, as in generate itself."""
    model = variants.private()
    model.generation_config.num_beams = 4
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        assert ours.generate(variants.prompt(5), max_new_tokens=2, num_beams=1).sequences.shape == (1, 7)


def test_assisted_decoding_is_refused() -> None:
    """An assistant model is refused."""
    model = variants.model()
    with agentmem.wrap(model, **variants.ROOMY) as ours, refused(model, UnsupportedGeneration, "assistant_model", "leave it out"):
        ours.generate(variants.prompt(5), max_new_tokens=2, assistant_model=variants.model("qwen2"))


def test_a_generation_loop_from_a_repository_is_refused() -> None:
    """A repository's loop manages caches of its own."""
    model = variants.model()
    fragments = ("custom_generate='someone/loop'", "pass a callable")
    with agentmem.wrap(model, **variants.ROOMY) as ours, refused(model, UnsupportedGeneration, *fragments):
        ours.generate(variants.prompt(5), max_new_tokens=2, custom_generate="someone/loop", trust_remote_code=True)


# ---- models


def test_a_model_in_training_is_refused() -> None:
    """Dropout cannot be replayed."""
    model = variants.private().train()
    with refused(model, UnsupportedModel, "training mode", "model.eval()"):
        agentmem.wrap(model, **variants.ROOMY)


@pytest.mark.parametrize("way", ["function", "method"])
def test_a_compiled_model_is_refused(way: str) -> None:
    """A compiled model is refused, whichever way it was compiled (nothing is compiled before the first call)."""
    model = variants.private()
    if way == "function":
        compiled: Any = torch.compile(model)
    else:
        model.compile()
        compiled = model
    with refused(model, UnsupportedModel, "compiled", "pass the uncompiled model"):
        agentmem.wrap(compiled, **variants.ROOMY)


def test_something_that_is_no_model_is_refused() -> None:
    """What has no generate is refused by its type."""
    with pytest.raises(UnsupportedModel, match=r"Linear is no transformers causal language model.*AutoModelForCausalLM"):
        agentmem.wrap(torch.nn.Linear(2, 2), **variants.ROOMY)


def test_an_encoder_decoder_is_refused() -> None:
    """T5 is refused by its family."""
    small = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    model = T5ForConditionalGeneration(T5Config(**small)).eval()
    with pytest.raises(UnsupportedModel, match=r"'t5' is not supported; supported are .*llama"):
        agentmem.wrap(model, **variants.ROOMY)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "intermediate_size": 32}


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_oss", "gemma2", "mamba", "qwen3_5_text", "deepseek_v3", "bloom", "mixtral", "gemma3n_text"]
)
def test_a_family_that_no_test_covers_is_refused(family: str) -> None:
    """Learned positions, attention sinks, soft-capping, recurrent state, MLA, ALiBi, KV sharing: refused by name."""
    config = AutoConfig.for_model(family)
    with pytest.raises(UnsupportedModel, match=rf"model_type '{family}' is not supported; supported are .*qwen3"):
        agentmem.plan(config, "24MiB")


def test_an_unsupported_model_is_left_as_it_was() -> None:
    """A refused model keeps its attention and its generate."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2)).eval()
    with pytest.raises(UnsupportedModel, match="gpt2"), agentmem.capped(model, "24MiB"):
        pass

    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


def test_a_model_around_a_supported_text_model_is_refused() -> None:
    """A multimodal Gemma attends to images in both directions: only its text model is supported."""
    config = AutoConfig.for_model("gemma3")
    with pytest.raises(UnsupportedModel, match="'gemma3' is not supported"):
        agentmem.plan(config, "24MiB")


@pytest.mark.parametrize(
    ("family", "change"),
    [("gemma3_text", {"use_bidirectional_attention": True}), ("gemma3_text", {"attn_logit_softcapping": 30.0})],
)
def test_attention_that_is_changed_in_a_supported_family_is_refused(family: Any, change: dict[str, Any]) -> None:
    """Soft-capping and bidirectional attention are refused by name, whatever the family."""
    model = tiny_model(family, **change)
    (name, value), *_ = change.items()
    with refused(model, UnsupportedModel, f"{name}={value!r}"):
        agentmem.wrap(model, **variants.ROOMY)


def test_layers_with_another_state_are_refused() -> None:
    """A supported family whose config asks for layers of another kind is refused by layer."""
    config = AutoConfig.for_model("llama", **SMALL, layer_types=["full_attention", "chunked_attention"], attention_chunk_size=8)
    with pytest.raises(UnsupportedModel, match=r"layer 1|chunked_attention"):
        agentmem.plan(config, "24MiB")


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}


def test_dynamic_rope_is_refused_where_a_probe_runs() -> None:
    """A probe would meet keys under other frequencies; policies without a probe run."""
    model = tiny_model("llama", **DYNAMIC)
    with refused(model, UnsupportedModel, "rope_type 'dynamic'", "'am-halving'", "without a probe"):
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

    with refused(model, UnsupportedModel, "prompt-learning", "merge or disable"):
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
    with agentmem.wrap(phi, **settings) as ours, refused(phi, UnsupportedGeneration, "65", "at most 64"):
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
            with refused(phi, UnsupportedGeneration, "69 ids", "at most 64"):
                ours.generate(ids, **new)
    with agentmem.wrap(phi, **variants.ROOMY) as ours, refused(phi, UnsupportedGeneration, "80 ids (probe included)"):
        ours.generate(variants.prompt(40), max_new_tokens=24)


# ---- prompts


def test_a_prompt_that_departs_from_the_conversation_is_refused() -> None:
    """A changed past is refused with the place where it departs."""
    model, ids = variants.model(), variants.prompt(10)
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        longer = torch.cat((ours.generate(ids, max_new_tokens=5).sequences, variants.prompt(3)), 1)
        longer[0, 4] = 127 - longer[0, 4]
        with refused(model, PromptMismatch, "row 0", "token 4 of 14", "open a new memory"):
            ours.generate(longer, max_new_tokens=2)
        with refused(model, PromptMismatch, "token 4 of 14"):
            ours.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=2)


def test_a_prompt_that_is_not_longer_is_refused() -> None:
    """New tokens without a mask over everything, and the very same prompt, are refused: HF would feed nothing or too much."""
    model, ids = variants.model(), variants.prompt(10)
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        ours.generate(ids, max_new_tokens=5)
        for short in (ids, variants.prompt(3)):
            fragments = (f"has {short.shape[1]} column(s)", "has seen 14", "whole conversation")
            with refused(model, PromptMismatch, *fragments):
                ours.generate(short, max_new_tokens=2)


def test_another_batch_size_is_refused() -> None:
    """A memory serves the batch that it began with, through generate and through a forward."""
    model, ids = variants.model(), variants.prompt(10, rows=2)
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model.generate(ids, max_new_tokens=5, past_key_values=memory)
        with refused(model, PromptMismatch, "holds 2 row(s), the prompt makes 3"):
            model.generate(variants.prompt(20, rows=3), max_new_tokens=2, past_key_values=memory)
        with refused(model, UnsupportedGeneration, "batch of 1", "2"):
            model(ids[:1], past_key_values=memory)


def test_a_mask_of_another_length_is_refused() -> None:
    """A mask that covers neither the prompt nor everything is refused."""
    model, ids = variants.model(), variants.prompt(10)
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        longer = torch.cat((ours.generate(ids, max_new_tokens=5).sequences, variants.prompt(3)), 1)
        with refused(model, PromptMismatch, "attention_mask", "17", "18"):
            ours.generate(longer, attention_mask=torch.ones(1, 17, dtype=torch.long), max_new_tokens=2)


def test_embeddings_cannot_be_replayed() -> None:
    """inputs_embeds with a policy that replays is refused with what would do."""
    model = variants.model()
    embeds = model.get_input_embeddings()(variants.prompt(5)).detach()
    fragments = ("inputs_embeds have no token ids", "'am-halving'", "probe='live'")
    with agentmem.wrap(model, **variants.ROOMY) as ours, refused(model, UnsupportedGeneration, *fragments):
        ours.generate(inputs_embeds=embeds, max_new_tokens=2)


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 5, 5), {"full_attention": torch.ones(1, 1, 5, 5)}], ids=["4-D", "dict"])
@pytest.mark.parametrize("keep", [0, 1])
def test_prepared_masks_are_refused(mask: Any, keep: int) -> None:
    """Masks that say who sees whom cannot be combined with slots that are no columns."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        with refused(model, UnsupportedGeneration, "2-D [batch, columns]"):
            model(variants.prompt(5), attention_mask=mask, past_key_values=memory, logits_to_keep=keep)
        model(variants.prompt(5), past_key_values=memory)


def test_a_forward_beyond_the_chunk_that_cannot_be_cut_is_refused() -> None:
    """Logits of every position are wanted: at most a chunk at once."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        with refused(model, MemoryCapExceeded, "17 tokens", "at most 16", "logits_to_keep=1"):
            model(variants.prompt(17), past_key_values=memory)
        assert model(variants.prompt(16), past_key_values=memory).logits.shape[1] == 16


# ---- the memory's own life


def test_a_memory_that_no_forward_used_is_an_error() -> None:
    """Forgetting past_key_values is noticed at the end of the block, unless the block failed by itself."""
    model = variants.model()
    with pytest.raises(MemoryUnused, match="past_key_values=memory"), agentmem.capped(model, **variants.ROOMY):
        pass
    with pytest.raises(ZeroDivisionError), agentmem.capped(model, **variants.ROOMY):
        _ = 1 / 0


def test_a_cache_beside_the_memory_is_an_error() -> None:
    """generate and a plain forward without past_key_values would grow a cache outside the cap."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        for bypass in (
            lambda: model.generate(variants.prompt(5), max_new_tokens=2),
            lambda: model.generate(variants.prompt(5), GenerationConfig(max_new_tokens=2), past_key_values=None),
            lambda: model(variants.prompt(5)),
            lambda: model(input_ids=variants.prompt(5), use_cache=True),
            lambda: model.get_decoder()(variants.prompt(5)),
        ):
            with refused(model, CapBypassed, "past_key_values=memory", "use_cache=False"):
                bypass()
        model.generate(variants.prompt(5), max_new_tokens=2, use_cache=False)
        model.generate(variants.prompt(5), GenerationConfig(max_new_tokens=2, use_cache=False))
        model(variants.prompt(5), use_cache=False)
        model(variants.prompt(5), past_key_values=DynamicCache(config=model.config))
        model(variants.prompt(5), past_key_values=memory)


def test_a_closed_memory_is_refused() -> None:
    """After its block a memory serves neither generate nor a forward, attached or not; its report stays."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model.generate(variants.prompt(5), max_new_tokens=2, past_key_values=memory)
    for _ in range(2):
        with refused_midway(MemoryClosed):
            model.generate(variants.prompt(9), max_new_tokens=2, past_key_values=memory)
        with refused_midway(MemoryClosed):
            model(variants.prompt(2), past_key_values=memory)
    with agentmem.capped(model, **variants.ROOMY) as other:
        with refused(model, MemoryClosed, "agentmem.capped"):
            model.generate(variants.prompt(9), max_new_tokens=2, past_key_values=memory)
        with refused(model, MemoryClosed, "agentmem.capped"):
            model(variants.prompt(2), past_key_values=memory)
        model(variants.prompt(2), past_key_values=other)
    with pytest.raises(MemoryClosed):
        memory.compact()

    assert memory.report().num_new_tokens >= 1


@contextmanager
def refused_midway(error: type[AgentmemError]) -> Iterator[None]:
    """The block raises that error; a model without our hooks may have entered its first layer by then."""
    with pytest.raises(error):
        yield


@pytest.mark.parametrize("attached", [False, True])
def test_a_memory_of_another_model_is_refused(attached: bool) -> None:
    """A memory passed to a model that it was not opened for is refused, even if that model has one of its own."""
    model, other = variants.model(), variants.private()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model(variants.prompt(4), past_key_values=memory)
        if attached:
            with agentmem.wrap(other, **variants.ROOMY):
                with refused(other, UnsupportedGeneration, "not opened for", "agentmem.capped"):
                    other(variants.prompt(4), past_key_values=memory)
                with refused(other, UnsupportedGeneration, "not opened for", "agentmem.capped"):
                    other.generate(variants.prompt(9), max_new_tokens=2, past_key_values=memory)
        else:
            with pytest.raises(UnsupportedGeneration, match="not opened for"):
                other(variants.prompt(4), past_key_values=memory)
        assert memory.get_seq_length() == 4


def test_a_memory_takes_nothing_back() -> None:
    """crop, beams, repeated and selected rows and reset are refused with what to do instead."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model(variants.prompt(4), past_key_values=memory)
        for call, fragment in (
            (lambda: memory.crop(2), "greedy decoding or sampling"),
            (memory.activate_past_recording, "greedy decoding or sampling"),
            (lambda: memory.reorder_cache(torch.tensor([0])), "num_beams=1"),  # type: ignore[arg-type]
            (lambda: memory.batch_repeat_interleave(2), "batch the prompt"),
            (lambda: memory.batch_select_indices(torch.tensor([0])), "open a new memory"),
            (memory.reset, "open a new memory"),
        ):
            with refused(model, UnsupportedGeneration, fragment):
                call()

    assert not memory.is_croppable
    assert not memory.is_compileable


# ---- settings


def test_an_unknown_policy_gets_a_suggestion() -> None:
    """A misspelt policy is refused with the nearest name."""
    model = variants.model()
    with refused(model, UnknownPolicy, "'am-halfing' is unknown", "did you mean 'am-halving'"):
        agentmem.wrap(model, cap="1MiB", policy="am-halfing")


def test_unknown_settings_are_refused() -> None:
    """A misspelt setting is refused with its name and all that there are."""
    model = variants.model()
    with refused(model, SettingsRefused, "keep_last", "keep_recent"):
        agentmem.wrap(model, cap="1MiB", keep_last=3)


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"cap": "lots"}, ("cannot read 'lots'", "24MiB")),
        ({"cap": 0}, ("0 is not positive",)),
        ({"cap": "1MiB", "target": 1.5}, ("target", "1.5", "between 0 and 1")),
        ({"cap": "1MiB", "mode": "often"}, ("mode", "often")),
        ({"cap": "1MiB", "max_slots": 20}, ("max_slots: 20 is below",)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], fragments: tuple[str, ...]) -> None:
    """Each is refused with the field and the value."""
    model = variants.model()
    with refused(model, SettingsRefused, *fragments):
        agentmem.wrap(model, **settings)


def test_a_cap_that_is_too_small_says_what_would_do() -> None:
    """The cap named in the refusal is accepted, one byte less is not; more rows are refused at their first forward."""
    model = variants.model()
    with refused(model, CapTooSmall, "4.0 KiB", "too small", "raise cap") as _, agentmem.capped(model, "4KiB", chunk=16):
        pass
    with pytest.raises(CapTooSmall) as caught:
        agentmem.plan(model, "4KiB", chunk=16)
    enough = int(re.search(r"need (\d+) bytes", str(caught.value))[1])  # type: ignore[index]

    assert agentmem.plan(model, enough, chunk=16).cap_bytes == enough
    with pytest.raises(CapTooSmall):
        agentmem.plan(model, enough - 1, chunk=16)
    with agentmem.wrap(model, cap=enough, chunk=16) as ours, refused(model, CapTooSmall, "3 row(s)"):
        ours.generate(variants.prompt(5, rows=3), max_new_tokens=2)


def test_a_full_memory_that_never_compacts_is_an_error() -> None:
    """The policy "full", and mode="off", raise when the slots are used up and say why."""
    model = variants.model()
    for settings, why in (({"policy": "full"}, "never compacts"), ({"mode": "off"}, "mode='off'")):
        with agentmem.wrap(model, **variants.TIGHT, **settings) as ours:  # type: ignore[arg-type]
            with pytest.raises(MemoryCapExceeded, match=f"40 of 40 slots.*{why}.*raise cap"):
                ours.generate(variants.prompt(30), max_new_tokens=30)
            assert ours.memory.get_seq_length() == 40


def test_a_memory_of_ones_own_is_refused_by_a_wrapped_model() -> None:
    """wrap(...).generate brings its own past_key_values."""
    model = variants.model()
    with agentmem.wrap(model, **variants.ROOMY) as ours, refused(model, SettingsRefused, "past_key_values", "agentmem.capped"):
        ours.generate(variants.prompt(5), past_key_values=DynamicCache(config=model.config))


def test_a_repeat_probe_needs_a_tokenizer() -> None:
    """probe="repeat" has an instruction to tokenize."""
    model = variants.model()
    with refused(model, SettingsRefused, "probe='repeat'", "tokenizer=", "probe='replay'"):
        agentmem.wrap(model, cap="1MiB", policy_options={"probe": "repeat"})
