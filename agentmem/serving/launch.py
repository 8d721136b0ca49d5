"""Functions to run a server: check of API keys, lock on the state folder, socket, and example code for clients."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path

import uvicorn
from filelock import FileLock, Timeout

from agentmem.errors import SettingsRefused
from agentmem.serving import connections
from agentmem.serving.app import create_app
from agentmem.serving.keys import ApiKeys
from agentmem.serving.server import Server
from agentmem.serving.settings import ServerSettings, is_loopback

__all__ = [
    "ApiKeys",
    "Server",
    "ServerSettings",
    "check_keys",
    "listening",
    "read_template",
    "serve",
    "to_paste",
    "using",
]

_BACKLOG = 1024


def check_keys(host: str, keys: ApiKeys) -> None:
    """Refuse to serve without API keys on an address that other machines can reach.

    Raises:
        SettingsRefused: ``host`` is not a loopback address, and there are no keys.

    """
    if not keys.required and not is_loopback(host):
        raise SettingsRefused(
            f"host {host!r} can be reached by others, and no API key is asked for; give --api-key-file, or bind to "
            "127.0.0.1"
        )


@contextmanager
def using(state: Path | None, *, shared: bool = False) -> Iterator[None]:
    """Lock a server's state folder while the block runs; ``None`` locks nothing.

    Servers that share the folder keep out a server that does not share it, and such a server keeps out all others.

    Raises:
        SettingsRefused: another server has locked the folder, or the folder cannot be written or cannot be shared.

    """
    if state is None:
        yield
        return
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        release = (_together if shared else _alone)(state / ".lock")
    except (Timeout, BlockingIOError):
        raise SettingsRefused(
            f"state folder {state} is another server's; stop that, give another folder, or have all of them share this "
            "one (--shared)"
        ) from None
    except OSError as error:
        raise SettingsRefused(
            f"state folder {state}: {error.strerror or error}; give one that can be written"
        ) from None
    try:
        yield
    finally:
        release()


def _alone(path: Path) -> Callable[[], None]:
    lock = FileLock(path, timeout=0, mode=0o600)
    lock.acquire()
    return lock.release


def _together(path: Path) -> Callable[[], None]:
    try:
        import fcntl
    except ModuleNotFoundError:
        raise SettingsRefused(
            f"state folder {path.parent}: {sys.platform} has no locks that servers can share; start one server, not "
            "--shared"
        ) from None
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BaseException:
        os.close(file)
        raise
    return partial(os.close, file)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open a listening socket while the block runs; port 0 means any free port.

    Raises:
        SettingsRefused: the socket cannot listen on this host and port.

    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise SettingsRefused(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another port, or 0 for any"
        ) from None
    with made:
        yield made


def read_template(name: str) -> str:
    """Return the text of a chat template: a template of this package by its name, otherwise the file at path ``name``.

    Raises:
        SettingsRefused: the file cannot be read, or is not UTF-8 text.

    """
    own = files("agentmem.serving").joinpath("templates", f"{name}.jinja")
    try:
        return own.read_text(encoding="utf-8") if own.is_file() else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsRefused(
            f"chat template: cannot read {name}: {error}; give a Jinja file, or 'chatml-tools'"
        ) from None


def serve(server: Server, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until the process receives SIGINT or SIGTERM.

    Before the first request is accepted, ``announce`` is called with the base URL.

    Raises:
        SettingsRefused: see :func:`check_keys` and :func:`listening`.
        CapTooSmall: the cap is too small for a conversation.

    """
    check_keys(host, server.keys)
    server.check()
    connections.allow_many()
    config = uvicorn.Config(
        create_app(server),
        http=connections.Impatient,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, int(server.settings.shutdown_seconds)),
    )
    with listening(host, port) as made:
        announce(base_url(made))
        uvicorn.Server(config).run(sockets=[made])


def base_url(made: socket.socket) -> str:
    """Return the URL at which clients reach a listening socket; the URL ends in ``/v1``."""
    host, port = made.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # the loopback address reaches it too
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/v1"


def to_paste(url: str, model: str, *, keys: bool) -> str:
    """Return lines for a shell and for Python that users paste to connect OpenAI's client to this server."""
    key = "YOUR-KEY" if keys else "none"
    return (
        f"    export OPENAI_BASE_URL={url} OPENAI_API_KEY={key}\n\n"
        "    from openai import OpenAI\n"
        f'    client = OpenAI(base_url="{url}", api_key="{key}")\n'
        f'    client.responses.create(model="{model}", input="Hello.").output_text\n'
    )
