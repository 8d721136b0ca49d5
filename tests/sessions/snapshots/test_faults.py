"""Saves that are cut short, killed or made at once, locally and in stores: a whole snapshot is always there."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Self

import fsspec
import pytest
import torch
from filelock import FileLock
from fsspec.implementations.memory import MemoryFileSystem

from agentmem.errors import AgentmemError, SnapshotRefused
from agentmem.sessions.snapshots import files
from agentmem.sessions.snapshots import folder as snapshot_folder
from agentmem.sessions.snapshots.files import read_manifest
from support import forked
from support.snapshot_versions import data_files, load, loaded_version, save, tensors_of

ROOT = Path(__file__).parents[3]
CALLS = {"open", "write", "flush", "fsync", "close", "replace", "unlink", "scandir", "listdir", "mkdir", "flock"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with version 1 in it."""
    save(tmp_path / "snapshot", 1)
    return tmp_path / "snapshot"


class Watch:
    """Profiles this thread: lists the calls to the system and raises ``fault`` at the one numbered ``at``.

    Calls inside filelock are its own affair: an unlock that fails, which no system does, would keep the lock.
    """

    def __init__(self, at: int = 0, fault: BaseException | None = None) -> None:
        self.at, self.fault, self.calls = at, fault, list[str]()

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        """One event of the profiler."""
        if event == "c_call" and called.__name__ in CALLS and "filelock" not in frame.f_code.co_filename:
            self.calls.append(called.__name__)
            if len(self.calls) == self.at and self.fault is not None:
                raise self.fault

    def __enter__(self) -> Self:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_at_any_call_leaves_a_snapshot(folder: Path, fault: BaseException) -> None:
    """Whichever call to the system fails, the old or the new snapshot loads, and the next save leaves only its own."""
    outcomes = []
    for at in count(1):
        save(folder, 1)
        with Watch(at, fault) as watched:
            try:
                save(folder, 2)
                outcome = "saved"
            except (AgentmemError, KeyboardInterrupt):
                outcome = "raised"
        outcomes.append((outcome, loaded_version(folder)))
        if len(watched.calls) < at:
            break
        save(folder, 3)
        assert loaded_version(folder) == 3
        assert len(data_files(folder)) == 2
    assert {"open", "write", "fsync", "replace", "unlink"} <= set(watched.calls)
    assert set(outcomes) == {("raised", 1), ("raised", 2), ("saved", 2)}


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_save_without_its_last_step_keeps_the_old_and_cleans_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """If nothing can be flushed or renamed, the error says why and the old snapshot is untouched."""
    before = data_files(folder)

    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(AgentmemError, match=r"Input/output error.*What was there before is there still"):
        save(folder, 2)
    monkeypatch.undo()

    assert before <= data_files(folder)
    assert (data_files(folder) == before) is (name == "fsync")  # after a failed rename nobody knows what is there
    assert loaded_version(folder) == 1


def test_each_step_is_on_the_disk_before_the_next_begins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, scratch manifest and the folder are flushed before the rename, the folder again before deletions."""
    steps: list[str] = []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def flushed(descriptor: int) -> None:
        steps.append("flush " + Path(f"/proc/self/fd/{descriptor}").readlink().name.partition("-")[0])
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        steps.append(f"rename {source.name.partition('-')[0]} {target.name}")
        replace(source, target)

    def unlinked(path: Path, **kwargs: Any) -> None:
        steps.append("delete")
        unlink(path, **kwargs)

    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not name its open files")
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    save(folder, 2)

    written = ["flush state", "flush tensors", "flush manifest", "flush snapshot"]
    assert steps == [*written, "rename manifest manifest.json", "flush snapshot", "delete", "delete"]


def test_new_folders_are_flushed_into_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that a save makes is on the disk as well, up to the first that was there."""
    flushed: list[Path] = []
    monkeypatch.setattr(snapshot_folder, "_sync", flushed.append)

    save(tmp_path / "a" / "b", 1)

    assert set(flushed) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}


def test_leftovers_go_and_other_files_stay(folder: Path) -> None:
    """The next save deletes what killed saves left, and nothing that no save wrote."""
    stamp = "0123456789-0123456789abcdef"
    left = [f"state-{stamp}.json", f"tensors-{stamp}.safetensors", f"manifest-{stamp}.scratch"]
    others = ["state-mine.json", "notes.txt", f"tensors-{stamp}.safetensors.bak", f"xstate-{stamp}.json"]
    for name in (*left, *others):
        (folder / name).write_text("x")

    save(folder, 2)

    assert data_files(folder) == {*others, *read_manifest(folder).file_names}


def test_a_damaged_snapshot_can_be_saved_over(folder: Path) -> None:
    """A save needs nothing of what was there."""
    (folder / "manifest.json").write_bytes(b"\x00" * 100)

    save(folder, 2)

    assert loaded_version(folder) == 2
    assert len(data_files(folder)) == 2


def test_killed_savers_and_damaged_snapshots() -> None:
    """Killed at any moment, a save loses and spoils nothing; 48 corruptions of 24 kinds are all refused."""
    command = [sys.executable, "-m", "benchmarks.snapshot_kills", "--kills", "6", "--corruptions", "48", "--mib", "1"]
    done = forked.run(command, cwd=ROOT, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills while saving 1 MiB: 0 lost or spoiled" in done.stdout
    assert "48 corruptions: {'refused': 48}" in done.stdout


def test_savers_wait_for_one_another(folder: Path) -> None:
    """Threads that save into one folder all succeed; a reader meanwhile sees whole versions only."""
    faults: list[Exception] = []

    def savers(first: int) -> None:
        try:
            for version in range(first, first + 5):
                save(folder, version)
        except Exception as error:  # noqa: BLE001  # it fails the test below
            faults.append(error)

    threads = [threading.Thread(target=savers, args=(first,)) for first in (10, 20, 30)]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        seen.add(loaded_version(folder))
    for thread in threads:
        thread.join()

    assert not faults
    assert seen <= {1, *range(10, 15), *range(20, 25), *range(30, 35)}
    assert loaded_version(folder) in {14, 24, 34}
    assert len(data_files(folder)) == 2


def test_a_save_that_waits_too_long_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process saves, a save ends with an error after the limit and touches nothing."""
    monkeypatch.setattr(snapshot_folder, "LOCK_SECONDS", 0.1)
    before = data_files(folder)

    with (
        FileLock(folder / "snapshot.lock"),
        pytest.raises(AgentmemError, match=r"another save into it has held snapshot\.lock for 0\.1 s"),
    ):
        save(folder, 2)
    assert data_files(folder) == before


def test_a_reader_whose_snapshot_is_replaced_reads_the_new_one(folder: Path) -> None:
    """A save between the manifest and the data files is no damage: the reader begins again."""
    looks = []

    def check(state: dict[str, Any], specs: Any) -> None:
        looks.append(state["version"])
        if len(looks) == 1:
            save(folder, 2)

    tensors, state = load(folder, check=check)

    assert looks == [1, 2]
    assert state == {"version": 2}
    assert torch.equal(tensors["keys"], tensors_of(2)["keys"])


class Faulty(MemoryFileSystem):
    """A store in memory that counts what it is asked for and fails at the request numbered ``at``."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    requests: ClassVar[list[str]] = []
    at = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("faulty://")))

    def _count(self, request: str) -> None:
        self.requests.append(request)
        if len(self.requests) == self.at:
            raise RuntimeError("the store has a fault of its own kind")

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        self._count(f"open {mode} {path.rpartition('/')[2].partition('-')[0]}")
        return super()._open(path, mode, *args, **kwargs)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy: the first half of a move."""
        self._count("copy")
        super().cp_file(path1, path2, **kwargs)

    def _rm(self, path: str) -> None:
        self._count("remove")
        super()._rm(path)

    def rm(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Remove: the second half of a move."""
        self._count("remove")
        super().rm(path, *args, **kwargs)

    def ls(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """List."""
        self._count("list")
        return super().ls(path, *args, **kwargs)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make folders."""
        self._count("make")
        super().makedirs(path, exist_ok)


@pytest.fixture
def store() -> Iterator[type[Faulty]]:
    """The store that fails, known to fsspec by ``faulty://``."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    yield Faulty
    Faulty.store.clear()
    Faulty.requests.clear()
    Faulty.at = 0


def test_a_store_that_fails_at_any_request_keeps_a_snapshot(store: type[Faulty]) -> None:
    """Any exception of a store becomes an AgentmemError, and the old or the new snapshot loads."""
    url = "faulty://s/x"
    save(url, 1)
    store.requests.clear()
    save(url, 1)
    requests = list(store.requests)
    writes = [request for request in requests if request.startswith("open wb")]
    assert writes == ["open wb state", "open wb tensors", "open wb manifest"]
    assert requests.index("copy") > requests.index("open wb manifest")
    outcomes = set()
    for at in range(1, len(requests) + 1):
        save(url, 1)
        store.requests.clear()
        store.at = at
        try:
            save(url, 2)
            told = ""
        except AgentmemError as error:
            told = str(error)
        store.at = 0
        outcomes.add(("RuntimeError: the store has a fault of its own kind" in told, bool(told), loaded_version(url)))

    assert outcomes == {(True, True, 1), (True, True, 2), (False, False, 2)}


def test_a_store_that_fails_while_read_is_a_refusal(store: type[Faulty]) -> None:
    """A fault at any request of a load is SnapshotRefused."""
    save("faulty://s/y", 1)
    store.requests.clear()
    load("faulty://s/y")
    for at in range(1, len(store.requests) + 1):
        store.requests.clear()
        store.at = at
        with pytest.raises(SnapshotRefused, match="fault of its own kind"):
            load("faulty://s/y")
        store.at = 0


def test_a_store_keeps_what_another_saver_may_be_writing() -> None:
    """Without a lock a save deletes what the old manifest named and what is a day old, and leaves what is fresh."""
    memory = fsspec.filesystem("memory")
    stamps = {"old": int(time.time()) - 2 * files.LEFTOVER_SECONDS, "fresh": int(time.time()) - 60}
    names = {kind: f"/shared/tensors-{stamp:010x}-0123456789abcdef.safetensors" for kind, stamp in stamps.items()}
    save("memory://shared", 1)
    for name in names.values():
        memory.pipe_file(name, b"x")

    save("memory://shared", 2)

    assert names["fresh"] in memory.ls("/shared", detail=False)
    assert len(memory.ls("/shared", detail=False)) == 4
    assert loaded_version("memory://shared") == 2
    MemoryFileSystem.store.clear()
