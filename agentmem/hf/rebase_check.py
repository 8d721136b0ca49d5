"""Check that re-basing can move a model's stored keys by rotating them (:class:`agentmem.memory.rotation.Rotation`).

Re-basing rotates a stored key from its position to another. The result must be the key that the model itself would
compute at the other position. To test this, a single token is run twice, at two positions. The token attends only to
itself, so its hidden states do not depend on the position. Its keys and queries at one position, rotated to the other,
must therefore equal those at the other position. The check fails for models that rotate other pairs of dims, have
layers without RoPE, or scale queries by position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from agentmem.errors import UnsupportedModel
from agentmem.hf.capture import reading
from agentmem.hf.check_models import causal_class, tiny_model
from agentmem.hf.rope import rotations
from agentmem.hf.support import describe
from agentmem.memory.rotation import Rotation, shift_keys

if TYPE_CHECKING:
    from agentmem.planning.model_shape import ModelShape

LIMIT = 1e-4
"""The greatest allowed difference of float32 keys, relative to their largest absolute value."""
_FROM, _TO = 3, 40


def check_rebase(model: Any) -> None:
    """Check that the stored keys of a model can be rotated; ``model`` is a model or its config.

    A tiny random model of the same class is built on the CPU and run instead of the given model.

    Raises:
        UnsupportedModel: keys or queries are not rotated as expected; the message names the layer.

    """
    config = getattr(model, "config", model)
    kind = type(model) if hasattr(model, "get_decoder") else causal_class(config)
    with torch.inference_mode(mode=False), torch.no_grad():
        tiny = tiny_model(kind, config)
        turning, shape = rotations(tiny), describe(tiny.config, itemsize=4)
        before, after = _asked(tiny, shape, _FROM), _asked(tiny, shape, _TO)
        for layer, rotation in enumerate(turning):
            for name, found, wanted in zip(("keys", "queries"), before[layer], after[layer], strict=True):
                _require(config.model_type, layer, name, found, wanted, rotation)


def _asked(model: Any, shape: ModelShape, position: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run a single token at ``position``; return for each layer its keys ``[H, d]`` and queries ``[Hq, d]``."""
    with reading(model, [layer.window for layer in shape.layers]) as reader:
        layers = reader.read(torch.tensor([5]), start=position).layers
    return [(each.keys[:, 0].clone(), each.queries[:, 0].clone()) for each in layers]


def _require(family: str, layer: int, name: str, found: torch.Tensor, wanted: torch.Tensor, rotation: Rotation) -> None:
    """Raise UnsupportedModel unless rotating ``found`` from position ``_FROM`` to ``_TO`` gives ``wanted``.

    ``found`` is changed in place.
    """
    still = _apart(found, wanted) <= LIMIT
    heads = found.shape[0]
    at = torch.full((heads,), _FROM, dtype=torch.int32)
    if rotation.width <= found.shape[1]:
        shift_keys(found, at, torch.full_like(at, _TO - _FROM), rotation)
    if not _apart(found, wanted) <= LIMIT:
        why = "do not turn at all (no RoPE)" if still else "turn in other pairs of dims, or another way"
        raise UnsupportedModel(
            f"re-basing is not exact for model_type {family!r}: with positions the {name} of layer {layer} {why}, and "
            "stored keys would be turned as Llama's are. Leave re-basing off for this model"
        )


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())
