"""Ctrl-C at every line of agentmem that a session runs: it goes on with the right tokens, wherever the interrupt came.

    python -m benchmarks.interrupts [--scenario generate ...] [--each 2] [--seed 0]

Each scenario does one thing to a session on a tiny model. It is run once undisturbed, which counts the lines and says
what follows; then again for each line, from the beginning, with a KeyboardInterrupt there. What was interrupted is done
again where it had not taken effect, and gone on with where it had. Then the ids, scores and compactions, the bytes that
are accounted and what the session does next must be those of the undisturbed run. Lines run many times are interrupted
at ``--each`` of them: the first, the last, and others drawn by the seed.
"""

from __future__ import annotations

import argparse
import dis
import random
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from agentmem import hf
from agentmem.errors import SnapshotRefused
from agentmem.memory.memory import Memory
from agentmem.sessions import Runtime, Session

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the tiny chat model is the tests'

from support import tiny_chat

SOURCES = str(Path(hf.__file__).parents[1])
TEXT = "a long way to go, and on and on"
NEW = 5
SAME_SCORES = 1e-3

Line = tuple[str, int]
"""A file below ``agentmem``, and a line of it."""


# ---- lines


@contextmanager
def traced(visit: Callable[[FrameType], None]) -> Iterator[None]:
    """Call ``visit`` at each line of agentmem that this thread runs in the block, where a signal can be handled."""

    def enter(frame: FrameType, event: str, _: object) -> Any:  # noqa: ARG001  # the signature of a trace function
        return line if frame.f_code.co_filename.startswith(SOURCES) else None

    def line(frame: FrameType, event: str, _: object) -> Any:
        if event == "line" and frame.f_lasti not in exits(frame.f_code):
            visit(frame)
        return line

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


@cache
def exits(code: CodeType) -> frozenset[int]:
    """The instructions at which Python reaches a line and handles no signal, though a trace function is called.

    These are the calls of ``__exit__(None, None, None)``, where the line of a ``with`` statement is reached again, and
    lines that do nothing, as ``try:`` does. An interrupt there could leave a lock of the statement taken.
    """
    steps = list(dis.get_instructions(code))
    lines = ((at, step) for at, step in enumerate(steps) if step.starts_line)
    return frozenset(step.offset for at, step in lines if step.opname == "NOP" or _calls_exit(steps[at : at + 7]))


def _calls_exit(steps: list[dis.Instruction]) -> bool:
    steps = [step for step in steps if step.opname not in {"SWAP", "NOP", "PRECALL"}]
    nothing = [step.opname.startswith("LOAD_CONST") and step.argval is None for step in steps[:3]]
    return len(steps) > 3 and all(nothing) and steps[3].opname.startswith("CALL")


def is_free(lock: Any) -> bool:
    """Whether another thread could take a lock now."""
    taken: list[bool] = []
    other = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False) and not lock.release()))
    other.start()
    other.join()
    return taken[0]


def place(frame: FrameType) -> Line:
    """Where a frame is."""
    return frame.f_code.co_filename.removeprefix(SOURCES).lstrip("/\\"), frame.f_lineno


def interrupted(act: Callable[[], object], at: int) -> Line | None:
    """Do something with an interrupt at its ``at``-th line; where that is, ``None`` if there are fewer lines."""
    seen, found = 0, list[Line]()

    def visit(frame: FrameType) -> None:
        nonlocal seen
        seen += 1
        if seen == at + 1:
            found.append(place(frame))
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt), traced(visit):
        act()
    return found[0] if found else None


# ---- what is done


@dataclass
class World:
    """A runtime with sessions, and what a scenario knows of them."""

    made: Runtime
    session: Session
    other: Session
    folder: Path
    before: int = 0
    forks: list[Session] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """The ids of each session, the scores of its slots, and what its compactions left; see :meth:`differs`."""

    ids: list[list[int]]
    scores: list[list[float]]
    compactions: list[list[tuple[int, ...]]]

    def differs(self, wanted: Outcome) -> str:
        """What is not as in ``wanted``; empty if nothing is. Other cuts round the sums of scores in other ways."""
        if self.ids != wanted.ids:
            return "other tokens"
        if self.compactions != wanted.compactions:
            return f"other compactions: {self.compactions} for {wanted.compactions}"
        pairs = zip(self.scores, wanted.scores, strict=True)
        near = all(torch.allclose(*map(torch.tensor, pair), rtol=0, atol=SAME_SCORES) for pair in pairs)
        return "" if near else "other scores"


@dataclass(frozen=True)
class Scenario:
    """``act`` is interrupted; ``resume`` brings it to its end where it is not there."""

    begin: Callable[[Path], World]
    act: Callable[[World], object]
    resume: Callable[[World], object]


def hold(true: bool, otherwise: str) -> None:  # noqa: FBT001  # reads as a sentence
    """Whether what must be true is."""
    if not true:
        raise AssertionError(otherwise)


def _world(leases: float = 1, tokens: int = 40, *, policy: str = "am-halving", **options: Any) -> World:
    made = tiny_chat.runtime(leases, policy, **options)
    session = made.session()
    session.append("system", "be kind")
    session.append("user", "x" * tokens)
    return World(made, session, session, Path(), before=len(session.ids))


def _replying(_: Path) -> World:
    world = _world()
    world.session.generate(max_new_tokens=4, do_sample=False, keep_open=True)
    world.before = len(world.session.ids)
    return world


def _retry(act: Callable[[World], object]) -> Callable[[World], None]:
    """Do it again where nothing of it has taken effect."""

    def resume(world: World) -> None:
        if len(world.session.ids) == world.before:
            act(world)

    return resume


def _append(world: World) -> None:
    world.session.append("user", TEXT)


def _read(world: World) -> None:
    world.session.read(tiny_chat.ids(30))


def _say(world: World) -> None:
    world.session.say("and so")


def _generate(world: World) -> None:
    world.session.generate(max_new_tokens=NEW, do_sample=False, keep_open=True)


def _generate_rest(world: World) -> None:
    reply = world.session.reply
    left = NEW - (0 if reply is None else len(reply.ids))
    if left:
        world.session.generate(max_new_tokens=left, do_sample=False, keep_open=True)


def _compact(world: World) -> None:
    world.session.compact()


def _compact_rest(world: World) -> None:
    if not world.session.stats.compactions:
        world.session.compact()


def _unpin(world: World) -> None:
    """What was pinned and promoted is unpinned, and moves back at the compaction that reading takes."""
    world.session.unpin(0, world.before)
    _read(world)


def _unpin_rest(world: World) -> None:
    world.session.unpin(0, world.before)
    _retry(_read)(world)


def _asking(_: Path) -> World:
    """A request that has left the recent window of a memory that is almost full; the reply needs a compaction."""
    made = tiny_chat.runtime(1, slots=96)
    session = made.session()
    session.read(tiny_chat.ids(60))
    session.append("user", "a")
    session.read(tiny_chat.ids(22, 1))
    hold(session.stats.request_tokens > 0, "the request does not fit")
    return World(made, session, session, Path(), before=len(session.ids))


def _answer(world: World) -> None:
    _generate(world)
    hold(world.session.stats.compactions > 0, "nothing was compacted")
    _append(world)


def _answer_rest(world: World) -> None:
    if world.session.reply is not None or len(world.session.ids) == world.before:
        _generate_rest(world)
        _append(world)


def _save(world: World) -> None:
    world.session.save(world.folder)


def _saved_or_not(world: World) -> None:
    """The folder holds the whole session, or no snapshot."""
    with tiny_chat.runtime(1) as other, suppress(SnapshotRefused):
        hold(list(other.load(world.folder).ids) == list(world.session.ids), "another session was saved")
    _save(world)
    with tiny_chat.runtime(1) as other:
        hold(list(other.load(world.folder).ids) == list(world.session.ids), "another session was saved")


def _saving(folder: Path) -> World:
    world = _replying(folder)
    world.folder = Path(tempfile.mkdtemp(dir=folder))
    return world


def _fork(world: World) -> None:
    world.session.fork()


def _forks_go_on(world: World) -> None:
    """Whatever sessions there are share one past."""
    for each in world.made.sessions:
        hold(list(each.ids) == list(world.session.ids), "a fork has other ids")
        hold(each.holding in world.made.leases.holdings, "nothing is charged for a fork")


def _on_fork(world: World) -> None:
    world.forks[0].append("user", TEXT)


def _forked(_: Path) -> World:
    world = _world(2.2)
    world.forks.append(world.session.fork())
    return world


def _on_fork_rest(world: World) -> None:
    if len(world.forks[0].ids) == world.before:
        _on_fork(world)


def _crowded(folder: Path) -> World:
    world = _world(1, pressure=("trim", "disk"), spill=folder / "spill")
    world.session = tiny_chat.filled(world.made, 20)
    world.before = len(world.session.ids)
    return world


def _come_back(world: World) -> None:
    """The session that was on disk has a turn, for which the other one goes there."""
    world.other.append("user", TEXT)


def _come_back_rest(world: World) -> None:
    if "user" not in [entry.role for entry in world.other.entries[2:]]:
        _come_back(world)


FEW = {"max_position_embeddings": 160}

SCENARIOS: dict[str, Scenario] = {
    "append": Scenario(_replying, _append, _retry(_append)),
    "read": Scenario(lambda _: _world(), _read, _retry(_read)),
    "say": Scenario(_replying, _say, _retry(_say)),
    "generate": Scenario(lambda _: _world(), _generate, _generate_rest),
    "compact": Scenario(lambda _: _world(), _compact, _compact_rest),
    "scores": Scenario(lambda _: _world(policy="heavy-hitters"), _read, _retry(_read)),
    "re-base": Scenario(lambda _: _world(tokens=100, on=tiny_chat.model(**FEW), rebase=True), _read, _retry(_read)),
    "unpin": Scenario(lambda _: _world(), _unpin, _unpin_rest),
    "request": Scenario(_asking, _answer, _answer_rest),
    "save": Scenario(_saving, _save, _saved_or_not),
    "fork": Scenario(lambda _: _world(2.2), _fork, _forks_go_on),
    "on a fork": Scenario(_forked, _on_fork, _on_fork_rest),
    "disk": Scenario(_crowded, _come_back, _come_back_rest),
}


# ---- runs


def outcome(world: World, scenario: Scenario) -> Outcome:
    """Bring what was begun to its end and go on; what each session of the scenario then is."""
    scenario.resume(world)
    sessions = list(dict.fromkeys([world.session, world.other, *world.forks]))
    found = Outcome([], [], [])
    for each in sessions:
        each.generate(max_new_tokens=4, do_sample=False)
        each.append("user", "and then?")
        each.generate(max_new_tokens=3, do_sample=False, keep_open=True)
        found.ids.append(list(each.ids))
        found.scores.append(_scores(each.memory))  # now: the next session's turn may move this memory to disk
        found.compactions.append(_compactions(each.memory))
    tiny_chat.audit(world.made)
    hold(not any(each.busy for each in world.made.sessions), "a session is in mid-turn for ever")
    return found


def _scores(memory: Memory) -> list[float]:
    stores = [store for store in memory.sequences[0].stores if store is not None]
    heads = [(store, *place) for store in stores for place in zip(store.starts, store.lengths, strict=True)]
    return [
        score
        for store, start, length in heads
        if store.scores is not None
        for score in store.scores[start : start + length].tolist()
    ]


def _compactions(memory: Memory) -> list[tuple[int, ...]]:
    """What the reports say of each compaction, and last how many the sequence counts."""
    said = [(report.index, report.tokens_seen, report.slots_after) for report in memory.compactions]
    return [*said, (memory.sequences[0].compactions,)]


def undisturbed(scenario: Scenario, folder: Path) -> tuple[list[Line], Outcome]:
    """The lines that a scenario runs, in order, and how it comes out."""
    world, lines = scenario.begin(folder), list[Line]()
    with world.made:
        with traced(lambda frame: lines.append(place(frame))):
            scenario.act(world)
        return lines, outcome(world, scenario)


def chosen(lines: list[Line], each: int, dice: random.Random) -> list[int]:
    """Which lines are interrupted: each one, where it is run often at its first, its last and some other times."""
    times = defaultdict[Line, list[int]](list)
    for at, line in enumerate(lines):
        times[line].append(at)
    found = set[int]()
    for at in times.values():
        ends = [at[0], at[-1]][:each]
        found |= {*ends, *dice.sample(at, min(len(at), max(0, each - len(ends))))}
    return sorted(found)


def trial(scenario: Scenario, at: int, wanted: Outcome, folder: Path) -> str | None:
    """What is wrong after an interrupt at a line; ``None`` if nothing is."""
    world = scenario.begin(folder)
    with world.made:
        where = interrupted(lambda: scenario.act(world), at)
        try:
            found = outcome(world, scenario)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is a fault
            said = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            said = found.differs(wanted) or ("" if is_free(world.made.scheduler.lock) else "the lock is still taken")
        for each in world.made.sessions:
            each.turn = None  # or the runtime could not be closed
    return f"{where[0]}:{where[1]}: {said}" if where is not None and said else None


def main() -> None:
    """Run the scenarios that are named, all of them without names."""
    parser = argparse.ArgumentParser(description="Ctrl-C at every line of a session's work")
    parser.add_argument("--scenario", nargs="*", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--each", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    wrong = 0
    for name in given.scenario:
        with tempfile.TemporaryDirectory() as folder:
            lines, wanted = undisturbed(SCENARIOS[name], Path(folder))
            places = chosen(lines, given.each, random.Random(given.seed))  # noqa: S311  # no secret
            faults = 0
            for at in places:
                if (said := trial(SCENARIOS[name], at, wanted, Path(folder))) is not None:
                    faults += 1
                    print(f"  {said}", flush=True)
        wrong += faults
        print(f"{name}: {len(lines)} lines run, {len(places)} interrupted, {faults} faults", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
