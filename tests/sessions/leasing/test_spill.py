"""Spill folders: private, of one owner each, and deleted when the owner is gone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem.sessions.leasing.spill import Spill
from support import tiny_chat

KILLED = (
    "import os, sys, pathlib; from agentmem.sessions.leasing.spill import Spill; "
    "(Spill(pathlib.Path(sys.argv[1])).folder() / 'x').write_text('said'); os._exit(9)"
)


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    """The next owner of the same folder deletes what has no owner any more."""
    place = tmp_path / "spill"
    living = Spill(place)
    mine = living.folder()
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, str(place)], check=False)
    assert len(list(place.glob("agentmem-runtime-*"))) == 2  # the living one's, and the last that was killed

    Spill(place)

    assert list(place.glob("agentmem-runtime-*")) == [mine]
    living.close()
    assert not mine.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_what_is_on_disk_is_private_and_goes_with_its_runtime(tmp_path: Path) -> None:
    """Folders are 0700 and files 0600; an orderly end leaves no conversation."""
    place = tmp_path / "spill"
    with tiny_chat.runtime(1, pressure=("disk",), spill=place) as made:
        first = tiny_chat.filled(made, 40)
        tiny_chat.filled(made, 30, seed=1)
        assert first.stats.state == "on disk"
        for path in (place, *place.rglob("*")):
            if path.name != "snapshot.lock":
                assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert [path.name for path in place.iterdir()] in ([], ["spill.lock"])
