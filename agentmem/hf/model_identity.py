"""Describe everything in a model that its keys and values depend on, so that a snapshot is refused by other models.

The description has named parts. A snapshot can be loaded only if all parts of the two models are equal. Most parts are
read from the model's modules, because its config may have been changed after the model was built. A part is a short
readable text, followed by a digest if the text was cut or does not contain everything.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import DynamicCache

from agentmem.errors import UnsupportedModel
from agentmem.hf.fingerprint import sampled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from transformers import PreTrainedModel

MAX_PART: Final = 200
"""The most characters of one part."""
_BLOCK = 1 << 22
_THREADS = 4
_NO_MATTER = frozenset(
    {
        *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "num_labels", "problem_type"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_cache"),
    }
)
"""Fields of a config that cannot change keys and values, or that another part has; so have those with a leading "_"."""
_CHANGING = ("dynamic", "longrope")
"""RoPE types whose frequencies change with the length of the text; their modules also keep the original frequencies."""


def model_identity(model: PreTrainedModel) -> dict[str, str]:
    """Return the parts of a model's description by name, those that most often differ between models first.

    - ``dtype``: the dtype of the slots, and those of the weights if some differ from it.
    - ``rope``: the parameters and frequencies of RoPE.
    - ``norms``: the eps of each norm.
    - ``windows``: the sliding window of each layer.
    - ``arithmetic``: the scale of the attention logits, and the activation function.
    - ``adapters``: the active adapters (PEFT) and a digest of their weights.
    - ``config``: the fields of the config that have not the default of its class, without names and paths.

    The weights themselves are not included; see :func:`weights`.
    """
    decoder: Any = model.get_decoder()
    config: Any = model.config.get_text_config(decoder=True)
    return {
        "dtype": _dtypes(model, decoder),
        "rope": _rope(decoder, config),
        "norms": _part(_counted(_norms(decoder))),
        "windows": _part(_counted(_windows(config))),
        "arithmetic": _part(_arithmetic(decoder, config)),
        "adapters": _adapters(decoder),
        "config": _part(_config(config)),
    }


def weights(model: PreTrainedModel) -> str:
    """Return a SHA-256 hash, 64 hexadecimal digits, of all weights and saved buffers of the decoder except adapters.

    Each tensor contributes its name, dtype, shape and bytes. Those that accelerate has offloaded are read from where
    they are. 100 MB take about 0.1 s on one core.

    Raises:
        UnsupportedModel: a tensor is on the ``meta`` device, and no hook of accelerate says where its values are.

    """
    decoder: Any = model.get_decoder()
    kept = _offloaded(decoder)

    def digest(named: tuple[str, str, torch.Tensor]) -> bytes:
        path, name, weight = named
        said = f"{name} {weight.dtype} {tuple(weight.shape)};".encode()
        return hashlib.sha256(said + _digest(_loaded(kept, path, weight))).digest()

    with ThreadPoolExecutor(_THREADS) as threads:  # hashlib works without the interpreter's lock
        return hashlib.sha256(b"".join(threads.map(digest, _plain(decoder)))).hexdigest()


def weights_sample(model: PreTrainedModel) -> str:
    """Return a hash of a sample of the weights that are not offloaded; if it changes, :func:`weights` has changed."""
    decoder: Any = model.get_decoder()
    away = tuple(f"{path}." for path in _offloaded(decoder))  # loaded only while a forward of any thread uses them
    there = ((name, weight) for path, name, weight in _plain(decoder) if not path.startswith(away))
    return hashlib.sha256(b"".join(sampled(there))).hexdigest()


def _digest(weight: torch.Tensor) -> bytes:
    """Return a SHA-256 hash of the bytes of a tensor, on any device."""
    digest = hashlib.sha256()
    for block in torch.split(weight.detach().contiguous().view(-1).view(torch.uint8), _BLOCK):
        digest.update(block.to("cpu").numpy().data)
    return digest.digest()


# ---- offloaded weights: accelerate's hooks, recognised by their attributes


def _offloaded(decoder: Any) -> dict[str, Mapping[str, torch.Tensor]]:
    """Return, by the names of modules, the maps from which accelerate's hooks fetch weights before a forward."""
    found = {}
    for path, module in decoder.named_modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if getattr(each, "offload", False):
                found[path] = each.weights_map
    return found


def _loaded(kept: Mapping[str, Mapping[str, torch.Tensor]], name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight ``name`` of a decoder with its values, as a forward uses them."""
    path = name
    while weight.is_meta:
        if not path:
            raise UnsupportedModel(
                f"{name} is on the meta device, and no hook of accelerate says where its values are: whose keys a "
                "snapshot holds would be unknown. Load the model, or have accelerate offload it"
            )
        path = path.rpartition(".")[0]
        try:
            weight = kept[path][name[len(path) + 1 if path else 0 :]].to(weight.dtype)
        except KeyError:  # the hook of a module further out may have it
            continue
    return weight


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
    elsewhere = _offloaded(decoder)
    found = [
        f"{name} {[f'{value:.3g}' for value in values.tolist()]}"  # devices differ in the last digits
        for name, buffer in decoder.named_buffers()
        if name.endswith(kept) and ("original" in name) == ("original" in kept)
        for values in [_loaded(elsewhere, name, buffer).detach().float()]
    ]
    scalings = [
        f"{name}.{field} {value:.6g}"
        for name, module in decoder.named_modules()
        for field, value in sorted(vars(module).items())
        if field.endswith("attention_scaling") and isinstance(value, int | float)
    ]
    return _part(text, ";".join([*found, *scalings]).encode() or b"none")


def _dtypes(model: Any, decoder: Any) -> str:
    slots = str(model.dtype).removeprefix("torch.")
    found = [str(weight.dtype).removeprefix("torch.") for _, _, weight in _plain(decoder) if weight.is_floating_point()]
    return slots if {*found} <= {slots} else _part(f"{slots}, weights {_counted(found)}")


def _config(config: Any) -> str:
    """Return the fields of a config that differ from the defaults of its class; fractions and flags first."""
    usual = {each.name: _value(each.default) for each in fields(config)} if is_dataclass(config) else {}
    given = {name: value for name, value in config.to_dict().items() if name not in _NO_MATTER and name[0] != "_"}
    said = {name: _value(value) for name, value in given.items()}
    other = [name for name, text in said.items() if name == "model_type" or usual.get(name) != text]
    other.sort(key=lambda name: (isinstance(given[name], dict | list), not isinstance(given[name], float | bool), name))
    return ", ".join(f"{name} {said[name]}" for name in other)


def _value(value: object) -> str:
    """Return a value of a config as text; fractions as float32 has them, since some files keep them so."""
    return f"{value:.7g}" if isinstance(value, float) else json.dumps(value, sort_keys=True, default=str)


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


def _plain(decoder: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield each weight and saved buffer that is no adapter: its name, its name without adapters, and itself."""
    added = tuple(f"{name}.{layer}." for name, module in _tuned(decoder) for layer in module.adapter_layer_names)
    for name, weight in decoder.state_dict(keep_vars=True).items():
        if isinstance(weight, torch.Tensor) and not name.startswith(added):
            yield name, name.replace(".base_layer.", ".").replace(".original_module.", "."), weight


def _adapters(decoder: Any) -> str:
    """Return the names of the active adapters with a digest of their weights and scalings; ``none`` without adapters.

    Merged adapters are left out, because they are part of the model's own weights.
    """
    names, digest, kept = set(), hashlib.sha256(), _offloaded(decoder)
    for path, module in _tuned(decoder):
        if module.disable_adapters or getattr(module, "merged", False):
            continue
        for active in module.active_adapters:
            for name, weight in _of_adapter(module, active):
                names.add(active)
                scale = module.scaling.get(active) if isinstance(getattr(module, "scaling", None), dict) else None
                digest.update(f"{path} {name} {weight.dtype} {tuple(weight.shape)} {scale!r};".encode())
                digest.update(_digest(_loaded(kept, f"{path}.{name}", weight)))
    return _part("+".join(sorted(names)), digest.digest()) if names else "none"


def _of_adapter(module: Any, active: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and weights that the adapter ``active`` has in one module, if any."""
    marks = tuple(f"{layer}.{active}" for layer in module.adapter_layer_names)
    for name, weight in module.named_parameters():
        if any(name == mark or name.startswith(f"{mark}.") for mark in marks):
            yield name, weight
