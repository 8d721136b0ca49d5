"""A server that is killed, that loses its disk in mid-save, and connections that never come to a request."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from agentmem.serving import connections, launch
from agentmem.serving.app import create_app
from agentmem.serving.conversations import Conversation
from agentmem.serving.kept import Kept, Record
from agentmem.serving.recipes import Recipe
from agentmem.serving.shelf import Shelf
from support import serving, tiny_chat
from support.waiting import LIMIT, until


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("fails", ["save", "rename"])
@pytest.mark.parametrize("killed", [True, False])
def test_what_was_kept_outlives_a_save_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, killed: bool
) -> None:
    """Wherever a newer save stops: the older is still there, whole, and nothing of the newer is left to be found."""

    def broken(*_: Any, **__: Any) -> Any:
        raise Killed if killed else OSError

    with tiny_chat.runtime(1) as made:
        session, one = tiny_chat.filled(made, 20), Conversation("x", "me", None, Recipe())
        kept = Kept(tmp_path)
        shelf = Shelf(kept, shared=False)
        one.history = ["old"]
        shelf.save(one, session)
        old, one.history = one.saved, ["new"]
        monkeypatch.setattr(*((type(session), "save") if fails == "save" else (Path, "rename")), broken)
        if killed:
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed if killed else OSError):
            shelf.save(one, session)
        monkeypatch.undo()
        kept.close()

        again = Kept(tmp_path)
        assert [path.name for path in tmp_path.iterdir() if path.name != ".passing"] == [old] == list(again.names())
        record = again.record(str(old))
        assert record is not None
        assert record.history == ("old",)
        made.load(again.memory(str(old))).close()


def test_a_save_that_is_killed_before_it_deletes_what_it_replaced_is_the_one_that_counts(tmp_path: Path) -> None:
    """Both saves are there, and the newer one is yielded last; the next save deletes both."""
    with tiny_chat.runtime(1) as made:
        session, one = tiny_chat.filled(made, 20), Conversation("x", "me", None, Recipe())
        shelf = Shelf(Kept(tmp_path), shared=False)
        shelf.save(one, session)
        older = tmp_path / str(one.saved)
        shutil.copytree(older, tmp_path / ".copy")
        one.history = ["new"]
        shelf.save(one, session)
        (tmp_path / ".copy").rename(older)

        again = Shelf(Kept(tmp_path), shared=False)
        again.look()
        assert [each.history for each in again.conversations()] == [[], ["new"]]
        shelf.save(one, session)
        assert list(shelf.kept.names()) == [one.saved]


def test_what_a_dead_server_left_unfinished_is_deleted_and_a_living_ones_is_not(tmp_path: Path) -> None:
    """Another server starts while one writes: that one's write ends well. When it is dead, what it left goes."""
    with tiny_chat.runtime(1) as made:
        session, one = tiny_chat.filled(made, 20), Conversation("x", "me", None, Recipe())
        writing = Kept(tmp_path)
        save = session.save

        def slow(path: Any) -> None:
            save(path)
            Kept(tmp_path)

        session.save = slow
        writing.keep("name", session, Record.of(one))
        assert writing.record("name") is not None

    (left := tmp_path / ".passing" / "agentmem-runtime-dead").mkdir()
    (left / "half").write_text("x", encoding="utf-8")
    Kept(tmp_path)
    assert not left.exists()


async def test_a_connection_that_sends_no_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence and half a head end it, on a connection that has been answered too; a request that runs does not."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.05)
    of = serving.server(serving.runtime(2, slots=512))
    config = uvicorn.Config(create_app(of), http=connections.Impatient, log_config=None, timeout_keep_alive=int(LIMIT))
    with launch.listening("127.0.0.1", 0) as made:
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve(sockets=[made]))
        await until(lambda: server.started)
        port = made.getsockname()[1]
        for sent in (b"", b"GET /heal", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /heal"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            read: Any = asyncio.wait_for(reader.read(), LIMIT)
            try:
                answer = await read
            except ConnectionResetError:
                answer = b""
            assert (b"200 OK" in answer) == (b"\r\n" in sent)
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"max_tokens":200}'
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        )
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b"200 OK" in await asyncio.wait_for(reader.read(), LIMIT)
        writer.close()
        server.should_exit = True
        await running
    of.runtime.close()


async def test_a_call_is_waited_for_however_often_its_task_is_cancelled() -> None:
    """A turn that is cancelled twice, by its client and by a server that ends, leaves no call at work."""
    of, begun, go_on, ended = serving.server(), threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        go_on.wait(LIMIT)
        ended.set()

    task = asyncio.create_task(of.blocking(call))
    await until(begun.is_set)
    for _ in range(3):
        task.cancel()
        await asyncio.wait([task], timeout=0.01)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    await of.close()
    of.runtime.close()
