"""Refuse models that cannot be capped, and read the shapes (heads and dims) of the others from their configs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils.chat_template_utils import get_json_schema

from agentmem.errors import SettingsRefused, UnsupportedModel
from agentmem.planning.model_shape import LayerShape, ModelShape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

COVERED = frozenset(
    (
        "apertus",
        "arcee",
        "bitnet",
        "cohere",
        "cohere2",
        "deepseek_v3",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "gemma",
        "gemma3",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granite_swa",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "internvl",
        "llama",
        "llava",
        "minicpm3",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mistral3",
        "mixtral",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_5_vl",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen3_vl",
        "seed_oss",
        "smollm3",
        "smolvlm",
        "stablelm",
        "starcoder2",
        "youtu",
    )
)
"""Values of ``config.model_type`` that the package's tests cover; others get a self-check at their first use."""
SINKS = frozenset(("gpt_oss", "granite_swa"))
"""Values of ``config.model_type`` in :data:`COVERED` whose attention has sinks."""

_CHANGES = {
    "attn_logit_softcapping": "soft-caps the logits of attention",
    "use_bidirectional_attention": "lets tokens attend to later ones",
    "alibi": "adds a bias of the distance to the logits of attention (ALiBi)",
    "add_cross_attention": "attends to the states of another model as well",
}
"""Fields of a config that, if set, change attention in a way that is not handled, with descriptions."""

_STATES = {
    "LinearAttentionLayer": "a recurrent or convolution state, which has no slots to compact",
    "LinearAttentionAndFullAttentionLayer": "attention's slots beside a recurrent state",
    "LinearAttentionAndSlidingWindowAttentionLayer": "attention's slots beside a recurrent state",
    "DynamicIndexedLayer": "the keys of an indexer beside attention's, which chooses what is attended to",
    "DummyLayer": "no slots: it has no attention, or shares the keys and values of another layer",
}
"""Cache layers of transformers that are not handled, with descriptions of what they hold."""


def text_model(model: object) -> PreTrainedModel:
    """Return the causal language model to attach to: the base model of a PEFT model, or ``model`` itself.

    Raises:
        UnsupportedModel: the model is no transformers causal language model, is compiled or in training mode, or has a
            prompt-learning adapter.

    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(inner).__name__
    _refuse_compiled(inner)
    if not hasattr(inner, "generate") or not hasattr(inner, "get_decoder") or not hasattr(inner, "config"):
        raise UnsupportedModel(f"{name} is no transformers causal language model; load one with AutoModelForCausalLM")
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:  # type: ignore[attr-defined]
        raise UnsupportedModel(
            "prompt-learning adapters put their own keys into the cache; merge or disable the adapter"
        )
    refuse_training(inner)
    refuse_training(inner.get_decoder())
    return inner  # type: ignore[no-any-return]  # its methods were checked above


def _refuse_compiled(model: Any) -> None:
    """Refuse a compiled model, or a model with a compiled module that contains an attention layer."""
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModel(
            f"{type(model).__name__} is compiled, which freezes the attention call; pass the uncompiled model"
        )
    for path, module in model.named_modules() if hasattr(model, "named_modules") else ():
        if _is_compiled(module) and any(hasattr(each, "layer_idx") for each in module.modules()):
            raise UnsupportedModel(
                f"{type(module).__name__} ({path or 'the model'}) is compiled, which freezes the attention call; pass "
                "the uncompiled model"
            )


def refuse_training(model: Any) -> None:
    """Check that a model, or a part of it, is not in training mode.

    Raises:
        UnsupportedModel: it is in training mode.

    """
    if model.training:
        raise UnsupportedModel(
            f"{type(model).__name__} is in training mode, whose dropout no replay can repeat; call model.eval() first"
        )


def _is_compiled(module: Any) -> bool:
    forward = getattr(module, "forward", None)
    replaced = hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)
    return replaced or hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def input_device(model: Any) -> torch.device:
    """Return the device to which the ids for a model must be moved.

    This is where accelerate runs the embeddings if it dispatched the model, and otherwise the embeddings' own device.
    """
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    devices = [getattr(each, "execution_device", None) for each in (hook, *getattr(hook, "hooks", ()))]
    found = next((device for device in devices if device is not None), None)
    if found is not None:
        return torch.device(found)
    device: torch.device = embeddings.weight.device
    return device


def check_tokenizer(tokenizer: object) -> None:
    """Check that an object is a tokenizer.

    Raises:
        SettingsRefused: the object is no tokenizer, but for example a tokenizer's name.

    """
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab") or not hasattr(tokenizer, "decode"):
        raise SettingsRefused(
            f"tokenizer={tokenizer!r} is no tokenizer; load the model's own with AutoTokenizer.from_pretrained"
        )


def check_tool(tool: object) -> None:
    """Check that chat templates can use an object as a tool.

    Raises:
        SettingsRefused: the tool is neither a JSON schema nor a function from which transformers can make a schema.

    """
    if isinstance(tool, dict):
        return
    if not inspect.isroutine(tool):
        raise SettingsRefused(f"tools: {tool!r} is neither a JSON schema (a dict) nor a function; give one of the two")
    try:
        get_json_schema(tool)
    except Exception as error:  # transformers has its own for docstrings and for annotations
        raise SettingsRefused(
            f"tools: no schema can be made of {tool!r}: {error}; annotate its arguments and describe it and each of "
            "them in a docstring of Google's style, or give a JSON schema"
        ) from error


def describe(config: PreTrainedConfig, *, itemsize: int, fused: bool = True) -> ModelShape:
    """Read the shape of a model from its config: the heads, dims and window of each layer, and the model's sizes.

    ``itemsize`` is the number of bytes per element; ``fused`` is true if attention has a fused path on the model's
    device.

    Raises:
        UnsupportedModel: the model has a part that cannot be capped; the message names the part.

    """
    if not hasattr(config, "get_text_config"):
        raise UnsupportedModel(
            f"{config!r:.80} is neither a transformers model nor a config; load one with AutoModelForCausalLM, or its "
            "config with AutoConfig"
        )
    text = config.get_text_config(decoder=True)
    _refuse_changes(config, text)
    layers = tuple(_layer(*each) for each in zip(*_kinds(text), strict=True))
    return ModelShape(
        name=str(getattr(config, "_name_or_path", "") or config.model_type),
        layers=layers,
        itemsize=itemsize,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        fused=fused,
        positions=getattr(text, "max_position_embeddings", None),
    )


def _refuse_changes(config: PreTrainedConfig, text: Any) -> None:
    """Refuse a config whose attention is not plain causal self-attention."""
    family = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"model_type {family!r} is an encoder and a decoder, which attends to the encoder's states as well; only "
            "decoders alone are handled"
        )
    for name, change in _CHANGES.items():
        if value := getattr(text, name, None):
            raise UnsupportedModel(
                f"{name}={value!r} of model_type {family!r} {change}, which is not handled; docs/models.md lists "
                "families that are"
            )
    if not getattr(text, "num_attention_heads", None) or not getattr(text, "hidden_size", None):
        raise UnsupportedModel(
            f"model_type {family!r} has no num_attention_heads or no hidden_size, so it is no model whose attention "
            "keeps keys and values; docs/models.md lists families that are handled"
        )


def _kinds(text: Any) -> tuple[Sequence[Any], Sequence[int | None]]:
    """Return the configs and the sliding windows of all layers; a window of ``None`` is full attention.

    Raises:
        UnsupportedModel: some layer has neither full nor sliding-window attention.

    """
    configs = list(getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers)
    try:
        layers = DynamicCache(config=text).layers
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModel(
            f"model_type {text.model_type!r} has no cache of transformers' own kinds of layers ({error!r:.200}); "
            "docs/models.md lists families that are handled"
        ) from error
    types = getattr(text, "layer_types", None) or [""] * len(layers)
    return configs, [_window(*each) for each in zip(layers, types, range(len(layers)), strict=True)]


def _layer(config: Any, window: int | None) -> LayerShape:
    """Return the shape of one layer: its KV and query heads, the dims of keys and values, and its window."""
    heads, held = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if getattr(config, "kv_lora_rank", None) and getattr(config, "qk_rope_head_dim", None):
        # MLA: transformers caches the keys and values of every head, not their common latent
        return LayerShape(heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim, window)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LayerShape(held or heads, heads, dim, getattr(config, "v_head_dim", None) or dim, window)


def _window(layer: object, kind: str, index: int) -> int | None:
    if kind in ("chunked_attention", "reference_sliding_attention"):
        raise UnsupportedModel(
            f"layer {index} has {kind}, whose tokens do not all see the same number before them; only full and "
            "sliding-window attention are handled"
        )
    if type(layer) is DynamicLayer:
        return None
    if type(layer) is DynamicSlidingWindowLayer:
        return int(layer.sliding_window)
    name = type(layer).__name__
    raise UnsupportedModel(
        f"layer {index} keeps its state in a {name} ({_STATES.get(name, 'not slots alone')}); only full and "
        "sliding-window attention are handled"
    )


def refuse_probe(config: PreTrainedConfig, policy: str) -> None:
    """Refuse to probe a model whose RoPE has the type ``dynamic``.

    The frequencies of such RoPE change with the largest position in a forward, so a probe would not be exact.

    Raises:
        UnsupportedModel: the model has such RoPE; the message names ``policy``, whose probe is refused.

    """
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "rope_parameters", None) or {}
    nested = [kinds] if "rope_type" in kinds else [kind for kind in kinds.values() if isinstance(kind, dict)]
    if any(kind.get("rope_type") == "dynamic" for kind in nested):
        raise UnsupportedModel(
            f"rope_type 'dynamic' changes frequencies with the largest position, so the probe of {policy!r} is not "
            "exact; use a policy without a probe (window, heavy-hitters) or probe='live'"
        )


def refuse_scratch(shape: ModelShape, policy: str) -> None:
    """Refuse a policy that lets a model with sliding windows write texts during a compaction.

    The text's slots would have to be removed again, but slots that they pushed out of a window are lost.

    Raises:
        UnsupportedModel: the model has layers with a sliding window.

    """
    if len(shape.compactable) < len(shape.layers):
        raise UnsupportedModel(
            f"{shape.name} has sliding-window layers, so what the model writes for "
            f"'self-study' or a summary of policy {policy!r} could not be taken back; choose another probe, such as "
            "replay+spread"
        )


def end_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the end-of-text ids in the model's generation config; empty if there are none."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)
