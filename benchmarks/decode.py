"""Decode steps under a cap against stock ``DynamicCache``: interleaved in one run, medians, as ratios.

    python -m benchmarks.decode            # writes $BENCH_JSON, default build/bench.json

Rows: ``name, median_ms, stock_median_ms, ratio``. For the row ``unequal_heads_1024`` "stock" is this library with
equal heads at the same total of slots; for ``int8_…``, ``k8v4_…`` and ``int4_…`` it is this library with plain slots.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

import agentmem
from agentmem import models, plugins
from agentmem.contracts import BudgetRequest, Budgets

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentmem.settings import SlotDtype

STEPS = 24
CHUNK = 512
CODINGS: tuple[SlotDtype, ...] = ("int8", "k8v4", "int4")
Step = tuple[str, "Callable[[], None]"]


@dataclass(frozen=True)
class Unequal(Budgets):
    """Budgets that differ a lot from head to head: shares 1 : 2 : … : n, allocated over each layer."""

    head_ceiling: float = 2.0  # the last of n heads gets 2 n / (n + 1) equal shares

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """The last head of a layer takes what the others leave."""
        layer_total = request.total // len(request.held)
        rest = request.total - layer_total * len(request.held)
        return tuple(self._layer(len(held), layer_total + (index < rest)) for index, held in enumerate(request.held))

    @staticmethod
    def _layer(heads: int, total: int) -> tuple[int, ...]:
        shares = [total * (head + 1) * 2 // (heads * (heads + 1)) for head in range(heads - 1)]
        return (*shares, total - sum(shares))


def tokens_of(count: int) -> torch.Tensor:
    """Deterministic ids ``[1, count]``: what they say does not matter to the clock."""
    return torch.randint(1000, 40000, (1, count), generator=torch.Generator().manual_seed(0))


def feed(model: Any, cache: Any, ids: torch.Tensor) -> None:
    """Prefill in chunks."""
    with torch.inference_mode():
        for piece in ids.split(CHUNK, dim=1):
            model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)


def stepper(model: Any, cache: Any) -> Callable[[], None]:
    """One decode step."""
    token = tokens_of(1)

    def step() -> None:
        with torch.inference_mode():
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return step


def interleaved(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """Median milliseconds of two steps, run in turns so that both meet the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for count in range(STEPS + 3):
        order = (0, 1) if count % 2 else (1, 0)
        for which in order:
            began = time.perf_counter()
            (first, second)[which]()
            if count >= 3:
                times[which].append(1000 * (time.perf_counter() - began))
    return statistics.median(times[0]), statistics.median(times[1])


def stock(model: Any, seen: int) -> DynamicCache:
    """A stock cache that has seen ``seen`` tokens."""
    cache = DynamicCache(config=model.config)
    feed(model, cache, tokens_of(seen))
    return cache


def capped(model: Any, stack: ExitStack, held: int, seen: int, policy: Any, slot_dtype: SlotDtype = "auto") -> Any:
    """A memory that has seen ``seen`` tokens and holds ``held`` slots per head, right after a compaction if any."""
    room = max(STEPS + 8, held)
    settings: dict[str, Any] = {"max_slots": held + room, "target": held, "chunk": CHUNK, "slot_dtype": slot_dtype}
    memory = stack.enter_context(agentmem.capped(model, cap="2GiB", policy=policy, **settings))
    feed(model, memory, tokens_of(seen))
    if seen > held:
        memory.compact()
    return memory


def row(name: str, ours: float, other: float) -> dict[str, float | str]:
    """One line of the table."""
    times = {"median_ms": round(ours, 3), "stock_median_ms": round(other, 3), "ratio": round(ours / other, 4)}
    result = {"name": name, **times}
    print(f"{name:28s} {ours:9.2f} ms   {other:9.2f} ms   {ours / other:6.3f}", flush=True)
    return result


def main() -> int:
    """Run all rows."""
    model, _ = models.load(dtype=torch.float32)
    policy = plugins.policy("am-halving", probe_tokens=128)
    rows = []
    print(f"{'name':28s} {'agentmem':>12s}   {'stock':>12s}   {'ratio':>6s}")
    for held in (1024, 4096):
        with ExitStack() as stack:
            other = stock(model, held)
            ours = capped(model, stack, held, held, policy)
            rows.append(row(f"decode_{held}", *interleaved(stepper(model, ours), stepper(model, other))))
    with ExitStack() as stack:
        other = stock(model, 8192)
        ours = capped(model, stack, 1024, 8192, policy)
        rows.append(row("decode_8192_seen_1024_held", *interleaved(stepper(model, ours), stepper(model, other))))
    with ExitStack() as stack:
        equal = capped(model, stack, 1024, 2048, policy)
        unequal = capped(model, stack, 1024, 2048, replace(policy, name="unequal", budgets=Unequal()))
        rows.append(row("unequal_heads_1024", *interleaved(stepper(model, unequal), stepper(model, equal))))
    for held in (1024, 4096):
        with ExitStack() as stack:
            plain = capped(model, stack, held, held, policy)
            for coding in CODINGS:
                coded = capped(model, stack, held, held, policy, coding)
                rows.append(row(f"{coding}_{held}", *interleaved(stepper(model, coded), stepper(model, plain))))
    path = Path(os.environ.get("BENCH_JSON", "build/bench.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
