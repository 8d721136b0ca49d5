"""Sessions of the default model: cancelled at any moment, sixteen under a cap for four, killed and forged snapshots.

    python -m benchmarks.sessions [cancels] [many] [kills] [--cancels 100] [--kills 200] [--forged 200] [--seed 0]

Each part prints a table and says whether what it is about held; the exit status is 1 if something did not.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from agentmem import models
from agentmem.errors import SnapshotRefused
from agentmem.memory.ledger import Ledger
from agentmem.sessions import Runtime, Session, TokenEvent
from benchmarks.session_damage import FORGERIES, forge
from benchmarks.snapshot_damage import CORRUPTIONS
from benchmarks.snapshot_kills import CALLS

SETTINGS: dict[str, Any] = {"keep_recent": 32, "max_slots": 160, "chunk": 256}
LEASE = 20 << 20
SLOWEST = 2.0
"""Seconds to the latest cancel: a compaction that goes on runs its probe through the layers that are done again."""
TOPICS = ("the tides", "a loaf of bread", "the night train", "winter wheat", "an old clock", "the far side of the moon")
PLAIN = [
    name
    for name in CORRUPTIONS
    if name not in {"forged: tensors", "forged: header", "forged: booleans"}  # they need other tensors than these
]
"""Ways to damage any snapshot's files."""


def message(number: int, turn: int) -> str:
    """What is said in a turn of one of many conversations."""
    topic = TOPICS[(number + turn) % len(TOPICS)]
    return f"Part {turn} of story {number} is about {topic}. " + f"Tell me more about {topic}, please. " * 4


def digest(session: Session) -> str:
    """All that a session's memory holds, and its ids, in 64 hexadecimal digits."""
    made = hashlib.sha256(repr(list(session.ids)).encode())
    for store in session.memory.sequences[0].stores:
        for head in range(0 if store is None else len(store.lengths)):
            assert store is not None  # noqa: S101  # there are no heads without one
            segment = store.segment(head, 0, 0)
            for tensor in (segment.keys, segment.values, segment.bias):
                made.update(tensor.numpy().tobytes())
    return made.hexdigest()


# ---- cancels


async def cancels(model: Any, tokenizer: Any, number: int, dice: random.Random) -> bool:
    """Cancel a reply ``number`` times at random moments; compare it with one that was never cancelled."""
    options: dict[str, Any] = {"max_new_tokens": 4000, "min_new_tokens": 4000, "do_sample": False, "keep_open": True}
    with Runtime(model, tokenizer, cap=2 * LEASE, share=0.5, **SETTINGS) as runtime:
        session, twin = runtime.session(), runtime.session()
        for each in (session, twin):
            each.append("user", message(0, 0))
        began, first = time.perf_counter(), 0.0
        async for event in session.astream(**options | {"max_new_tokens": 12, "min_new_tokens": 12}):
            first = first or (time.perf_counter() - began if isinstance(event, TokenEvent) else 0.0)
        whole, states, longest = time.perf_counter() - began, Counter[str](), 0.0
        for _ in range(number):
            before = len(session.ids)
            task = asyncio.create_task(_consume(session, options))
            await asyncio.sleep(dice.uniform(0, SLOWEST))
            stopped = time.perf_counter()
            task.cancel()
            await asyncio.wait([task])
            longest = max(longest, time.perf_counter() - stopped)
            states[_state(session, wrote=len(session.ids) > before)] += 1
        _write(session, 8, options)
        tokens = len(session.ids) - session.reply_start
        _write(twin, tokens, options)
        equal = list(session.ids) == list(twin.ids) and digest(session) == digest(twin)
        print(f"first event after {first:.2f} s of {whole:.2f} s; {number} cancels, each done within {longest:.2f} s")
        for state, times in sorted(states.items()):
            print(f"  {times:4}  {state}")
        print(f"  {tokens} tokens, {session.stats.compactions} compactions; equal to undisturbed: {equal}")
        return equal and first < whole


async def _consume(session: Session, options: dict[str, Any]) -> None:
    async for _ in session.astream(**options):
        pass


def _write(session: Session, tokens: int, options: dict[str, Any]) -> None:
    session.generate(**options | {"max_new_tokens": tokens, "min_new_tokens": tokens})


def _state(session: Session, *, wrote: bool) -> str:
    """Where a cancel fell, by what it left."""
    row = session.memory.sequences[0]
    if row.job is None:
        return "between forwards, tokens written" if wrote else "before or in the first forward"
    held = [(row.job.held(index, store), row.job.budgets[index]) for index, store in enumerate(row.stores) if store]
    done = sum(all(now <= kept for now, kept in zip(*layer, strict=True)) for layer in held)
    return f"in a compaction, {done:2} of {len(held)} layers done"


# ---- many


async def many(model: Any, tokenizer: Any, sessions: int = 16, leases: int = 4, turns: int = 3) -> bool:
    """More sessions than leases: tokens against those that each has alone, bytes, and how long one waits."""
    alone = []
    with Runtime(model, tokenizer, cap=LEASE, **SETTINGS) as runtime:
        for number in range(sessions):
            with runtime.session() as session:
                for turn in range(turns):
                    session.append("user", message(number, turn))
                    session.generate(max_new_tokens=12, do_sample=False)
                alone.append(list(session.ids))
    cap, peak, granted, waits, moved = leases * LEASE, _Peak(), list[Session](), list[int](), 0
    options: dict[str, Any] = {"share": LEASE, "pressure": ("trim", "disk"), "wait": 3600.0, **SETTINGS}
    with peak, Runtime(model, tokenizer, cap=cap, **options) as runtime:
        admit = runtime.try_admit

        def noted(session: Session, turn: object) -> bool:
            nonlocal moved
            moved += session.stats.state == "on disk"
            admitted = admit(session, turn)
            granted.extend([session] if admitted else [])
            peak.charged = max(peak.charged, runtime.leases.charged)
            return admitted

        runtime.try_admit = noted  # type: ignore[method-assign]

        async def talk(number: int) -> list[int]:
            session = runtime.session()
            for turn in range(turns):
                asked = len(granted)
                await session.aappend("user", message(number, turn))
                waits.append(granted.index(session, asked) - asked)
                async for _ in session.astream(max_new_tokens=12, do_sample=False):
                    pass
            return list(session.ids)

        found = await asyncio.gather(*map(talk, range(sessions)))
    equal = sum(one == other for one, other in zip(found, alone, strict=True))
    print(f"{sessions} sessions of {turns} turns under a cap for {leases} ({cap:,} bytes)")
    print(f"  charged at most {peak.charged:,}; held and worked with at most {peak.bytes:,}, all memories together")
    print(f"  longest wait: {max(waits)} other turns; mean {sum(waits) / len(waits):.1f}; brought back {moved} times")
    print(f"  {equal} of {sessions} have the tokens that they have alone")
    return equal == sessions and peak.bytes <= cap and peak.charged <= cap and max(waits) < sessions


class _Peak:
    """The most that all memories together ever held and worked with, by their ledgers."""

    def __init__(self) -> None:
        self.bytes = self.charged = 0
        self._ledgers: list[Ledger] = []
        self._undo: tuple[Any, Any] = (Ledger.__init__, Ledger._note)  # noqa: SLF001  # every change is noted there

    def __enter__(self) -> None:
        begin, note = self._undo

        def opened(ledger: Ledger, cap: int) -> None:
            begin(ledger, cap)
            self._ledgers.append(ledger)

        def noted(ledger: Ledger, passing: int = 0) -> None:
            note(ledger, passing)
            self.bytes = max(self.bytes, passing + sum(each.resident + each.transient for each in self._ledgers))

        patched: Any = Ledger
        patched.__init__, patched._note = opened, noted  # noqa: SLF001  # put back below

    def __exit__(self, *_: object) -> None:
        patched: Any = Ledger
        patched.__init__, patched._note = self._undo  # noqa: SLF001  # as they were


# ---- kills and forgeries


def kills(model: Any, tokenizer: Any, number: int, dice: random.Random) -> bool:
    """Kill savers of a session: at a random moment, or at a random call to the system; look at what is there then."""
    outcomes = Counter[str]()
    with Runtime(model, tokenizer, cap=3 * LEASE, share=LEASE, **SETTINGS) as runtime, _scratch() as folder:
        session = runtime.session()
        session.append("user", message(1, 1))
        session.save(folder)
        began, calls = time.perf_counter(), _calls(lambda: session.save(folder))
        seconds, saved = time.perf_counter() - began, digest(session)
        for index in range(number):
            session.read([1000 + index])
            new = digest(session)
            child = multiprocessing.get_context("fork").Process(
                target=_die, args=(session, folder, dice.randint(1, calls + 3) if index % 2 == 0 else 0)
            )
            child.start()
            if index % 2:
                time.sleep(dice.uniform(0, 3 * seconds))
                child.kill()
            child.join()
            with runtime.load(folder) as loaded:
                there = digest(loaded)
            outcomes["the old one" if there == saved else "the new one" if there == new else "LOST"] += 1
            if child.exitcode == 0 and there != new:
                outcomes["PROMISED AND LOST"] += 1
            saved = there
    print(f"{number} kills during saves; what could be loaded then: {dict(outcomes)}")
    return set(outcomes) <= {"the old one", "the new one"}


def _calls(call: Callable[[], object], last: int = 0) -> int:
    """How many calls to the system ``call`` makes; at the ``last`` one the process dies, and nothing is cleaned up."""
    seen = 0

    def watch(_frame: FrameType, event: str, called: Any) -> None:
        nonlocal seen
        if event == "c_call" and called.__name__ in CALLS:
            seen += 1
            if seen == last:
                os._exit(9)

    sys.setprofile(watch)
    call()
    sys.setprofile(None)
    return seen


def _die(session: Session, folder: Path, last: int) -> None:
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them for ever
    _calls(lambda: session.save(folder), last)


def forged(model: Any, tokenizer: Any, number: int, dice: random.Random) -> bool:
    """Load ``number`` snapshots with forged content, and as many with damaged files: all must be refused."""
    outcomes: dict[str, Counter[str]] = {"forged content": Counter(), "damaged files": Counter()}
    policy = "am-halving[probe=live+replay,probe_tokens=128]"
    with (
        Runtime(model, tokenizer, cap=2 * LEASE, policy=policy, share=LEASE, **SETTINGS) as runtime,
        _scratch() as folder,
    ):
        session = runtime.session(seed=1)
        session.append("system", "You are terse, answer in a single short sentence, and never ask anything back.")
        session.append("user", message(2, 0) * 2)
        session.generate(max_new_tokens=8)
        session.append("user", "And then?")
        session.generate(max_new_tokens=4, keep_open=True)
        session.save(folder / "whole")
        session.close()
        for index in range(number):
            name = list(FORGERIES)[index % len(FORGERIES)]
            forge(folder / "whole", folder / "forged", FORGERIES[name], dice)
            outcomes["forged content"][_outcome(runtime, folder / "forged", name)] += 1
            shutil.copytree(folder / "whole", folder / "damaged")
            name = PLAIN[index % len(PLAIN)]
            CORRUPTIONS[name](folder / "damaged", dice)
            outcomes["damaged files"][_outcome(runtime, folder / "damaged", name)] += 1
            shutil.rmtree(folder / "damaged")
    for kind, found in outcomes.items():
        print(f"{number} snapshots with {kind}: {dict(found)}")
    return all(set(found) <= {"refused"} for found in outcomes.values())


def _outcome(runtime: Runtime, folder: Path, name: str) -> str:
    try:
        runtime.load(folder).close()
    except SnapshotRefused:
        return "refused"
    except Exception as error:  # noqa: BLE001  # any other exception is what this looks for
        return f"{name} RAISED {type(error).__name__}: {str(error)[:100]}"
    return f"{name} ACCEPTED"


class _scratch(tempfile.TemporaryDirectory[str]):  # noqa: N801  # used like a function
    """A temporary folder as a path."""

    def __enter__(self) -> Path:  # type: ignore[override]  # a path instead of its name
        """The path."""
        return Path(super().__enter__())


def main() -> int:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["cancels", "many", "kills"], metavar="PART")
    parser.add_argument("--cancels", type=int, default=100)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--forged", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model, tokenizer = models.load(dtype=torch.float32)
    dice, held = random.Random(given.seed), True  # noqa: S311  # no secret
    if "cancels" in given.parts:
        held &= asyncio.run(cancels(model, tokenizer, given.cancels, dice))
    if "many" in given.parts:
        held &= asyncio.run(many(model, tokenizer))
    if "kills" in given.parts:
        held &= kills(model, tokenizer, given.kills, dice)
        held &= forged(model, tokenizer, given.forged, dice)
    print("held" if held else "BROKEN")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
