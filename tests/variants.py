"""Tiny models of every family, built once per variant, and the runs that tests compare with stock generate.

Leave the models as you found them; :func:`private` gives a copy that may be changed.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

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


def greedy(lm: Any, ids: torch.Tensor, new: int, **kwargs: Any) -> Any:
    """Greedy generation with the logits of every step."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return lm.generate(ids, max_new_tokens=new, **options, **kwargs)


def steps(output: Any) -> torch.Tensor:
    """The logits of every step, ``[rows, steps, vocabulary]``."""
    return torch.stack(output.logits, 1)
