"""Tiny models of every family, built once per variant, the runs that tests compare with stock, and refusals.

Leave the models as you found them; :func:`private` gives a copy that may be changed.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from agentmem.errors import AgentmemError
from agentmem.testing import Family, tiny_model

WINDOW = 24
_MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]}

VARIANTS: dict[str, tuple[Family, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama, one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama, no grouping": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2, half sliding": ("qwen2", _MIXED),
    "qwen3": ("qwen3", {}),
    "qwen3, half sliding": ("qwen3", _MIXED),
    "gemma3_text": ("gemma3_text", {}),
    "phi3": ("phi3", {}),
    "phi3, sliding": ("phi3", {"sliding_window": WINDOW}),
}
SLIDING_ONLY = ("mistral, sliding", "phi3, sliding")
COMPACTABLE = tuple(name for name in VARIANTS if name not in SLIDING_ONLY)
POLICIES = ("am-halving", "window", "heavy-hitters")

ROOMY: dict[str, Any] = {"cap": "64MiB", "chunk": 16}
"""A cap that no test reaches, and pieces shorter than the prompts."""
TIGHT: dict[str, Any] = ROOMY | {"max_slots": 40, "keep_first": 4, "keep_recent": 8, "min_reclaim": 4}
"""40 slots per head, halved whenever they are full."""


@functools.cache
def model(variant: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """The one model of that variant and dtype."""
    family, config = VARIANTS[variant]
    return tiny_model(family, dtype=dtype, **config)


def private(variant: str = "llama") -> Any:
    """A copy that a test may change."""
    return copy.deepcopy(model(variant))


def prompt(length: int, rows: int = 1, seed: int = 1) -> torch.Tensor:
    """Random ids ``[rows, length]`` without pads."""
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of those lengths with pads at their left, and their mask."""
    ids = prompt(max(lengths), rows=len(lengths))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, max(lengths) - length :] = 1
    return ids * mask, mask


def greedy(lm: Any, ids: torch.Tensor, new: int, **kwargs: Any) -> Any:
    """Greedy generation with the logits of every step."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return lm.generate(ids, max_new_tokens=new, **options, **kwargs)


def steps(output: Any) -> torch.Tensor:
    """The logits of every step, ``[rows, steps, vocabulary]``."""
    return torch.stack(output.logits, 1)


def foreign(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A prefill with pads and a decode step on a cache of its own; their logits."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(ids, attention_mask=mask, past_key_values=cache).logits
        more = torch.cat((mask, torch.ones(len(mask), 1, dtype=mask.dtype)), 1)
        second = model(ids[:, :1], attention_mask=more, past_key_values=cache).logits
    return torch.cat((first, second), 1)


@contextmanager
def no_layer_runs(model: Any) -> Iterator[None]:
    """Fail if any decoder layer of ``model`` is entered in the block."""
    entered: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, index=index: entered.append(index))
        for index, layer in enumerate(model.get_decoder().layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert entered == []


@contextmanager
def refused(model: Any, error: type[AgentmemError], *fragments: str) -> Iterator[None]:
    """The block raises exactly that error, its message has the fragments in order, and no layer ran."""
    with no_layer_runs(model), pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, fragments))) as caught:
        yield
    assert caught.type is error
