"""Describe everything in a model that its keys and values depend on, so that a snapshot is refused by other models.

The description has named parts. A snapshot can be loaded only if all parts of the two models are equal. Most parts are
read from the model's modules, because its config may have been changed after the model was built. A part is a short
readable text, followed by a digest if the text was cut or does not contain everything.
"""

from __future__ import annotations

import hashlib
import json
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import DynamicCache

from agentmem.hf.fingerprint import sampled, sizes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel

MAX_PART: Final = 200
"""The most characters of one part."""
_BLOCK = 1 << 20
_CHANGING = ("dynamic", "longrope")
"""RoPE types whose frequencies change with the length of the text; their modules also keep the original frequencies."""


def model_identity(model: PreTrainedModel) -> dict[str, str]:
    """Return the parts of a model's description by name, those that most often differ between models first.

    - ``dtype``: the dtype of the slots.
    - ``rope``: the parameters and frequencies of RoPE.
    - ``norms``: the eps of each norm.
    - ``windows``: the sliding window of each layer.
    - ``arithmetic``: the scale of the attention logits, and the activation function.
    - ``adapters``: the active adapters (PEFT) and a digest of their weights.
    - ``model``: a digest of the sizes and a sample of the weights without adapters; :func:`weights` covers all weights.
    """
    decoder: Any = model.get_decoder()
    config: Any = model.config.get_text_config(decoder=True)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "rope": _rope(decoder, config),
        "norms": _part(_counted(_norms(decoder))),
        "windows": _part(_counted(_windows(config))),
        "arithmetic": _part(_arithmetic(decoder, config)),
        "adapters": _adapters(decoder),
        "model": hashlib.sha256(sizes(config) + b"".join(sampled(_plain(decoder)))).hexdigest(),
    }


def weights(model: PreTrainedModel) -> str:
    """Return a SHA-256 hash, 64 hexadecimal digits, of all weights of the decoder except adapters.

    Each tensor contributes its name, its shape, and a sum over all elements: the elements are rounded to bfloat16 and
    their bit patterns are added as 16-bit integers. Tensors on the ``meta`` device contribute the sum 0. A million
    elements take about 2 ms on one core.
    """
    digest = hashlib.sha256()
    for name, weight in _plain(model.get_decoder()):
        blocks = () if weight.is_meta else torch.split(weight.detach().flatten(), _BLOCK)
        total = sum(map(_bits, blocks))
        digest.update(f"{name} {tuple(weight.shape)} {total};".encode())
    return digest.hexdigest()


def _bits(block: torch.Tensor) -> int:
    return int(block.to(torch.bfloat16).view(torch.int16).sum(dtype=torch.int64))


def _part(text: str, beside: bytes = b"") -> str:
    """Return the text for one part of a model's identity, such as its rotary embedding; at most 200 characters.

    ``beside`` are bytes that belong to the same part and are not in ``text``. A digest of ``text`` and ``beside`` is
    appended if ``beside`` is not empty, or if the text is empty or too long.
    """
    if not beside and 0 < len(text) <= MAX_PART:
        return text
    digest = hashlib.sha256(text.encode() + beside).hexdigest()[:16]
    room = MAX_PART - len(digest) - 3
    shown = text if len(text) <= room else f"{text[:room]}…"
    return f"{shown} #{digest}"


def _counted(values: Iterable[str]) -> str:
    """Join values with commas, in order; write equal neighbours as one entry, such as ``3 x 4096``."""
    runs = ((value, len(list(same))) for value, same in groupby(values))
    return ", ".join(value if count == 1 else f"{count} x {value}" for value, count in runs) or "none"


def _rope(decoder: Any, config: Any) -> str:
    said: Any = getattr(config, "rope_parameters", None) or {}
    text = json.dumps(said, sort_keys=True, default=str)
    kept = "original_inv_freq" if any(f'"{kind}"' in text for kind in _CHANGING) else "inv_freq"
    found = [
        f"{name} {[f'{value:.3g}' for value in buffer.detach().float().tolist()]}"  # devices differ in the last digits
        for name, buffer in decoder.named_buffers()
        if name.endswith(kept) and ("original" in name) == ("original" in kept) and not buffer.is_meta
    ]
    scalings = [
        f"{name}.{field} {value:.6g}"
        for name, module in decoder.named_modules()
        for field, value in sorted(vars(module).items())
        if field.endswith("attention_scaling") and isinstance(value, int | float)
    ]
    return _part(text, ";".join([*found, *scalings]).encode() or b"none")


def _norms(decoder: Any) -> Iterator[str]:
    """Yield the eps of each norm, in the order of the modules."""
    for module in decoder.modules():
        value = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if isinstance(value, float):
            yield f"{value:g}"


def _windows(config: Any) -> Iterator[str]:
    for layer in DynamicCache(config=config).layers:
        window = getattr(layer, "sliding_window", None)
        yield "full" if window is None else str(window)


def _arithmetic(decoder: Any, config: Any) -> str:
    scales = (module.scaling for module in decoder.modules() if hasattr(module, "layer_idx") and _scaled(module))
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return f"logits x ({_counted(f'{scale:.6g}' for scale in scales)}), {activation}"


def _scaled(module: Any) -> bool:
    return isinstance(getattr(module, "scaling", None), int | float)


# ---- adapters: PEFT's modules, recognised by their attributes


def _tuned(decoder: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and modules of the layers that hold adapters."""
    for name, module in decoder.named_modules():
        if isinstance(getattr(type(module), "adapter_layer_names", None), tuple) and hasattr(module, "active_adapters"):
            yield name, module


def _plain(decoder: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight that is no adapter, with the name that it has in a model without adapters."""
    added = tuple(f"{name}.{layer}." for name, module in _tuned(decoder) for layer in module.adapter_layer_names)
    for name, weight in decoder.named_parameters():
        if not name.startswith(added) if added else True:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), weight


def _adapters(decoder: Any) -> str:
    """Return the names of the active adapters with a digest of their weights and scalings; ``none`` without adapters.

    Merged adapters are left out, because they are part of the model's own weights.
    """
    names, digest = set(), hashlib.sha256()
    for path, module in _tuned(decoder):
        if module.disable_adapters or getattr(module, "merged", False):
            continue
        for active in module.active_adapters:
            for said in _of_adapter(module, active):
                names.add(active)
                digest.update(path.encode() + said)
    return _part("+".join(sorted(names)), digest.digest()) if names else "none"


def _of_adapter(module: Any, active: str) -> Iterator[bytes]:
    """Yield bytes to be hashed: the weights and scaling that the adapter ``active`` has in one module, if any."""
    marks = tuple(f"{layer}.{active}" for layer in module.adapter_layer_names)
    for name, weight in module.named_parameters():
        if any(name == mark or name.startswith(f"{mark}.") for mark in marks):
            raw = weight.detach().to("cpu", torch.float32).contiguous() if not weight.is_meta else torch.empty(0)
            yield f"{name} {tuple(weight.shape)}".encode() + hashlib.sha256(raw.numpy().tobytes()).digest()
            scaling = getattr(module, "scaling", None)
            yield repr(scaling.get(active) if isinstance(scaling, dict) else None).encode()
