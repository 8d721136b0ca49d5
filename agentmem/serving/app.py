"""The ASGI application with all routes of one server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from agentmem.serving import completions, refusals
from agentmem.serving.access import Access
from agentmem.serving.chat import route as chat
from agentmem.serving.dashboard import route as dashboard
from agentmem.serving.gate import Gate
from agentmem.serving.responses import compaction
from agentmem.serving.responses import route as responses
from agentmem.serving.responses.stored import StoredResponses
from agentmem.serving.server import Server


def create_app(server: Server) -> FastAPI:
    """Return the ASGI application with all routes of ``server``.

    When the application shuts down, it calls ``server.close()``. The caller must close the runtime afterwards.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.restore()
        watching = asyncio.create_task(server.watch.run())
        yield
        watching.cancel()
        await server.close()

    app = FastAPI(title="agentmem", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, settings=server.settings, keys=server.keys, also_open=dashboard.OPEN)
    app.add_middleware(Access, metrics=server.metrics)  # the middleware added last is the outermost
    refusals.handle(app)
    _health(app, server)
    _models(app, server)
    app.include_router(dashboard.router(server))
    app.include_router(chat.router(server))
    app.include_router(completions.router(server))
    stored = StoredResponses(server.settings.max_responses, server.settings.item_seconds, server.settings.responses)
    app.include_router(responses.router(server, stored))
    app.include_router(compaction.router(server, stored))
    return app


def _health(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        if server.closing:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _models(app: FastAPI, server: Server) -> None:
    def one(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": server.started, "owned_by": "agentmem"}

    @app.get("/v1/models")
    async def all_models() -> dict[str, Any]:
        return {"object": "list", "data": [one(name) for name in server.settings.models]}

    @app.get("/v1/models/{name:path}")
    async def a_model(name: str) -> dict[str, Any]:
        return one(server.model(name))
