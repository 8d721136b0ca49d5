"""Peak resident set size against the cap: fresh processes at three caps; the slope should be 1.

    python -m benchmarks.resident [--policy am-halving] [--tokens 6000]

Each process ingests the same prompt, longer than the largest cap holds, and generates a little. What does not grow
with the cap (weights, libraries, A) is the intercept. glibc keeps freed blocks of up to 32 MiB for itself, which blurs
a peak by tens of MiB; the processes are told to give blocks of 64 KiB and more back (MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys

import numpy as np

CAPS_MIB = (64, 128, 256)


def child(cap_mib: int, policy: str, tokens: int) -> None:
    """Run under one cap and print the peaks as JSON."""
    import torch  # the parent process needs none of it

    import agentmem
    from agentmem import models

    model, _ = models.load(dtype=torch.float32)
    ids = torch.randint(1000, 40000, (1, tokens), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with agentmem.capped(model, cap=cap_mib << 20, policy=policy, chunk=256) as memory:
        model.generate(ids, past_key_values=memory, max_new_tokens=8, do_sample=False)
        report, activations = memory.report(), memory.plan.activation_bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if sys.platform == "darwin" else 1024
    print(
        json.dumps(
            {
                "cap": cap_mib << 20,
                "rss": peak * scale,
                "loaded": before * scale,
                "ledger_peak": report.peak_bytes,
                "compactions": report.num_compactions,
                "A": activations,
            }
        )
    )


def main() -> int:
    """Fit rss = slope x cap + intercept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="am-halving")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--child", type=int)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.policy, given.tokens)
        return 0
    rows = []
    for cap in CAPS_MIB:
        command = [sys.executable, "-m", "benchmarks.resident", "--child", str(cap)]
        command += ["--policy", given.policy, "--tokens", str(given.tokens)]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        rows.append(json.loads(done.stdout))
        shown = {key: value if key == "compactions" else f"{value / 2**20:.1f} MiB" for key, value in rows[-1].items()}
        print(shown, flush=True)
    slope, intercept = np.polyfit([row["cap"] for row in rows], [row["rss"] for row in rows], 1)
    print(f"slope {slope:.3f}, intercept {intercept / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
