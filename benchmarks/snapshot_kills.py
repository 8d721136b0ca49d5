"""Savers killed in the middle, and snapshots damaged or forged: what is loaded, and what is refused.

    python -m benchmarks.snapshot_kills [--kills 200] [--corruptions 200] [--mib 4]

A child saves one version after another into the same folder and tells each begin and each end. Half of the children are
killed from outside at a random time, half end themselves at a random call of the system's (open, write, fsync, rename,
unlink ...) in the middle of a save. After each death the folder must load, exactly as it was saved, as the last version
whose save had ended or as the one whose save had begun. The next child goes on in the same folder.

Each corruption (``benchmarks/snapshot_damage.py``) does one thing to a whole snapshot, which must then be refused with
SnapshotRefused.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from agentmem.errors import SnapshotRefused
from agentmem.sessions.snapshots.files import TensorSpec, read_snapshot, write_snapshot
from benchmarks.snapshot_damage import CORRUPTIONS

IDENTITY = {"model": "5f" * 32, "tokenizer": "a0" * 32}
CALLS = {"open", "write", "flush", "fsync", "close", "replace", "unlink", "mkdir", "listdir", "scandir", "flock"}
MAX_BYTES = 1 << 30


def content(number: int, elements: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and a state that tell their version by every value."""
    tensors = {
        "layer.0.keys": (torch.arange(elements, dtype=torch.float32) + number).reshape(-1, 4),
        "layer.0.values": torch.full((elements // 4, 4), number % 251, dtype=torch.bfloat16),
        "ids": torch.full((elements // 8,), number, dtype=torch.int64),
        "ended": torch.tensor([number % 2 == 0, True]),
        "empty": torch.zeros(0, 4),
    }
    return tensors, {"number": number, "turns": [{"text": f"turn {number}", "score": number / 7}] * 5}


def same(loaded: tuple[Mapping[str, torch.Tensor], Any], number: int, elements: int) -> bool:
    """Whether what was loaded is version ``number``, bit for bit."""
    (tensors, state), (expected, expected_state) = loaded, content(number, elements)
    return (
        state == expected_state
        and tensors.keys() == expected.keys()
        and all(tensors[name].dtype == value.dtype for name, value in expected.items())
        and all(torch.equal(tensors[name], value) for name, value in expected.items())
    )


def saver(told: Connection, folder: str, first: int, elements: int, end_at: int | None) -> None:
    """Save version after version; ``end_at``: die at this call to the system, counted from the second save on."""
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them for ever
    for number in count(first):
        told.send(("begun", number))
        if end_at is not None and number > first:
            sys.setprofile(_dying(end_at))
        write_snapshot(folder, *content(number, elements), identity=IDENTITY)
        sys.setprofile(None)
        told.send(("ended", number))


def _dying(end_at: int) -> Callable[[FrameType, str, Any], None]:
    seen = 0

    def watch(_frame: FrameType, event: str, called: Any) -> None:
        nonlocal seen
        if event == "c_call" and called.__name__ in CALLS:
            seen += 1
            if seen >= end_at:
                os._exit(9)  # no buffer is flushed and nothing is cleaned up, as when the system kills

    return watch


def calls_of_a_save(folder: Path, elements: int) -> int:
    """How many calls of :data:`CALLS` a save over another one makes."""
    seen = 0

    def watch(_frame: FrameType, event: str, called: Any) -> None:
        nonlocal seen
        seen += event == "c_call" and called.__name__ in CALLS

    write_snapshot(folder, *content(0, elements), identity=IDENTITY)
    sys.setprofile(watch)
    write_snapshot(folder, *content(0, elements), identity=IDENTITY)
    sys.setprofile(None)
    return seen


def where(folder: Path, loaded: int, ended: int) -> str:
    """Where in a save a death fell, by what it left behind."""
    names = [path.name for path in folder.iterdir()]
    if any(name.endswith(".scratch") for name in names):
        return "new manifest written, not yet renamed"
    left = sum(name.startswith(("state-", "tensors-")) for name in names) > 2
    if loaded > ended:
        return "renamed, old files not all deleted" if left else "renamed, old files deleted"
    return "data files being written" if left else "nothing written yet"


def kills(folder: Path, number: int, elements: int, dice: random.Random) -> tuple[Counter[str], int]:
    """Kill ``number`` savers; count where, and how many deaths lost or spoiled anything."""
    forking = "fork" in multiprocessing.get_all_start_methods()
    processes = multiprocessing.get_context("fork" if forking else "spawn")
    calls = calls_of_a_save(folder, elements)
    started = time.perf_counter()
    write_snapshot(folder, *content(0, elements), identity=IDENTITY)
    seconds = time.perf_counter() - started
    ended, found, faults = 0, Counter[str](), 0
    for index in range(number):
        here, there = processes.Pipe(duplex=False)
        end_at = dice.randint(1, calls) if index % 2 else None
        child = processes.Process(target=saver, args=(there, str(folder), ended + 1, elements, end_at))  # type: ignore[attr-defined]
        child.start()
        there.close()
        begun, ended = _follow(here, child, None if end_at else dice.uniform(0, 4 * seconds), ended)
        try:
            loaded = read_snapshot(folder, identity=IDENTITY, max_bytes=MAX_BYTES)
            version = int(loaded[1]["number"])
            good = version in {ended, begun} and same(loaded, version, elements)
        except SnapshotRefused as refusal:
            print(f"LOST after kill {index}: {refusal}")
            version, good = ended, False
        faults += not good
        found[where(folder, version, ended)] += 1
        ended = version
    return found, faults


def _follow(told: Connection, child: Any, kill_after: float | None, ended: int) -> tuple[int, int]:
    """Listen until the child is dead; the last versions whose save had begun and had ended."""
    begun = ended
    deadline = None
    with suppress(EOFError):
        while True:
            if kill_after is not None and begun > ended and deadline is None:  # counted from the first save
                deadline = time.perf_counter() + kill_after
            if deadline is not None and not told.poll(max(0.0, deadline - time.perf_counter())):
                child.kill()
                deadline = None
                kill_after = None
            kind, number = told.recv()
            begun, ended = (number, ended) if kind == "begun" else (begun, number)
    child.join()
    return begun, ended


def refuse_others(state: dict[str, Any], tensors: Mapping[str, TensorSpec]) -> None:
    """The reader's own check: tensors are named as expected."""
    if tensors.keys() != content(0, 1024)[0].keys() or "number" not in state:
        raise ValueError("its tensors are not those of this experiment")


def corruptions(folder: Path, number: int, dice: random.Random) -> dict[str, Counter[str]]:
    """Do ``number`` corruptions, each to a fresh snapshot; count the outcomes of each kind."""
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in CORRUPTIONS}
    write_snapshot(folder / "whole", *content(5, 1024), identity=IDENTITY)
    for index in range(number):
        name = list(CORRUPTIONS)[index % len(CORRUPTIONS)]
        victim = shutil.copytree(folder / "whole", folder / "victim")
        CORRUPTIONS[name](victim, dice)
        try:
            loaded = read_snapshot(victim, identity=IDENTITY, max_bytes=1 << 20, check=refuse_others)
            outcome = "loaded as saved" if same(loaded, 5, 1024) else "ACCEPTED"
        except SnapshotRefused:
            outcome = "refused"
        except Exception as error:  # noqa: BLE001  # any other exception is what this looks for
            outcome = f"RAISED {type(error).__name__}: {str(error)[:100]}"
        outcomes[name][outcome] += 1
        shutil.rmtree(victim)
    return outcomes


def main() -> int:
    """Print both tables; 1 if anything was lost, spoiled or accepted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--corruptions", type=int, default=200)
    parser.add_argument("--mib", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    dice, elements = random.Random(given.seed), int(given.mib * (1 << 20)) // 8 // 64 * 64  # noqa: S311  # no secret
    with tempfile.TemporaryDirectory() as scratch:
        found, lost = kills(Path(scratch, "kills"), given.kills, elements, dice)
        write_snapshot(Path(scratch, "kills"), *content(0, 64), identity=IDENTITY)
        left = len([path for path in Path(scratch, "kills").iterdir() if path.suffix != ".lock"]) - 3
        outcomes = corruptions(Path(scratch), given.corruptions, dice)
    print(f"{given.kills} kills while saving {given.mib:g} MiB: {lost} lost or spoiled")
    for place, times in found.most_common():
        print(f"  {times:4}  {place}")
    print(f"files left over after the next save: {left}")
    total = sum(outcomes.values(), Counter())
    print(f"{given.corruptions} corruptions: {dict(total)}")
    for name, counts in outcomes.items():
        print(f"  {name:36} " + ", ".join(f"{times} {outcome}" for outcome, times in counts.items()))
    return 0 if not lost and not left and set(total) <= {"refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
