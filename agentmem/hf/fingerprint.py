"""Compute a fingerprint of a model's weights that does not depend on the dtype in which they are loaded."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedConfig, PreTrainedModel

_SIZES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_SAMPLE = 64
"""Elements sampled from each weight at even distances, about this many."""


def fingerprint(model: PreTrainedModel) -> str:
    """Hash the sizes of a causal model and an even sample of its decoder's weights to 64 hexadecimal digits.

    Weights are rounded to bfloat16 first, so a float32 checkpoint has the same fingerprint when loaded in bfloat16. The
    dtype, the device and the folder do not matter; the values of weights on the ``meta`` device are left out.
    """
    digest = hashlib.sha256(sizes(model.config.get_text_config(decoder=True)))
    for said in sampled(model.get_decoder().named_parameters()):
        digest.update(said)
    return digest.hexdigest()


def sizes(config: PreTrainedConfig) -> bytes:
    """Write the sizes of a model, such as its number of layers, as bytes to be hashed."""
    return repr([(name, getattr(config, name, None)) for name in _SIZES]).encode()


def sampled(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[bytes]:
    """Yield for each weight its name and shape, and, unless it is on ``meta``, an even sample in bfloat16."""
    for name, weight in weights:
        yield f"{name} {tuple(weight.shape)}".encode()
        if not weight.is_meta and weight.numel():
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLE)].to(torch.bfloat16)
            yield sample.view(torch.int16).cpu().numpy().tobytes()
