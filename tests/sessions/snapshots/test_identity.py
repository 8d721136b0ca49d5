"""Whose keys a snapshot holds: another model is refused by the part in which it differs, equal weights or not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from agentmem.errors import AgentmemError, SnapshotRefused
from agentmem.hf.model_identity import MAX_PART, model_identity, weights
from agentmem.sessions import Runtime
from agentmem.testing import tiny_model
from support import tiny_chat

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
    "weights": ("model: ", lambda: tiny_model("llama"), lambda: tiny_model("llama", seed=1)),
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


def test_a_part_is_short_whatever_the_config_says() -> None:
    """Long parameters are cut, and still told apart by what was cut off."""
    parts = []
    for last in (7.5, 7.25):
        model = tiny_model("llama")
        model.config.rope_parameters = {"rope_type": "default", "long": ["x" * 300, last]}
        parts.append(model_identity(model)["rope"])

    assert parts[0] != parts[1]
    assert all(len(part) <= MAX_PART and re.search("… #[0-9a-f]{16}$", part) for part in parts)


def test_the_digest_of_all_weights_is_the_same_in_bfloat16() -> None:
    """Weights count as bfloat16 has them, so a checkpoint has one digest; merged adapters are weights."""
    adapted = with_adapter()
    plain = weights(tiny_model("llama"))

    assert plain == weights(tiny_model("llama").to(torch.bfloat16)) == weights(adapted.get_base_model())
    adapted.merge_adapter()
    assert weights(adapted.get_base_model()) != plain
    assert model_identity(adapted.get_base_model())["adapters"] == "none"
