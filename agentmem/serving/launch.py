"""Running a server: its socket, its lock on the state folder, and what a person pastes into a client."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    "alone",
    "check_keys",
    "listening",
    "read_template",
    "serve",
    "to_paste",
]

_BACKLOG = 1024


def check_keys(host: str, keys: ApiKeys) -> None:
    """Refuse a server that others can reach and that asks for no key.

    Raises:
        SettingsRefused: as that.

    """
    if not keys.required and not is_loopback(host):
        raise SettingsRefused(
            f"host {host!r} can be reached by others, and no API key is asked for; give --api-key-file, or bind to "
            "127.0.0.1"
        )


@contextmanager
def alone(state: Path | None) -> Iterator[None]:
    """Hold a state folder for one server.

    Raises:
        SettingsRefused: another one has it, or it cannot be written.

    """
    if state is None:
        yield
        return
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(state / ".lock", timeout=0, mode=0o600)
        lock.acquire()
    except Timeout:
        raise SettingsRefused(f"state folder {state} is another server's; stop that, or give another folder") from None
    except OSError as error:
        raise SettingsRefused(
            f"state folder {state}: {error.strerror or error}; give one that can be written"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens; port 0 is any that is free.

    Raises:
        SettingsRefused: it cannot.

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
    """A chat template: one that comes with the package, by its name, or a file's.

    Raises:
        SettingsRefused: there is no such file, or it is no text.

    """
    own = files("agentmem.serving").joinpath("templates", f"{name}.jinja")
    try:
        return own.read_text(encoding="utf-8") if own.is_file() else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsRefused(
            f"chat template: cannot read {name}: {error}; give a Jinja file, or 'chatml-tools'"
        ) from None


def serve(server: Server, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until the process is told to end (SIGINT, SIGTERM); ``announce`` gets the base URL before.

    Raises:
        SettingsRefused: see :func:`check_keys`, :func:`listening`. CapTooSmall: no conversation fits.

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
    """Where clients find it."""
    host, port = made.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # this machine's own way to it
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/v1"


def to_paste(url: str, model: str, *, keys: bool) -> str:
    """Lines for an OpenAI client."""
    key = "YOUR-KEY" if keys else "none"
    return (
        f"    export OPENAI_BASE_URL={url} OPENAI_API_KEY={key}\n\n"
        "    from openai import OpenAI\n"
        f'    client = OpenAI(base_url="{url}", api_key="{key}")\n'
        f'    client.responses.create(model="{model}", input="Hello.").output_text\n'
    )
