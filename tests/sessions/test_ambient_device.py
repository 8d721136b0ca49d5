"""A caller's default device, under which a session does all that it does without."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

from agentmem.sessions import Session
from support import tiny_chat as tc


def life(folder: Path, state: AbstractContextManager[object], **options: object) -> list[list[int]]:
    """The ids of a session, its fork and its snapshot after every stage of pressure and a compaction, under a state."""

    def turn(session: Session, word: str) -> Session:
        session.append("user", word, pin=word == "pinned")
        session.generate(max_new_tokens=2)
        assert not [fault for report in session.memory.compactions for fault in report.faults]
        return session

    with tc.runtime(2.2, **options) as made, state:  # type: ignore[arg-type]
        session = turn(turn(made.session(seed=3), "pinned"), "a long way to go and nobody there to ask for it")
        session.save(folder)
        fork = turn(session.fork(), "one")
        loaded = turn(made.load(folder), "two")
        session.compact()
        for each in (session, fork, loaded):
            turn(each, "three")
        return [list(each.ids) for each in (session, fork, loaded)]


@pytest.mark.parametrize(
    ("policy", "pressure"),
    [
        ("am-halving", ("trim", "disk")),
        ("am-halving[probe=random+context+replay]", ("disk",)),
        ("heavy-hitters", ("compact", "disk")),
    ],
)
def test_a_default_device_does_not_matter(policy: str, pressure: tuple[str, ...], tmp_path: Path) -> None:
    """Turns, saves, loads, forks and each stage of pressure give the very tokens that they give without it."""
    plain = life(tmp_path / "one", nullcontext(), policy=policy, pressure=pressure)

    assert life(tmp_path / "two", torch.device("meta"), policy=policy, pressure=pressure) == plain
