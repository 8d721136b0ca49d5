"""Models of 128 positions, and ways to look at rows that are re-based on them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from agentmem.hf import CappedCache
from agentmem.memory.pinning import settle
from agentmem.memory.store import LayerStore
from agentmem.testing import tiny_model
from support import tiny

LIMIT = 128
_MIXED = {"use_sliding_window": True, "sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"]}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "qwen2, half sliding": ("qwen2", _MIXED),
    "gemma3_text": ("gemma3_text", {}),
    "phi3, partial rotary": ("phi3", {"partial_rotary_factor": 0.5}),
    "mistral, sliding": ("mistral", {"sliding_window": 24}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
}


@functools.cache
def model(family: str = "llama") -> Any:
    """A shared model of 128 positions; leave it as you found it."""
    name, config = FAMILIES[family]
    return tiny_model(name, max_position_embeddings=LIMIT, **config)


@contextmanager
def watched(of: Any) -> Iterator[list[int]]:
    """The greatest position of every forward that the model's rotary module is asked for."""
    seen: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(int((kwargs["position_ids"] if "position_ids" in kwargs else args[1]).max()))

    handle = of.get_decoder().rotary_emb.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def stores(memory: CappedCache, row: int = 0) -> list[LayerStore]:
    """The stores of a row, positions settled where they are kept."""
    found = [store for store in memory.memory.sequences[row].stores if store is not None]
    for store in found:
        if store.spec.shape.window is None:
            settle(memory.memory.sequences[row], store)
    return found


def check_order(memory: CappedCache, row: int = 0) -> None:
    """In every head: prefix first, then rising positions, then the recent tokens in one run up to the next position."""
    core = memory.memory.sequences[row]
    for store in stores(memory, row):
        if store.spec.shape.window is None:
            for head in range(len(store.lengths)):
                positions = store.segment(head, 0, 0).positions.tolist()
                assert positions == sorted(set(positions))
                assert positions[:4] == [0, 1, 2, 3]
                assert positions[-8:] == list(range(core.next_position - 8, core.next_position))


def slots(memory: CappedCache) -> list[list[Any]]:
    """Copies of all slots of row 0, ``[layer][head]``: positions, keys, values, β, scores."""
    found = []
    for store in stores(memory):
        heads = [store.segment(head, 0, 0) for head in range(len(store.lengths))]
        fields = ("positions", "keys", "values", "bias", "scores")
        found.append([{name: _copy(getattr(head, name)) for name in fields} for head in heads])
    return found


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


def state(memory: CappedCache) -> list[Any]:
    """Everything of row 0 to the bit: slots, stored queries, counts."""
    row = memory.memory.sequences[0]
    found: list[Any] = [row.next_position, row.shift, row.moves, row.moving, row.room, list(row.ids), list(row.tail)]
    for layer, store in zip(slots(memory), stores(memory), strict=True):
        names = ("keys", "values", "bias") + (("positions",) if store.spec.shape.window is None else ())
        found += [[head[name].numpy().tobytes() for name in names] for head in layer]
        found += [store.capacities, store.lengths, store.settled, store.seen]
    samples = [sample for layer in row.samples for sample in layer]
    return found + [sample.queries[:, : sample.filled].numpy().tobytes() for sample in samples]


def turns(of: Any, layer: int) -> list[float]:
    """The frequencies that the model itself multiplies a layer's positions by."""
    rotary, text = of.get_decoder().rotary_emb, of.config
    nested = "rope_type" not in text.rope_parameters
    found: list[float] = getattr(rotary, f"{text.layer_types[layer]}_inv_freq" if nested else "inv_freq").tolist()
    return found


def near_the_end(memory: CappedCache, of: Any, fed: int = 90) -> None:
    """Feed tokens: a few more and the row must be re-based."""
    tiny.feed(memory, tiny.ids(fed), model=of)
    assert memory.memory.sequences[0].shift == 0
