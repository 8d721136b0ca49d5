"""What a layer costs when one token of each of several sequences is appended and attends: the call, and its Python.

    python -m benchmarks.attention [--sequences 1,4,16] [--held 512] [--dtype float32] [--slot-dtype auto]
                                   [--instructions 2,1,0] [--threads 1] [--rounds 20]

Each sequence is a memory of its own, of 30 layers of 3 KV and 9 query heads of 64. ``together`` is one call for all of
them (``append_each``), ``apart`` a call for each, ``python`` what is left of ``together`` when the compiled code does
nothing: medians over rounds of microseconds a layer, the ways taking turns. ``--instructions`` are the sets that the
compiled code uses: 2 AVX-512, 1 AVX2, 0 those of any CPU; sets that this CPU lacks are left out. With one thread the
figures are the thread's own CPU time, which other processes disturb little; with more they are wall time.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from agentmem import plugins
from agentmem.attention import decode
from agentmem.memory.forwards import append_each, append_one
from agentmem.memory.memory import Memory
from agentmem.planning.model_shape import LayerShape, ModelShape
from agentmem.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentmem.memory.sequence import TokenSequence

LAYERS, HEADS, GROUP, DIM, SCALE = 30, 3, 3, 64, 0.125
Parts = list[tuple[Memory, "TokenSequence"]]


def filled(held: int, dtype: torch.dtype, slot_dtype: Any) -> tuple[Memory, TokenSequence]:
    """A memory without a model, whose sequence holds ``held`` slots per head in every layer."""
    layer = LayerShape(HEADS, HEADS * GROUP, DIM, DIM)
    shape = ModelShape("default", (layer,) * LAYERS, dtype.itemsize, hidden=576, intermediate=1536, vocabulary=49152)
    settings = Settings(cap=1 << 34, max_slots=held + 1024, slot_dtype=slot_dtype)
    memory = Memory(shape.with_slots(slot_dtype), settings, plugins.policy("am-halving"))
    memory.bind(1)
    sequence = memory.sequences[0]
    for index in range(LAYERS):
        append_one(memory, sequence, index, *tokens(held, dtype), SCALE)
    memory.progress.consumed = memory.progress.consumed._replace(tokens=(held,))
    return memory, sequence


def tokens(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries ``[Hq, count, d]``, keys and values ``[Hkv, count, d]``."""
    queries, keys, values = (torch.randn(heads, count, DIM).to(dtype) for heads in (HEADS * GROUP, HEADS, HEADS))
    return queries, keys, values


def nothing(*_: object) -> None:
    """In the place of the compiled code."""


def timed(step: Callable[[int], object], clock: Callable[[], int], parts: Parts) -> float:
    """Microseconds a layer of one token; what it appended is taken back."""
    began = clock()
    for layer in range(LAYERS):
        step(layer)
    took = (clock() - began) / LAYERS / 1000
    for memory, _ in parts:
        memory.take_back()
    return took


def measure(parts: Parts, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """The figures of one line."""
    queries, keys, values = (each.transpose(0, 1).contiguous() for each in tokens(len(parts), dtype))
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns

    def together(layer: int) -> None:
        append_each(parts, layer, queries, keys, values, SCALE)

    def apart(layer: int) -> None:
        for index, part in enumerate(parts):
            each = slice(index, index + 1)
            append_each([part], layer, queries[each], keys[each], values[each], SCALE)

    times: dict[str, list[float]] = {"together": [], "apart": [], "python": []}
    for number in range(rounds + 1):
        took = {"together": timed(together, clock, parts), "apart": timed(apart, clock, parts)}
        with mock.patch.object(decode._decode, "attend", nothing):  # noqa: SLF001  # all but its work
            took["python"] = timed(together, time.thread_time_ns, parts)
        for name, value in took.items():
            times[name] += [value] * (number > 0)
    return {name: round(median(value), 1) for name, value in times.items()}


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [int(each) for each in text.split(",")]


def main() -> None:
    """Print a line of JSON for each set of instructions and number of sequences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=numbers, default=[1, 4, 16])
    parser.add_argument("--held", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--slot-dtype", choices=("auto", "int8", "k8v4", "int4"), default="auto")
    parser.add_argument("--instructions", type=numbers, default=[2, 1, 0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    dtype, before = getattr(torch, given.dtype), torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        for count in given.sequences:
            with torch.inference_mode():
                parts = [filled(given.held, dtype, given.slot_dtype) for _ in range(count)]
                for level in filter(decode._decode.use, given.instructions):  # noqa: SLF001  # for tests and this
                    figures = measure(parts, dtype, given.rounds)
                    print(json.dumps({"instructions": level, "sequences": count, "held": given.held, **figures}))
    finally:
        torch.set_num_threads(before)
        any(decode._decode.use(level) for level in (2, 1, 0))  # noqa: SLF001  # the best one again


if __name__ == "__main__":
    main()
