"""The self-check of a family: what passes, what fails and by which name, and when it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import agentmem
from agentmem import hf
from agentmem.attention import runs
from agentmem.errors import UnsupportedModel
from agentmem.hf import self_check
from agentmem.hf.check_models import causal_class, tiny_config, tiny_model
from agentmem.memory.store import LayerStore
from support import variants

CHECKS = [
    "attention calls",
    "prefill",
    "prefill in chunks",
    "decode",
    "left-padded batch",
    "generate",
    "keys of compacted slots",
    "logits after 1 compaction",
    "logits after 2 compactions",
]


class OwnConfig(LlamaConfig):
    """A family that transformers does not have, as a repository's own code brings them."""

    model_type = "own"
    mixes: bool = False


class OwnModel(LlamaForCausalLM):
    """A Llama by another name; with ``mixes`` its second layer reads the token before as well."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        if config.mixes:
            self.model.layers[1].register_forward_pre_hook(_mix)


def _mix(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    (hidden, *rest) = args
    return (hidden + torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1], *rest)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No result of an earlier check is kept."""
    monkeypatch.setattr(self_check, "_REPORTS", {})


def own(**fields: Any) -> OwnModel:
    """A model of that family."""
    model: OwnModel = tiny_model(OwnModel, OwnConfig(**fields))
    return model


def test_what_is_checked_of_a_family() -> None:
    """Calls, four ways to read, generate, and after a compaction keys and logits; differences are of rounding."""
    report = hf.check(AutoConfig.for_model("qwen3"))

    assert report.passed
    assert report.family == "qwen3"
    assert [each.name for each in report.checks] == CHECKS
    assert all(each.difference is None or each.difference < 1e-5 for each in report.checks)


def test_a_family_of_sliding_layers_alone_has_nothing_to_compact() -> None:
    """The checks of a compaction are left out."""
    report = hf.check(AutoConfig.for_model("mistral", sliding_window=64))

    assert report.passed
    assert [each.name for each in report.checks] == CHECKS[:6]


def test_a_family_that_no_test_covers_is_checked_once() -> None:
    """At first use, by the class and config of the model; then it is capped as any other."""
    model, runs = own(), []
    original = self_check.check

    def counted(given: Any) -> Any:
        runs.append(type(given))
        return original(given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_check, "check", counted)
        for _ in range(2):
            with agentmem.wrap(model, **variants.TIGHT) as ours:
                ours.generate(variants.prompt(50), max_new_tokens=10)
                assert ours.report().num_compactions >= 1

    assert runs == [OwnModel]


def test_a_covered_family_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's tests have done so."""
    monkeypatch.setattr(self_check, "check", lambda _: pytest.fail("it was"))
    with agentmem.wrap(variants.model(), **variants.ROOMY) as ours:
        assert ours.generate(variants.prompt(5), max_new_tokens=2).shape == (1, 7)


def test_layers_that_mix_neighbours_are_refused() -> None:
    """A chunk's first token would have to see the last of the chunk before, which no slot holds; nothing is changed."""
    model = own(mixes=True)
    with variants.refused(
        model,
        UnsupportedModel,
        "model_type 'own' is refused",
        "prefill in chunks: ",
        "differs from stock by",
        "agentmem check",
    ):
        agentmem.wrap(model, **variants.ROOMY)

    assert model.config._attn_implementation == "eager"
    assert "generate" not in vars(model)


def test_a_compaction_that_misplaces_keys_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots that have changed their keys: their positions have other keys in stock."""
    original = LayerStore.compacted

    def swapped(self: LayerStore, *args: Any, **kwargs: Any) -> LayerStore:
        new = original(self, *args, **kwargs)
        new.keys[[5, 6]] = new.keys[[6, 5]]
        return new

    monkeypatch.setattr(LayerStore, "compacted", swapped)
    report = hf.check(AutoConfig.for_model("qwen3"))

    assert report.reason is not None
    assert report.reason.startswith("keys of compacted slots: ")


def test_attention_that_leaves_out_a_beta_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots are right and the logits are not those of the oracle that holds them."""
    original = runs.Run.__init__
    monkeypatch.setattr(
        runs.Run,
        "__init__",
        lambda self, first, keys, values, bias=None, scores=None, coded=None: original(
            self, first, keys, values, None, scores, coded
        ),
    )
    report = hf.check(AutoConfig.for_model("qwen3"))

    assert report.reason is not None
    assert report.reason.startswith("logits after 1 compaction: ")


def test_a_model_that_cannot_run_is_refused_by_what_it_raised() -> None:
    """The model's own error is named, with how far the check had come."""
    report = hf.check(AutoConfig.for_model("dots1"))  # its default config has no number of experts

    assert report.reason is not None
    assert report.reason.startswith("a tiny model of its class raised TypeError: ")
    assert report.reason.endswith("before anything could be checked")


def test_the_check_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its seconds it is refused, rather than waited for."""
    monkeypatch.setattr(self_check, "SECONDS", 0.0)
    report = hf.check(AutoConfig.for_model("qwen3"))

    assert report.reason == "the self-check was not done after 0 seconds"
    assert len(report.checks) == 1


def test_the_check_leaves_the_callers_state_alone() -> None:
    """The random state is the caller's; autocast, inference mode and another default device do not reach the check."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        report = hf.check(AutoConfig.for_model("qwen3"))

    assert report.passed, report.reason
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("family", "layer"), [("cohere", 0), ("glm4", 0), ("ernie4_5", 0), ("smollm3", 3), ("exaone4", 3), ("nanochat", 0)]
)
def test_keys_that_do_not_turn_as_stored_ones_would_are_not_rebased(family: str, layer: int) -> None:
    """Other pairs of dims, or layers without RoPE: re-basing is refused by the layer, before anything is changed."""
    config = AutoConfig.for_model(family)
    model = tiny_model(causal_class(config), config)
    with variants.refused(
        model, UnsupportedModel, f"re-basing is not exact for model_type '{family}'", f"layer {layer}", "re-basing off"
    ):
        agentmem.wrap(model, rebase=True, **variants.ROOMY)


def test_a_tiny_config_keeps_what_the_layers_are() -> None:
    """The layers up to the first of every kind, KV heads that are shared as before, and the kind of RoPE."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    kinds = [*["sliding_attention"] * 3, "full_attention"] * 8
    config = AutoConfig.for_model(
        "qwen3", num_hidden_layers=32, layer_types=kinds, rope_parameters=rope, num_key_value_heads=1, head_dim=128
    )

    tiny = tiny_config(config)

    assert tiny.layer_types == kinds[:4]
    assert tiny.num_hidden_layers == 4
    assert (tiny.num_attention_heads, tiny.num_key_value_heads, tiny.head_dim) == (4, 1, 16)
    assert tiny.rope_parameters["rope_type"] == "llama3"
    assert config.num_hidden_layers == 32
