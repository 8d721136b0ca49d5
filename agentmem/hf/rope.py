"""Read a model's RoPE frequencies for re-basing, and check whether they are constant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from agentmem.errors import UnsupportedModel
from agentmem.memory.rotation import Positions, Rotation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

FIXED = ("default", "linear", "llama3", "yarn")
"""Values of ``rope_type`` whose frequencies depend on the configuration alone."""

FOLLOWING = ("dynamic", "longrope")
"""Values of ``rope_type`` whose frequencies depend on the largest position in a forward."""


def refuse_rebase(config: PreTrainedConfig) -> None:
    """Refuse a model whose stored keys cannot be moved to other positions exactly.

    Raises:
        UnsupportedModel: some layers have no RoPE, or a ``rope_type`` that is not in :data:`FIXED`; the message names
            the layers and the type.

    """
    text = config.get_text_config(decoder=True)
    for layers, parameters in _parts(text).items():
        kind = (parameters or {}).get("rope_type")
        if kind not in FIXED:
            raise UnsupportedModel(
                f"{layers} of {text.model_type!r} {_why(kind)}; re-basing handles rope_type {', '.join(FIXED)}. Leave "
                f"re-basing off and end before position {getattr(text, 'max_position_embeddings', None)}, which is "
                "max_position_embeddings, or use a model with such a rope_type"
            )


def follows_positions(config: PreTrainedConfig) -> bool:
    """Return True if the RoPE frequencies of some layer change with the largest position in a forward.

    Then the keys of one row depend on the positions of the other rows in the batch.
    """
    parts = _parts(config.get_text_config(decoder=True)).values()
    return any((parameters or {}).get("rope_type") in FOLLOWING for parameters in parts)


def _why(kind: str | None) -> str:
    if kind is None:
        return "have no RoPE, so their stored keys cannot be taken to other positions"
    if kind in FOLLOWING:
        return f"have rope_type {kind!r}, whose frequencies change with the largest position, so stored keys differ"
    return f"have rope_type {kind!r}, which is not known here"


def _parts(text: PreTrainedConfig) -> Mapping[str, Mapping[str, Any] | None]:
    """Return the RoPE parameters of a config: one entry per layer type in use, or one entry for all layers.

    The keys are names for error messages, such as ``the layers`` or ``sliding_attention layers``.
    """
    parameters = getattr(text, "rope_parameters", None) or {}
    types = sorted(set(getattr(text, "layer_types", None) or ()))
    if "rope_type" in parameters or not types:
        return {"the layers": parameters}
    return {f"{kind} layers": parameters.get(kind) for kind in types}


def positions(model: PreTrainedModel, limit: int) -> Positions:
    """Return the data that re-basing needs: the number of positions (``limit``), and how each layer rotates its keys.

    Raises:
        UnsupportedModel: see :func:`rotations`.

    """
    return Positions(limit, rotations(model))


def rotations(model: PreTrainedModel) -> tuple[Rotation, ...]:
    """Return for each layer how its keys rotate with the position.

    The frequencies are those that the model's rotary module holds now. If the model was cast to another dtype, it uses
    rounded frequencies, and so do the rotations.

    Raises:
        UnsupportedModel: :func:`refuse_rebase` refuses the model, or the decoder's ``rotary_emb`` lacks the expected
            tensors.

    """
    refuse_rebase(model.config)
    decoder: Any = model.get_decoder()
    text, rotary = decoder.config, getattr(decoder, "rotary_emb", None)
    layers = range(text.num_hidden_layers)
    nested = "rope_type" not in text.rope_parameters
    names = [f"{text.layer_types[layer]}_inv_freq" if nested else "inv_freq" for layer in layers]
    found = {name: _rotation(rotary, name, type(decoder).__name__) for name in sorted(set(names))}
    return tuple(found[name] for name in names)


def _rotation(rotary: object, name: str, decoder: str) -> Rotation:
    frequencies = getattr(rotary, name, None)
    if not isinstance(frequencies, torch.Tensor) or frequencies.is_meta:
        raise UnsupportedModel(
            f"{decoder}.rotary_emb has no tensor {name!r} at hand, so stored keys cannot be re-rotated; re-basing "
            "needs the rotary module of transformers 5.16 or later, loaded. Leave re-basing off for this model"
        )
    return Rotation(frequencies.detach().cpu().double())
