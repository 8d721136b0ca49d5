"""Peak of all allocations of a process, native libraries' own included, against the cap.

    python -m benchmarks.allocations [--small]

Each group of cells runs in a fresh process under ``allocations.c`` (Linux with glibc and a C compiler). A cell's peak
is that of a capped ``generate`` minus A: that of the largest forward of its pieces' widths whose attention allocates
nothing but its output. It must be at most the cap, which is planned to suffice for the cell's slots and no more. Bytes
of ours beyond the cap could hide only while the model's own modules hold less than A, and no more than that.

What MKL's products pack into, the model's and ours, is printed apart, the most so far in the process: MKL keeps a
buffer for each thread, whatever the shapes, and makes it in whichever call first gets a thread that has none.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

POLICIES = ("window", "heavy-hitters", "am-halving")
DTYPES = ("float32", "bfloat16", "float16")
THREADS = (1, 2, 4)
SLOTS = 512
SMALL = (("window",), ("bfloat16",), (1,))


class Case(NamedTuple):
    """A prompt's lengths by row and the model's family."""

    lengths: tuple[int, ...]
    family: str = "llama"


CASES = {
    "long prompt": Case((3000,)),
    "batch": Case((700, 700, 700)),
    "padded batch": Case((700, 650, 400)),
    "sliding layers": Case((1500,), "gemma3_text"),
}


def main() -> int:
    """Print a line a cell, the number of cells and the worst of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few cells only, for tests")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.group:
        return _cells(*json.loads(given.group))
    with tempfile.TemporaryDirectory() as folder:
        cells = measured(Path(folder), small=given.small)
    for cell in cells:
        figures = f"cap {cell['cap']:>11,}  peak {cell['peak']:>11,}  {cell['peak'] / cell['cap']:.3f}"
        print(f"{cell['name']:60} {figures}  A {cell['plain']:>11,}  MKL's buffers {cell['products']:>11,}")
    worst = max(cell["peak"] / cell["cap"] for cell in cells)
    print(f"{len(cells)} cells, worst peak/cap {worst:.3f}")
    return int(worst > 1)


def measured(folder: Path, *, small: bool) -> list[dict[str, Any]]:
    """The cells: name, cap, peak, plain, products. A process for each policy, dtype and number of threads."""
    library = folder / "allocations.so"
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("no C compiler (cc) was found, and the account of allocations is compiled; install one")
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    groups = product(*(SMALL if small else (POLICIES, DTYPES, THREADS)))
    return [cell for group in groups for cell in _child(library, group)]


def _child(library: Path, group: tuple[Any, ...]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.allocations", "--group", json.dumps(group)]
    environment = os.environ | {"LD_PRELOAD": str(library)}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=root)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _cells(policy: str, dtype: str, threads: int) -> int:
    import torch

    torch.set_num_threads(threads)
    for name, case in CASES.items():
        figures = _cell(policy, getattr(torch, dtype), case)
        print(json.dumps({"name": f"{policy}, {dtype}, {threads} thread(s), {name}", **figures}))
    return 0


def _cell(policy: str, dtype: Any, case: Case) -> dict[str, int]:
    import torch

    import agentmem
    from agentmem.testing import tiny_model

    sizes = {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = tiny_model(case.family, dtype=dtype, **sizes)  # type: ignore[arg-type]  # CASES name families
    rows, longest = len(case.lengths), max(case.lengths)
    ids, mask = torch.zeros(rows, longest, dtype=torch.long), torch.zeros(rows, longest, dtype=torch.long)
    for row, length in enumerate(case.lengths):
        ids[row, -length:], mask[row, -length:] = 3 + torch.arange(length) % 100, 1
    settings: dict[str, Any] = {"keep_first": 4, "keep_recent": 16, "chunk": 128, "max_slots": SLOTS}
    plan = agentmem.plan(model, cap=1 << 34, policy=policy, rows=rows, **settings)
    cap = plan.resident_bytes + plan.workspace_bytes

    widths = set[int]()
    model.get_decoder().layers[0].register_forward_pre_hook(lambda _, given: widths.add(given[0].shape[1]))

    def plain(width: int) -> None:
        with torch.no_grad():
            model(input_ids=ids[:, :width], use_cache=False, logits_to_keep=1)

    def capped() -> None:
        with agentmem.capped(model, cap=cap, policy=policy, **settings) as memory:
            model.generate(ids, attention_mask=mask, past_key_values=memory, max_new_tokens=4, do_sample=False)

    peak = _peak(capped)
    _attend_to_nothing(model)
    # of all widths: a library's buffers for the model's own products can be largest for a few tokens
    most = max(_peak(lambda width=width: plain(width)) for width in sorted(widths))  # type: ignore[misc]
    return {"cap": cap, "peak": peak - most, "plain": most, "products": _account().allocations_products()}


def _attend_to_nothing(model: Any) -> None:
    """The model's attention allocates its output and no more: no mask, no copy, no kernel's scratch."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def nothing(
        _module: object, queries: Any, _keys: object, values: Any, *_: object, **__: object
    ) -> tuple[Any, None]:
        rows, heads, tokens, _ = queries.shape
        return values.new_zeros(rows, tokens, heads, values.shape[-1]), None

    AttentionInterface.register("nothing", nothing)
    AttentionMaskInterface.register("nothing", lambda *_, **__: None)
    model.set_attn_implementation("nothing")


def _account() -> Any:
    account = ctypes.CDLL(None)
    for name in ("live", "peak", "products"):
        getattr(account, f"allocations_{name}").restype = ctypes.c_long
    return account


def _peak(call: Callable[[], None]) -> int:
    """Bytes at the peak beyond those before; once to warm up what libraries keep for ever."""
    account = _account()
    call()
    gc.collect()
    account.allocations_restart()
    before = int(account.allocations_live())
    call()
    return int(account.allocations_peak()) - before


if __name__ == "__main__":
    sys.exit(main())
