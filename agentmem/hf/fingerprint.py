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
"""About how many elements of each weight are sampled, at even distances."""


def fingerprint(model: PreTrainedModel) -> str:
    """Return a SHA-256 hash, 64 hexadecimal digits, of a model's sizes and a sample of its decoder's weights.

    The sampled elements are rounded to bfloat16 first, so a float32 checkpoint has the same fingerprint when loaded in
    bfloat16. The dtype, the device and the model's folder do not matter. Of weights on the ``meta`` device, only names
    and shapes are hashed.
    """
    digest = hashlib.sha256(sizes(model.config.get_text_config(decoder=True)))
    for said in sampled(model.get_decoder().named_parameters()):
        digest.update(said)
    return digest.hexdigest()


def sizes(config: PreTrainedConfig) -> bytes:
    """Return the sizes in a model's config, such as its number of layers, as bytes to be hashed."""
    return repr([(name, getattr(config, name, None)) for name in _SIZES]).encode()


def sampled(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[bytes]:
    """Yield bytes to be hashed: for each weight its name and shape, then a sample of its elements in bfloat16.

    Weights on the ``meta`` device have no elements to sample.
    """
    for name, weight in weights:
        yield f"{name} {tuple(weight.shape)}".encode()
        if not weight.is_meta and weight.numel():
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLE)].to(torch.bfloat16)
            yield sample.view(torch.int16).cpu().numpy().tobytes()
