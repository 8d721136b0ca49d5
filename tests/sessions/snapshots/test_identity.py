"""Whose keys a snapshot holds: another model is refused by the part in which it differs, equal weights or not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload

from agentmem.errors import AgentmemError, SnapshotRefused
from agentmem.hf.model_identity import MAX_PART, model_identity, weights
from agentmem.sessions import Runtime
from agentmem.testing import tiny_model
from support import families, tiny_chat

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LAYERS = ["full_attention", "sliding_attention"]


def runtime(model: Any, template: str | None = None) -> Runtime:
    """A runtime with room for two sessions; its model is freshly made, so that it can be changed."""
    speaks = tiny_chat.tokenizer() if template is None else tiny_chat.tokenizer(template)
    cap = 2 * tiny_chat.lease(on=model)
    return Runtime(model, speaks, cap=cap, policy="am-halving", share=0.5, **tiny_chat.SETTINGS)


def saved(model: Any, folder: Path) -> None:
    """A session of a model, as a snapshot."""
    with runtime(model) as made:
        tiny_chat.filled(made, 40).save(folder)


def with_adapter(seed: int = 0, *, active: bool = True) -> Any:
    """The usual model with a LoRA adapter of random weights."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(tiny_model("llama"), config).eval()
    if not active:
        adapted.base_model.disable_adapter_layers()
    return adapted


def changed(change: Callable[[Any], object]) -> Any:
    """The usual model, changed after it was made."""
    made = tiny_model("llama")
    with torch.no_grad():
        change(made)
    return made


def _other_eps(model: Any) -> None:
    model.get_decoder().layers[1].input_layernorm.variance_epsilon = 1e-3


def _other_frequencies(model: Any) -> None:
    model.get_decoder().rotary_emb.inv_freq.mul_(0.5)


def _one_row(model: Any) -> None:
    model.get_input_embeddings().weight[77] += 1.0


def _rounded(model: Any) -> None:
    model.model.layers[1].to(torch.bfloat16).to(torch.float32)


def _router(model: Any) -> Any:
    return model.model.layers[1].mlp.gate


def of_family(family: str, change: Callable[[Any], object] = lambda _model: None, **fields: Any) -> Any:
    """A family's tiny model with other fields in its config, or changed after it was made."""
    usual = families.model(family)
    config = copy.deepcopy(usual.config)
    for name, value in fields.items():
        setattr(config, name, value)
    made = type(usual)(config).eval()
    made.load_state_dict(usual.state_dict())
    with torch.no_grad():
        change(made)
    return made


def offloaded(seed: int) -> Any:
    """The usual model, whose weights accelerate fetches before they are used."""
    return cpu_offload(tiny_model("llama", seed=seed), execution_device=torch.device("cpu"))


def fetched(name: str) -> Any:
    """The usual model, one module of which fetches its weight by hooks that are not accelerate's."""
    model = tiny_model("llama")
    module = model.get_submodule(name)
    kept = module.weight
    away = torch.nn.Parameter(kept.to("meta"))
    module.weight = away
    module.register_forward_pre_hook(lambda module, _: setattr(module, "weight", kept))
    module.register_forward_hook(lambda module, *_: setattr(module, "weight", away))
    return model


OTHERS: dict[str, tuple[str, Callable[[], Any], Callable[[], Any]]] = {
    "rope theta": (
        r"rope: .*10000\.0.* there, and .*20000\.0.* here",
        lambda: tiny_model("llama"),
        lambda: tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 20000.0}),
    ),
    "rope scaling": (
        "rope: .*default.* there, and .*linear.* here",
        lambda: tiny_model("llama"),
        lambda: tiny_model("llama", rope_parameters=LINEAR),
    ),
    "yarn": ("rope: .*yarn", lambda: tiny_model("llama", rope_parameters=YARN), lambda: tiny_model("llama")),
    "frequencies": ("rope: .* #.* there", lambda: tiny_model("llama"), lambda: changed(_other_frequencies)),
    "eps": (
        "norms: 5 x 1e-06 there, and 5 x 1e-05 here",
        lambda: tiny_model("llama"),
        lambda: tiny_model("llama", rms_norm_eps=1e-5),
    ),
    "eps of one layer": ("norms: .*0.001.* here", lambda: tiny_model("llama"), lambda: changed(_other_eps)),
    "window": (
        "windows: 2 x 64 there, and 2 x 96 here",
        lambda: tiny_model("mistral", sliding_window=64),
        lambda: tiny_model("mistral", sliding_window=96),
    ),
    "layer types": (
        "windows: 32, full there, and full, 32 here",
        lambda: tiny_model("gemma3_text"),
        lambda: tiny_model("gemma3_text", layer_types=LAYERS),
    ),
    "scale": (
        r"arithmetic: logits x \(2 x 0\.25\).*there.*0\.125",
        lambda: tiny_model("gemma3_text"),
        lambda: tiny_model("gemma3_text", query_pre_attn_scalar=64),
    ),
    "activation": (
        "arithmetic: .*silu.*gelu",
        lambda: tiny_model("llama"),
        lambda: tiny_model("llama", hidden_act="gelu"),
    ),
    "dtype": (
        "dtype: float32 there, and bfloat16 here",
        lambda: tiny_model("llama"),
        lambda: tiny_model("llama", dtype=torch.bfloat16),
    ),
    "an adapter": ("adapters: none there, and default #", lambda: tiny_model("llama"), with_adapter),
    "an adapter's weights": ("adapters: default #.*default #", with_adapter, lambda: with_adapter(1)),
    "an adapter that was active": ("adapters: default #.*none", with_adapter, lambda: with_adapter(active=False)),
    "weights": ("weights: ", lambda: tiny_model("llama"), lambda: tiny_model("llama", seed=1)),
    "a layer that was rounded": ("weights: ", lambda: tiny_model("llama"), lambda: changed(_rounded)),
    "a layer in bfloat16": (
        "dtype: float32 there, and float32, weights .*9 x bfloat16.* here",
        lambda: tiny_model("llama"),
        lambda: changed(lambda model: model.model.layers[1].to(torch.bfloat16)),
    ),
    "offloaded weights": ("weights: ", lambda: offloaded(0), lambda: offloaded(1)),
    "a saved buffer": (
        "weights: ",
        lambda: of_family("deepseek_v3"),
        lambda: of_family("deepseek_v3", lambda model: _router(model).e_score_correction_bias.fill_(0.5)),
    ),
    "embedding multiplier": (
        "config: .*there, and .*embedding_multiplier 3,.* here",
        lambda: of_family("granite"),
        lambda: of_family("granite", embedding_multiplier=3.0),
    ),
    "residual multiplier": (
        "config: .*there, and .*residual_multiplier 0.5.* here",
        lambda: of_family("granite"),
        lambda: of_family("granite", residual_multiplier=0.5),
    ),
    "experts of a token": (
        "config: .*num_experts_per_tok 1.* here",
        lambda: of_family("mixtral"),
        lambda: of_family("mixtral", num_experts_per_tok=1),
    ),
    "weights of experts": (
        "config: .*norm_topk_prob true.* here",
        lambda: of_family("qwen3_moe"),
        lambda: of_family("qwen3_moe", norm_topk_prob=True),
    ),
    "clipped keys": (
        "config: .*clip_qkv 0.05.* here",
        lambda: of_family("olmo"),
        lambda: of_family("olmo", clip_qkv=0.05),
    ),
    "one row of the embeddings": ("weights: ", lambda: tiny_model("llama"), lambda: changed(_one_row)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_model_is_refused_by_the_part_that_differs(kind: str, tmp_path: Path) -> None:
    """The refusal names the part with both values, in a bounded text; the model that it was saved with loads it."""
    said, one, other = OTHERS[kind]
    saved(one(), tmp_path)

    with runtime(other()) as made, pytest.raises(SnapshotRefused, match=f"is of another {said}") as raised:
        made.load(tmp_path)
    assert len(str(raised.value)) < 2 * MAX_PART + 400
    with runtime(one()) as made:
        assert made.load(tmp_path).stats.tokens == 40


def test_another_chat_template_is_refused_by_its_name(tmp_path: Path) -> None:
    """The same vocabulary with another template is another chat template, and not another tokenizer."""
    saved(tiny_model("llama"), tmp_path)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"

    with (
        runtime(tiny_model("llama"), template) as made,
        pytest.raises(SnapshotRefused, match="another chat template: "),
    ):
        made.load(tmp_path)


def test_an_adapter_that_is_not_active_does_not_matter(tmp_path: Path) -> None:
    """Keys that a model made without adapters are those of the model that has one and does not use it."""
    saved(tiny_model("llama"), tmp_path)

    with runtime(with_adapter(active=False)) as made:
        assert made.load(tmp_path).stats.tokens == 40


def test_a_model_that_has_changed_is_told_when_it_is_saved(tmp_path: Path) -> None:
    """What the session's keys are of is what counted when it began: a save after a change names the part."""
    model = with_adapter()
    with runtime(model) as made:
        session = tiny_chat.filled(made, 30)
        fork = session.fork()
        model.base_model.disable_adapter_layers()
        for each in (session, fork):
            with pytest.raises(AgentmemError, match=r"cannot be saved: its adapters was default #\w+ .* is none now"):
                each.save(tmp_path)
        assert list(tmp_path.iterdir()) == []
        later = made.session()
        later.save(tmp_path)  # it has read nothing yet
        model.base_model.enable_adapter_layers()
        session.save(tmp_path)


def test_weights_that_change_under_a_runtime_are_told_when_it_saves(tmp_path: Path) -> None:
    """The digest of all weights is made again when a sample of them has changed."""
    model = tiny_model("llama")
    with runtime(model) as made, torch.no_grad():
        session = tiny_chat.filled(made, 30)
        model.get_decoder().layers[0].mlp.up_proj.weight.mul_(2.0)
        with pytest.raises(AgentmemError, match=r"cannot be saved: its weights was \w+ when it began and is \w+ now"):
            session.save(tmp_path)


@pytest.mark.parametrize("disk", [False, True])
def test_offloaded_weights_are_those_of_the_same_model(disk: bool, tmp_path: Path) -> None:
    """A snapshot of a model in memory is loaded by the same model offloaded to memory or disk, and by no other."""
    saved(tiny_model("llama"), tmp_path / "one")

    def away(seed: int) -> Any:
        model = tiny_model("llama", seed=seed)
        if not disk:
            return cpu_offload(model, execution_device=torch.device("cpu"))
        return disk_offload(model, tmp_path / f"weights {seed}", execution_device=torch.device("cpu"))

    with runtime(away(0)) as made:
        assert made.load(tmp_path / "one").stats.tokens == 40
    with runtime(away(1)) as made, pytest.raises(SnapshotRefused, match="of another weights"):
        made.load(tmp_path / "one")


def test_weights_that_cannot_be_read_refuse_a_snapshot_by_their_name(tmp_path: Path) -> None:
    """Sessions of a model with a loader of its own run; saving and loading name the weight that nobody can tell."""
    saved(tiny_model("llama"), tmp_path)
    said = r"cannot be saved or loaded: layers\.1\.mlp\.up_proj\.weight is on the meta device"

    with runtime(fetched("model.layers.1.mlp.up_proj")) as made:
        session = tiny_chat.filled(made, 30)
        tiny_chat.on(session, 2)
        with pytest.raises(SnapshotRefused, match=said):
            session.save(tmp_path / "other")
        with pytest.raises(SnapshotRefused, match=said):
            made.load(tmp_path)


@pytest.mark.parametrize(
    "field", [("_name_or_path", "other"), ("use_cache", False), ("pad_token_id", 3), ("rms_norm_eps", 9.99999997e-07)]
)
def test_fields_that_cannot_change_keys_do_not_matter(field: tuple[str, Any]) -> None:
    """A name, a path, how a reply ends, and a fraction as a float32 has it are not told apart."""
    model = tiny_model("llama")
    before = model_identity(model)
    setattr(model.config, *field)

    assert model_identity(model) == before


def test_a_part_is_short_whatever_the_config_says() -> None:
    """Long parameters are cut, and still told apart by what was cut off."""
    parts = []
    for last in (7.5, 7.25):
        model = tiny_model("llama")
        model.config.rope_parameters = {"rope_type": "default", "long": ["x" * 300, last]}
        parts.append(model_identity(model)["rope"])

    assert parts[0] != parts[1]
    assert all(len(part) <= MAX_PART and re.search("… #[0-9a-f]{16}$", part) for part in parts)


def test_merged_adapters_are_weights() -> None:
    """An adapter beside the weights leaves their digest as it is; merged into them, it is part of them."""
    adapted = with_adapter()
    plain = weights(tiny_model("llama"))

    assert plain == weights(adapted.get_base_model())
    adapted.merge_adapter()
    assert weights(adapted.get_base_model()) != plain
    assert model_identity(adapted.get_base_model())["adapters"] == "none"


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_every_element_of_every_dtype_counts(dtype: torch.dtype) -> None:
    """One element of a saved buffer of any dtype and any strides changes the digest of the weights."""
    model, found = tiny_model("llama"), set()
    for place in range(3):
        packed = torch.zeros(3, 2, 5, dtype=torch.uint8)
        packed[place, 1, 4] = 1
        model.get_decoder().register_buffer("packed", packed.to(dtype).transpose(0, 2)[1:])
        found.add(weights(model))
        del model.get_decoder().packed

    assert len(found) == 3
