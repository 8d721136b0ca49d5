"""Snapshots of sessions that are forged, another model's, or cut short by a kill: refused, or whole."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from agentmem.errors import SnapshotRefused
from agentmem.sessions import Runtime, Session
from benchmarks.session_damage import FORGERIES, forge
from benchmarks.snapshot_kills import CALLS
from support import tiny_chat
from support.waiting import LIMIT


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runtime, Path]:
    """A runtime, and a snapshot with pins, compactions, stored queries, a seed, pending ids and an open reply."""
    made = tiny_chat.runtime(2, "am-halving[probe=live+replay,probe_tokens=32]")
    folder = tmp_path_factory.mktemp("rich") / "whole"
    session = made.session(seed=1)
    session.append("system", "be kind")
    session.append("user", "a long way to go " * 5)
    session.generate(max_new_tokens=8)
    session.append("user", "and then?")
    session.generate(max_new_tokens=7, keep_open=True)
    session.save(folder)
    session.close()
    return made, folder


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_snapshot_is_refused(name: str, rich: tuple[Runtime, Path], tmp_path: Path) -> None:
    """Right checksums around anything that no session saves: refused as a snapshot, and nothing of it is kept."""
    made, folder = rich
    dice = random.Random(name)  # noqa: S311  # no secret
    for number in range(6):
        forge(folder, tmp_path / str(number), FORGERIES[name], dice)
        with pytest.raises(SnapshotRefused):
            made.load(tmp_path / str(number))
    assert made.sessions == made.leases.holdings == []
    assert made.stats.charged_bytes == 0


def test_a_forgery_that_changes_nothing_is_loaded(rich: tuple[Runtime, Path], tmp_path: Path) -> None:
    """The refusals are about what was changed: written again as it was, a snapshot is loaded."""
    made, folder = rich
    forge(folder, tmp_path, lambda _parts, _dice: None, random.Random(0))  # noqa: S311  # no secret
    with made.load(tmp_path) as loaded, made.load(folder) as original:
        assert tiny_chat.on(loaded, do_sample=True) == tiny_chat.on(original, do_sample=True)


def test_another_model_or_template_is_named(rich: tuple[Runtime, Path]) -> None:
    """A snapshot of other weights or another chat template is refused by name."""
    _, folder = rich
    others = {
        "weights": (tiny_chat.model(seed=1), tiny_chat.tokenizer()),
        "chat template": (tiny_chat.model(), tiny_chat.tokenizer("{{ messages[0].content }}")),
    }
    for name, (model, tokenizer) in others.items():
        with (
            Runtime(model, tokenizer, cap="4MiB", **tiny_chat.SETTINGS) as made,
            pytest.raises(SnapshotRefused, match=f"another {name}"),
        ):
            made.load(folder)


def killed(session: Session, url: Path, last: int) -> None:
    """Save and die at a call to the system: no buffer is flushed and nothing is cleaned up."""
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them for ever
    calls = count(1)

    def watch(_frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in CALLS and next(calls) == last:
            os._exit(9)

    sys.setprofile(watch)
    session.save(url)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the child has the session by fork")
@pytest.mark.usefixtures("one_thread")  # OpenMP's others are not in the child, which would wait for them
def test_a_kill_at_any_moment_of_a_save_leaves_a_session(tmp_path: Path) -> None:
    """Killed before the new snapshot is whole, the old one is loaded; killed after, the new one."""
    processes, found = multiprocessing.get_context("fork"), set()
    with tiny_chat.runtime(3) as made:
        for last in (1, 4, 9, 14, 20, 26, 30, 36, 500):
            session = tiny_chat.filled(made, 30)
            session.save(tmp_path / str(last))
            session.read(tiny_chat.ids(40, 3))
            child = processes.Process(target=killed, args=(session, tmp_path / str(last), last))
            child.start()
            child.join(LIMIT)
            assert child.exitcode == (0 if last == 500 else 9)
            with made.load(tmp_path / str(last)) as loaded:
                assert loaded.ids[:30] == session.ids[:30]
                found.add(len(loaded.ids))
                assert tiny_chat.on(loaded, 3)
            session.close()
    assert found == {30, 70}
