"""Peak of a capped generate against the same chunk without a cache, by torch's own account of its allocations.

    python -m benchmarks.peak [--cap 24MiB] [--tokens 2000]

The running sum of the profiler's memory events is the exact ATen peak. What a capped run needs beyond one plain forward
of a chunk must fit under the cap, although the prompt is several times what the cap can hold.
"""

from __future__ import annotations

import argparse
import sys

import torch

import agentmem
from agentmem import models
from agentmem.settings import parse_bytes
from agentmem.testing import peak_allocated


def main() -> int:
    """Compare the two peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cap", default="24MiB")
    parser.add_argument("--policy", default="am-halving")
    parser.add_argument("--tokens", type=int, default=2000)
    given = parser.parse_args()
    model, _ = models.load(dtype=torch.float32)
    ids = torch.randint(1000, 40000, (1, given.tokens), generator=torch.Generator().manual_seed(0))
    plan = agentmem.plan(model, cap=given.cap, policy=given.policy)
    reports = []

    def chunk() -> None:
        with torch.no_grad():
            model(input_ids=ids[:, : plan.chunk], use_cache=False, logits_to_keep=1)

    def run() -> None:
        with agentmem.capped(model, cap=given.cap, policy=given.policy) as memory:
            model.generate(ids, past_key_values=memory, max_new_tokens=4, do_sample=False)
            reports.append(memory.report())

    plain, capped, cap = peak_allocated(chunk), peak_allocated(run), parse_bytes(given.cap)
    print(f"{given.tokens} tokens into {plan.capacity} slots per head, {reports[0].num_compactions} compactions")
    print(f"one chunk {plain:,} bytes; capped {capped:,}; difference {capped - plain:,} of a cap of {cap:,}")
    return 0 if capped - plain <= cap else 1


if __name__ == "__main__":
    sys.exit(main())
