"""The routes of the dashboard: its page, which loads nothing from other servers, and the data that the page shows."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

from agentmem.serving.server import Server

STATE = "/dashboard/state"
_PAGE = {
    "/": ("index.html", "text/html"),
    "/dashboard/page.css": ("page.css", "text/css"),
    "/dashboard/page.js": ("page.js", "text/javascript"),
    "/dashboard/charts.js": ("charts.js", "text/javascript"),
    "/dashboard/icon.svg": ("icon.svg", "image/svg+xml"),
}
OPEN = frozenset(_PAGE)
"""Routes that need no API key, since they serve the same files to everyone."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def router(server: Server) -> APIRouter:
    """Return a router with the page at ``/``, the page's files, and its data at ``/dashboard/state``."""
    made = APIRouter()
    for path, (name, kind) in _PAGE.items():
        _file(made, path, _content(name, keys=server.keys.required), kind)

    @made.get(STATE)
    async def state(request: Request) -> Response:
        found = server.watch.state(request.state.owner)
        return Response(found, media_type="application/json", headers=_HEADERS | {"Cache-Control": "no-store"})

    return made


def _content(name: str, *, keys: bool) -> bytes:
    """Return the content of a file of the page; if ``keys`` is true, the page asks the user for an API key."""
    content = files(__package__).joinpath("page", name).read_bytes()
    return content.replace(b'data-key="no"', b'data-key="yes"') if keys else content


def _file(made: APIRouter, path: str, content: bytes, kind: str) -> None:
    @made.get(path)
    async def file() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)
