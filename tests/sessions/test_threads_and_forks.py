"""One memory is one thread's at a time; what threads held does not follow into a forked process."""

from __future__ import annotations

import ast
import asyncio
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from agentmem.errors import RuntimeBusy, UnsupportedGeneration
from agentmem.memory.owner import Owner
from agentmem.sessions import Runtime, Session
from support import tiny
from support import tiny_chat as tc
from support.waiting import LIMIT


def test_another_thread_is_refused_while_one_owns_it() -> None:
    """It is refused by name, the owner may take it again, and it is free once nobody keeps the hold."""
    owner, said = Owner(), list[str]()

    def ask() -> None:
        try:
            owner.take()
        except UnsupportedGeneration as error:
            said.append(str(error))

    hold = owner.take()
    assert owner.take() is hold
    one = threading.Thread(target=ask)
    one.start()
    one.join()
    del hold
    two = threading.Thread(target=ask)
    two.start()
    two.join()
    assert len(said) == 1
    assert "in use by thread 'MainThread'" in said[0]


def test_two_threads_cannot_mix_their_tokens() -> None:
    """A generate in another thread, in the middle of one here, is refused; this one goes on."""
    refused: list[BaseException] = []
    with tiny.capped("window") as memory:

        def other() -> None:
            try:
                tiny.feed(memory, tiny.ids(4, seed=1))
            except UnsupportedGeneration as error:
                refused.append(error)

        def step(_: object, scores: object) -> object:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            return scores

        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        tokens = tiny.llama().generate(tiny.ids(20), past_key_values=memory, logits_processor=[step], **options)
        assert len(refused) == 3
        assert memory.transcript() == tokens[0, :-1].tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")  # OpenMP's others are not in the child, which would wait for them
def test_a_stream_in_a_forked_process_ends() -> None:
    """A worker that was forked after streams ran streams by a thread of its own."""

    async def turn() -> str:
        session = runtime.session()
        await session.aappend("user", "hi")
        return (await tc.events(session, max_new_tokens=2))[-1].type

    with tc.runtime(3) as runtime:
        assert asyncio.run(turn()) == "turn_finished"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if asyncio.run(asyncio.wait_for(turn(), LIMIT)) == "turn_finished" else 1
            finally:  # whatever it raises: a second pytest must not go on in the child
                os._exit(code)
        killing = threading.Timer(2 * LIMIT, os.kill, (child, 9))
        killing.start()
        try:
            assert os.waitpid(child, 0)[1] == 0
        finally:
            killing.cancel()


def in_child(call: Callable[[], object]) -> bool:
    """Whether a call returns in a forked process, in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        finally:  # whatever it raises: a second pytest must not go on in the child
            os._exit(code)
    killing = threading.Timer(LIMIT, os.kill, (child, 9))
    killing.start()
    try:
        return os.waitpid(child, 0)[1] == 0
    finally:
        killing.cancel()


@contextmanager
def elsewhere(call: Callable[[Callable[[], None]], object]) -> Iterator[None]:
    """Another thread that is in the middle of a call; the call is given a function that waits there."""
    there, done = threading.Event(), threading.Event()

    def wait() -> None:
        there.set()
        assert done.wait(2 * LIMIT)

    thread = threading.Thread(target=call, args=(wait,))
    thread.start()
    assert there.wait(LIMIT)
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("module", ["agentmem.hf.attach", "agentmem.hf.self_check"])
def test_a_fork_waits_until_no_thread_is_in_the_middle_of_attaching(module: str) -> None:
    """The locks of models' attachments and checks are free in a forked process, which can cap the model."""
    lock, there = sys.modules[module]._LOCK, threading.Event()

    def hold() -> None:
        with lock:
            there.set()
            time.sleep(0.5)

    def use() -> None:
        with lock:
            pass
        with tiny.capped("window") as memory:
            tiny.feed(memory, tiny.ids(4))

    thread = threading.Thread(target=hold)
    thread.start()
    assert there.wait(LIMIT)
    assert in_child(use)
    thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
def test_a_turn_of_another_thread_ends_in_a_forked_process() -> None:
    """Its session goes on there from the step where it was, another one gets its lease; the parent's turn goes on."""
    with tc.runtime(1) as made:
        session = made.session()
        session.append("user", "hi")

        def turn(wait: Callable[[], None]) -> None:
            events = session.stream(max_new_tokens=4, do_sample=False, keep_open=True)
            next(events)
            wait()
            for _ in events:
                pass

        def use() -> None:
            assert len(session.last.ids) == 1
            before = list(session.ids)
            session.generate(max_new_tokens=3, do_sample=False, keep_open=True)
            made.session().read([10, 11, 12])
            written.write_text(repr([before, list(session.ids)]))

        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "ids"
            with elsewhere(turn):
                here = list(session.ids)
                assert in_child(use)
            before, after = ast.literal_eval(written.read_text())
        assert before == here == after[: len(here)]
        assert len(session.last.ids) == 4
        assert after == list(session.ids)


def test_a_session_is_saved_while_another_one_takes_its_memory_s_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at its memory and the beginning of the save nothing can move that memory to disk."""
    with tc.runtime(1, pressure=("disk",), wait=0) as made:
        session, other, begin, threads = tc.filled(made, 20), made.session(), Runtime.begin, list[threading.Thread]()

        def read() -> None:
            with suppress(RuntimeBusy):
                other.read(tc.ids(20))

        def late(self: Runtime, which: Session, turn: object) -> None:
            if which is session:
                threads.append(threading.Thread(target=read))
                threads[0].start()
                threads[0].join(0.5)  # it would need all bytes
            begin(self, which, turn)

        monkeypatch.setattr(Runtime, "begin", late)
        session.save(tmp_path)
        monkeypatch.undo()
        threads[0].join(LIMIT)
        assert session.stats.state == "idle"
        with made.load(tmp_path) as again:
            assert again.ids == session.ids


def test_a_fork_is_made_while_the_memory_moves_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The re-basings that the fork must not report are counted wherever the memory is."""
    with tc.runtime(1) as made:
        session = tc.filled(made, 20)
        monkeypatch.setattr(Session, "memory", property(lambda self: self._here(None)))
        fork = session.fork()
        monkeypatch.undo()
        assert tc.on(fork) == tc.on(session)
