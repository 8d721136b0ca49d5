"""Peak of all allocations of a process, native libraries' own included, against the cap.

    python -m benchmarks.allocations [--policies window,am-halving] [--dtypes bfloat16] [--threads 1,2] [--small]

A cell is a policy, a dtype, a number of threads and a case of ``allocation_cases.py``. The cells of one policy, dtype
and number of threads run in a process of their own, forked from one that has imported everything and computed nothing,
under ``allocations.c`` (Linux with glibc and a C compiler). A cell's peak is that of the capped use minus A, which is
that of the largest forward of its pieces' widths whose attention allocates nothing but its output. It must be at most
the cap, which is planned to suffice for the cell's slots and no more. Bytes of ours beyond the cap could hide only
while the model's own modules hold less than A, and no more than that.

What MKL's products pack into, the model's and ours, is printed apart, the most so far in the process: MKL keeps a
buffer for each thread, whatever the shapes, and makes it in whichever call first gets a thread that has none.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "float32+int8", "bfloat16+int8")
"""The model's, with that of the slots after a plus sign where it is another."""
THREADS = (1, 2, 4)
SMALL = (("window",), ("bfloat16",), (1,))


def main() -> int:
    """Print a line a cell, what was refused, the number of cells and the worst of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few cells only, for tests")
    parser.add_argument("--policies", default="", help="commas between them; default: every one that compacts")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--threads", default=",".join(map(str, THREADS)))
    parser.add_argument("--groups", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.groups:
        return _forked(json.loads(given.groups))
    groups = (
        _listed(given.policies) or _every(),
        _listed(given.dtypes),
        [int(each) for each in _listed(given.threads)],
    )
    with tempfile.TemporaryDirectory() as folder:
        cells = [_shown(cell) for cell in measured(Path(folder), *(SMALL if given.small else groups))]
    ran = [cell for cell in cells if "refused" not in cell]
    worst = max((cell["peak"] / cell["cap"] for cell in ran), default=0.0)
    print(f"{len(ran)} cells, {len(cells) - len(ran)} refused, worst peak/cap {worst:.3f}")
    return int(worst > 1)


def _listed(text: str) -> list[str]:
    return [each for each in text.split(",") if each]


def _every() -> list[str]:
    """Every policy but that which never compacts; tiny models have no table of head shares."""
    from agentmem import plugins
    from agentmem.policies.budgets.calibrated import Calibrated

    found = {name: plugins.policy(name) for name in plugins.names() if name != "full"}
    tabled = [name for name, policy in found.items() if isinstance(policy.budgets, Calibrated)]
    return [f"{name}[budgets=global]" if name in tabled else name for name in found]


def _shown(cell: dict[str, Any]) -> dict[str, Any]:
    if "refused" in cell:
        print(f"{cell['name']:60} refused: {cell['refused']:.80}", flush=True)
    else:
        figures = f"cap {cell['cap']:>11,}  peak {cell['peak']:>11,}  {cell['peak'] / cell['cap']:.3f}"
        print(f"{cell['name']:60} {figures}  A {cell['plain']:>11,}  MKL's buffers {cell['products']:>11,}", flush=True)
    return cell


def measured(
    folder: Path, policies: Sequence[str], dtypes: Sequence[str], threads: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Name, cap, peak, plain and products of each cell; a process for each policy, dtype and number of threads."""
    library = folder / "allocations.so"
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("no C compiler (cc) was found, and the account of allocations is compiled; install one")
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    yield from _child(library, list(product(policies, dtypes, threads)))


def _child(library: Path, groups: list[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.allocations", "--groups", json.dumps(groups)]
    environment = os.environ | {"LD_PRELOAD": str(library)}
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=root) as run:
        assert run.stdout is not None  # noqa: S101  # it is a pipe
        yield from (json.loads(line) for line in run.stdout if line.startswith("{"))
    if run.returncode:
        raise SystemExit(f"the measuring process ended with {run.returncode}")


def _forked(groups: list[list[Any]]) -> int:
    """Run each group in a forked process, so that imports are paid once; nothing was computed before, by any thread."""
    import benchmarks.allocation_cases  # noqa: F401

    for group in groups:
        child = os.fork()
        if not child:
            try:
                _cells(*group)
            except BaseException:  # noqa: BLE001  # whatever it is: the child must not go on as its parent
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print(f"the process of {group} failed", file=sys.stderr)
            return 1
    return 0


def _cells(policy: str, dtype: str, threads: int) -> None:
    import torch

    from agentmem.errors import AgentmemError
    from benchmarks.allocation_cases import CASES, measure

    torch.set_num_threads(threads)
    own, _, slots = dtype.partition("+")
    for name, case in CASES.items():
        cell: dict[str, Any] = {"name": f"{policy}, {dtype}, {threads} thread(s), {name}"}
        try:
            cell |= measure(case, policy, getattr(torch, own), slots or "auto")
        except AgentmemError as error:
            cell["refused"] = str(error)
        print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    sys.exit(main())
