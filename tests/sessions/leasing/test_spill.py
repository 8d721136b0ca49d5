"""Spill folders: private, of one owner each, and deleted when the owner is gone."""

from __future__ import annotations

import gc
import json
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from agentmem.errors import AgentmemError
from agentmem.sessions.leasing.spill import Spill
from support import forked, tiny_chat

KILLED = (
    "import os, sys, pathlib; from agentmem.sessions.leasing.spill import Spill; "
    "spill = Spill(*map(pathlib.Path, sys.argv[2:])); "
    "(spill.folder() / 'x').write_text('said'); int(sys.argv[1]) and os._exit(9)"
)


def run(place: Path | None, *, killed: bool = True, **variables: str) -> None:
    """A process that leaves a file in its spill folder, killed or at its end."""
    words = [str(int(killed)), *([] if place is None else [str(place)])]
    done = forked.run([sys.executable, "-c", KILLED, *words], env={**os.environ, **variables})
    assert done.returncode == (9 if killed else 0), done.stderr


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    """The next owner of the same folder deletes what has no owner any more."""
    place = tmp_path / "spill"
    living = Spill(place)
    mine = living.folder()
    for _ in range(2):
        run(place)
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


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the system's temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_default_folder_is_cleaned_at_the_next_start(temporary: Path) -> None:
    """Without ``spill=`` conversations lie in a private folder that the next runtime sweeps after a kill."""
    run(None, TMPDIR=str(temporary))
    (left,) = temporary.rglob("x")
    assert left.read_text() == "said"

    with tiny_chat.runtime(1):
        assert list(temporary.rglob("x")) == []


def test_a_process_that_ends_without_closing_leaves_nothing(temporary: Path) -> None:
    """The folder goes at the interpreter's end, too, and when a runtime is dropped."""
    run(None, killed=False, TMPDIR=str(temporary))
    assert list(temporary.rglob("agentmem-runtime-*")) == []

    made = tiny_chat.runtime(1, pressure=("disk",))
    tiny_chat.filled(made, 20)
    tiny_chat.filled(made, 20)
    assert list(temporary.rglob("tensors-*"))
    del made
    gc.collect()
    assert list(temporary.rglob("agentmem-runtime-*")) == []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no users on this system")
def test_a_default_folder_that_others_can_read_is_not_used(temporary: Path) -> None:
    """Somebody else may have made the folder of the usual name: nothing is written there, and the remedy is named."""
    place = temporary / f"agentmem-{os.getuid()}"
    place.mkdir()
    place.chmod(0o777)
    with tiny_chat.runtime(1, pressure=("disk",)) as made:
        session = tiny_chat.filled(made, 20)
        with pytest.raises(AgentmemError, match=r"not a folder of this user alone.*spill="):
            made.session().read(tiny_chat.ids(20))
        assert list(place.iterdir()) == []
        assert session.stats.state == "idle"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")  # torch's others are the parent's alone, and the child would wait for them
def test_a_forked_process_has_files_of_its_own(tmp_path: Path) -> None:
    """A memory on disk goes on in the child and in the parent; the child's end takes nothing of the parent's."""
    with tiny_chat.runtime(1, pressure=("disk",), spill=tmp_path) as made:
        away, here = tiny_chat.filled(made, 40), tiny_chat.filled(made, 30, seed=1)
        folder = made.folder()
        assert (away.stats.state, here.stats.state) == ("on disk", "idle")
        child = os.fork()
        if child == 0:
            try:
                own = made.folder() != folder and list(made.folder().glob("idle-*"))
                tokens = tiny_chat.on(away, 4)
                tiny_chat.on(here, 2)
                made.close()
                (tmp_path / "tokens").write_text(json.dumps(tokens if own else []))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert folder.is_dir()
        assert list(tmp_path.glob("agentmem-runtime-*")) == [folder]
        assert tiny_chat.on(away, 4) == json.loads((tmp_path / "tokens").read_text())
    assert list(tmp_path.glob("agentmem-runtime-*")) == []
