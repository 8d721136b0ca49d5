"""The families that are tested, one tiny random model of each, and what every column of docs/models.md runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from agentmem import hf
from agentmem.errors import UnsupportedModel
from agentmem.hf.check_models import causal_class, tiny_model
from agentmem.hf.support import SINKS
from support import tiny, tiny_chat, variants

POSITIONS = 128


class Family(NamedTuple):
    """How it is called, and what a config of it needs besides its defaults."""

    label: str
    fields: Mapping[str, Any] = MappingProxyType({})


_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
_ALTERNATE = ["sliding_attention", "full_attention"]

DENSE = {
    "apertus": Family("Apertus"),
    "arcee": Family("Arcee"),
    "bitnet": Family("BitNet"),
    "cohere": Family("Cohere"),
    "cohere2": Family("Cohere 2"),
    "ernie4_5": Family("Ernie 4.5"),
    "exaone4": Family("Exaone 4"),
    "gemma": Family("Gemma 1"),
    "gemma3_text": Family("Gemma 3 (text)"),
    "glm": Family("GLM"),
    "glm4": Family("GLM 4"),
    "gpt2": Family("GPT-2 (up to its positions)"),
    "gpt_neox": Family("GPT-NeoX, Pythia"),
    "granite": Family("Granite"),
    "granite_swa": Family("Granite with sliding windows and sinks"),
    "helium": Family("Helium"),
    "hunyuan_v1_dense": Family("Hunyuan", _THETA),
    "llama": Family("Llama"),
    "ministral": Family("Ministral", _THETA | {"num_hidden_layers": 2, "layer_types": _ALTERNATE}),
    "ministral3": Family("Ministral 3"),
    "mistral": Family("Mistral", {"sliding_window": None}),
    "nanochat": Family("nanochat"),
    "nemotron": Family("Nemotron (dense)", {"num_key_value_heads": 8}),
    "olmo": Family("OLMo"),
    "olmo2": Family("OLMo 2"),
    "olmo3": Family("OLMo 3"),
    "opt": Family("OPT (up to its positions)"),
    "phi": Family("Phi 1–2"),
    "phi3": Family("Phi-3, Phi-4 (up to Phi-3's rope switch)"),
    "qwen2": Family("Qwen2, Qwen2.5"),
    "qwen3": Family("Qwen3"),
    "seed_oss": Family("Seed-OSS"),
    "smollm3": Family("SmolLM3"),
    "stablelm": Family("StableLM"),
    "starcoder2": Family("StarCoder2"),
}
EXPERTS = {
    "ernie4_5_moe": Family("Ernie 4.5 MoE"),
    "exaone_moe": Family("Exaone MoE"),
    "glm4_moe": Family("GLM 4.5–4.7 MoE"),
    "gpt_oss": Family("gpt-oss (attention sinks)"),
    "granitemoe": Family("Granite MoE"),
    "hunyuan_v1_moe": Family("Hunyuan MoE", _THETA),
    "minimax_m2": Family("MiniMax M2"),
    "mixtral": Family("Mixtral"),
    "olmoe": Family("OLMoE"),
    "phimoe": Family("Phi-MoE (up to its rope switch)"),
    "qwen2_moe": Family("Qwen2-MoE"),
    "qwen3_moe": Family("Qwen3-MoE"),
}
LATENT = {
    "deepseek_v3": Family("DeepSeek V3, R1"),
    "glm4_moe_lite": Family("GLM 4.7 Flash"),
    "minicpm3": Family("MiniCPM3"),
    "youtu": Family("Youtu"),
}
_SECTIONS = {"mrope_section": [16, 24, 24], "rope_type": "default", "rope_theta": 1e6}
_SEEING = {"text_config": {"rope_parameters": _SECTIONS}}
AROUND = {
    "gemma3": Family("Gemma 3 (4B and larger)"),
    "internvl": Family("InternVL"),
    "llava": Family("LLaVA"),
    "mistral3": Family("Mistral Small 3.1 and later"),
    "qwen2_5_vl": Family("Qwen2.5-VL", _SEEING),
    "qwen3_vl": Family("Qwen3-VL", _SEEING),
    "smolvlm": Family("SmolVLM"),
}
TABLE = DENSE | EXPERTS | LATENT | AROUND


@cache
def model(family: str) -> Any:
    """The one tiny model of a family, with 128 positions; leave it as you found it."""
    config = AutoConfig.for_model(family, **TABLE[family].fields)
    text = config.get_text_config(decoder=True)
    setattr(text, text.attribute_map.get("max_position_embeddings", "max_position_embeddings"), POSITIONS)
    return tiny_model(causal_class(config), config)


def checked(family: str) -> hf.CheckReport:
    """Prefill, chunks, decoding, a left-padded batch, ``generate``, and slots and logits after compactions."""
    return hf.check(model(family))


def rebased(family: str) -> str:
    """Run past the last position: "yes", or what re-basing is refused for."""
    try:
        with tiny.capped("window", model(family), rebase=True) as memory:
            logits = tiny.feed(memory, tiny.ids(POSITIONS + 16), 16, model=model(family))
            assert torch.isfinite(logits).all()
            assert memory.report().rebases
            assert memory.memory.sequences[0].next_position < POSITIONS
    except UnsupportedModel as error:
        (why,) = (why for said, why in _WHY.items() if said in str(error))
        return f"refused: {why}"
    return "yes"


_WHY = {
    "have no RoPE": "learned positions",
    "do not turn at all": "layers without RoPE",
    "turn in other pairs": "RoPE in other pairs",
}


def forked_and_saved(family: str, folder: Path) -> None:
    """A fork and a loaded snapshot of a compacted session have its slots and go on as it does."""
    with tiny_chat.runtime(4, on=model(family), policy="am-halving") as made:
        session = made.session()
        session.append("user", "a long way to go and nobody there to ask for it")
        session.generate(max_new_tokens=3, do_sample=False)
        assert session.stats.compactions
        session.save(folder / family)
        fork, loaded = session.fork(), made.load(folder / family)
        kept = tiny_chat.slots(session)
        assert tiny_chat.same(tiny_chat.slots(loaded), kept)
        ends = []
        for each in (fork, loaded, session):
            each.append("user", "and on")
            each.generate(max_new_tokens=2, do_sample=False)
            ends.append((list(each.ids), tiny_chat.slots(each)))
        for ids, slots in ends[:2]:
            assert ids == ends[2][0]
            assert tiny_chat.same(slots, ends[2][1])


def in_bfloat16(family: str) -> tuple[float, float]:
    """How far capped and stock logits of the median token are from those of the same weights in float32."""
    exact = model(family)
    half, ids = copy.deepcopy(exact).bfloat16(), variants.prompt(48, seed=3)
    with torch.no_grad():
        truth = copy.deepcopy(half).float()(ids).logits
        stock = half(ids).logits.double()
        with tiny.capped("window", half, cap=1 << 26, max_slots=64) as memory:
            ours = torch.cat([half(piece, past_key_values=memory).logits for piece in ids.split((16, 16, 15, 1), 1)], 1)
    # the median, since where rounding sends a token to another expert it is far off in either
    ours, stock = ((each.double() - truth).abs().mean(-1).median() for each in (ours, stock))
    return float(ours), float(stock)


def passed(family: str, folder: Path) -> str:
    """Run every column of a family; what the last one says, which may be a refusal."""
    report = checked(family)
    assert report.passed, report.reason
    assert report.sinks == (family in SINKS)
    assert hf.packs(model(family))
    packed = hf.check_packing(model(family))
    assert packed.passed, packed.reason
    forked_and_saved(family, folder)
    ours, stock = in_bfloat16(family)
    assert ours <= 2 * stock
    return rebased(family)
