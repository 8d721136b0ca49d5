"""Attention alone on CPU: compiled code and torch's path against stock attention, a layer's milliseconds.

    python -m benchmarks.attention [--dtype bfloat16] [--threads 1]

The ways take turns in one process. With one thread its own CPU time counts, so other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from agentmem.attention import ragged
from agentmem.attention.ragged import Fresh, Run, attend

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS, TURNS = 30, 12


class Shape(NamedTuple):
    """KV heads, query heads of each, numbers of a key, tokens of a chunk (1: a decode step) and slots held."""

    heads: int
    group: int
    dim: int
    tokens: int
    held: int


SHAPES = (
    Shape(3, 3, 64, 1, 1024), Shape(3, 3, 64, 1, 4096), Shape(3, 3, 64, 512, 0), Shape(3, 1, 64, 512, 0),
    Shape(3, 3, 64, 512, 1024), Shape(3, 3, 64, 512, 4096), Shape(8, 4, 128, 512, 0), Shape(8, 4, 128, 512, 1024),
    Shape(2, 8, 128, 256, 4096), Shape(3, 3, 64, 32, 0), Shape(3, 3, 64, 32, 1024), Shape(3, 3, 64, 32, 4096),
    Shape(8, 1, 64, 128, 1024), Shape(2, 1, 64, 32, 0), Shape(2, 1, 64, 64, 0), Shape(4, 7, 128, 1024, 0),
)  # fmt: skip


def main() -> int:
    """Print a line a shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.thread_time if given.threads == 1 else time.perf_counter
    for shape in SHAPES:
        layers = LAYERS if shape.tokens == 1 else 1
        ours, path, stock = _measured(_ways(shape, getattr(torch, given.dtype), layers), layers, clock)
        print(
            f"{shape!s:66} {ours:9.3f} {path:9.3f} {stock:9.3f} ms  {ours / stock:.2f}  {path / stock:.2f}", flush=True
        )
    return 0


def _ways(shape: Shape, dtype: torch.dtype, layers: int) -> tuple[Callable[[int], object], ...]:
    """This package as installed, by torch alone, and stock attention, each over a layer."""
    heads, group, dim, tokens, held = shape
    span = held + (tokens if tokens > 1 else 0)
    queries = torch.randn(tokens, heads * group, dim).to(dtype).transpose(0, 1)
    slots = [tuple(torch.randn(heads, span, dim).to(dtype) for _ in range(2)) for _ in range(layers)]
    bias = torch.randn(heads, held)
    mask = None
    if held and tokens > 1:
        hidden = torch.ones(tokens, span, dtype=torch.bool).triu(held + 1)
        mask = torch.zeros(tokens, span, dtype=dtype).masked_fill_(hidden, -torch.inf)[None, None]

    def ours(layer: int) -> object:
        keys, values = slots[layer]
        runs = [Run(0, keys[:, :held], values[:, :held], bias)] if held else []
        return attend(queries, runs, Fresh(keys[:, held:], values[:, held:]) if tokens > 1 else None, dim**-0.5)

    def path(layer: int) -> object:
        before = ragged.COMPILED, ragged.TILED
        ragged.COMPILED = ragged.TILED = False
        result = ours(layer)
        ragged.COMPILED, ragged.TILED = before
        return result

    def stock(layer: int) -> object:
        keys, values = (each[None] for each in slots[layer])
        causal = tokens > 1 and not held
        return torch.nn.functional.scaled_dot_product_attention(
            queries[None], keys, values, attn_mask=mask, is_causal=causal, enable_gqa=group > 1
        )

    return ours, path, stock


def _measured(ways: tuple[Callable[[int], object], ...], layers: int, clock: Callable[[], float]) -> list[float]:
    """Median milliseconds a layer of each way, over all layers in turn, so that a step finds its slots out of cache."""
    times: list[list[float]] = [[] for _ in ways]
    with torch.inference_mode():
        for _ in range(TURNS + 2):
            for way, spent in zip(ways, times, strict=True):
                began = clock()
                for layer in range(layers):
                    way(layer)
                spent.append(1000 * (clock() - began) / layers)
    return [statistics.median(spent[2:]) for spent in times]


if __name__ == "__main__":
    sys.exit(main())
