"""Build tiny random models for self-checks; each has the class of a given model and all of its kinds of layers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from agentmem.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

HIDDEN, HEAD, HEADS, INNER, VOCABULARY, RANK, EXPERTS, WINDOW = 64, 16, 4, 48, 128, 16, 4, 24
_UNREAD = ("quantization_config", "_name_or_path", "transformers_version", "architectures", "dtype")
"""Fields of a config that do not affect what a model computes."""
MOST_LAYERS = 8
"""The most layers of a tiny model."""

_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim", "query_pre_attn_scalar"), HEAD),
    **dict.fromkeys(("qk_nope_head_dim", "attention_head_dim", "global_head_dim"), HEAD),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "expert_ffn_hidden_size"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), INNER),
    **dict.fromkeys(
        ("shared_intermediate_size", "dense_intermediate_size", "moe_shared_expert_intermediate_size"), INNER
    ),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input", "laurel_rank"), RANK),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "num_shared_experts", "moe_layer_start_index"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), WINDOW),
}
"""Fields of a config that are sizes, each with the largest value that it has in a tiny model."""
_TOWER: Mapping[str, int] = {
    **_SIZES,
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), HEADS),
    **dict.fromkeys(("out_hidden_size", "embed_dim"), HIDDEN),
}
"""Largest values of sizes in parts of a tiny model that are built but never run, such as vision towers."""


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config of the same class for a tiny model: a few small layers, at least one of each kind of layer."""
    made: Any = copy.deepcopy(config)
    text = made.get_text_config(decoder=True)
    if text is not made:
        return _around(made, text)
    fields = made.to_dict()
    for name in (*_UNREAD, "per_layer_config"):
        fields.pop(name, None)
    fields |= {name: min(size, fields[name]) for name, size in _SIZES.items() if isinstance(fields.get(name), int)}
    fields |= _heads(made, fields) | _layers(made, fields)
    if fields.get("head_dim", HEAD) is None:
        fields["head_dim"] = HEAD
    if isinstance(fields.get("rope_parameters"), dict):
        fields["rope_parameters"] = _rope(fields["rope_parameters"])
    if isinstance(fields.get("initializer_range"), float):
        fields["initializer_range"] = 0.15  # large, so that attention is not uniform
    fields |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return type(config)(**fields)


def _around(config: Any, text: Any) -> PreTrainedConfig:
    """Return a copy of a multimodal model's config with tiny sizes in all parts.

    ``text`` is the part of the config for the text model.
    """
    fields = config.to_dict()
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            fields[name] = tiny_config(text).to_dict() if part is text else _tower(part.to_dict())
    for name in _UNREAD:
        fields.pop(name, None)
    made: PreTrainedConfig = type(config)(**fields)
    return made


def _tower(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the config fields of a part of a multimodal model, such as a vision tower, with all sizes reduced.

    The part is built but never run.
    """
    return fields | {
        name: min(size, fields[name]) for name, size in _TOWER.items() if isinstance(fields.get(name), int)
    }


def _heads(config: Any, fields: Mapping[str, Any]) -> dict[str, int]:
    """Return a tiny model's head counts as config fields; query heads share KV heads only if the original's do."""
    names = config.attribute_map
    asked, held = names.get("num_attention_heads", "num_attention_heads"), "num_key_value_heads"
    heads, stored = config.num_attention_heads, fields.get(held)
    if stored is None:
        return {asked: HEADS}
    return {asked: HEADS, held: HEADS if stored == heads else min(2, stored)}


def _layers(config: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return config fields that keep only the model's first layers, at least 2 and at most 8.

    Within these limits, layers are kept until every kind of layer is included.
    """
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    total = config.num_hidden_layers
    lists = {key: each for key, each in fields.items() if isinstance(each, (list, tuple)) and len(each) == total > 1}
    kinds = [tuple(str(each[layer]) for each in lists.values()) for layer in range(total)]
    count = next(at for at in range(1, total + 1) if set(kinds[:at]) == set(kinds))
    count = min(total, max(2, count), MOST_LAYERS)
    return {name: count} | {key: list(each[:count]) for key, each in lists.items()}


def _rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE parameters with lists, such as ``long_factor``, cut to the length that tiny heads need."""
    return {name: _fitting(name, value) for name, value in parameters.items()}


def _fitting(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _rope(value)
    if name in ("short_factor", "long_factor"):
        return list(value[: HEAD // 2])
    return [2, 3, 3] if name == "mrope_section" else value


def tiny_model(kind: Any, config: PreTrainedConfig, *, seed: int = 0) -> Any:
    """Build a tiny float32 model of the class ``kind`` on the CPU, with random weights made from ``seed``.

    ``config`` is that of the original model. The global random state is not changed.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return kind._from_config(tiny_config(config), dtype=torch.float32, attn_implementation="eager").eval()  # noqa: SLF001


def causal_class(config: PreTrainedConfig) -> Any:
    """Return transformers' class of causal (or image-text-to-text) language models for a config.

    Raises:
        UnsupportedModel: transformers has no such class.

    """
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise UnsupportedModel(
        f"transformers has no causal language model for a {type(config).__name__}; load one with "
        "AutoModelForCausalLM, or its config with AutoConfig"
    )
