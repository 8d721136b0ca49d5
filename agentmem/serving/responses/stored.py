"""Stored responses, each with its owner, input and context. They are held in memory, and also in files if wanted."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from agentmem.errors import AgentmemError, RequestRefused
from agentmem.models.files import write_whole
from agentmem.serving.logs import LOG
from agentmem.serving.responses.context import Context


class Stored(BaseModel):
    """A stored response, with its owner and everything needed to continue it."""

    model_config = ConfigDict(extra="forbid")

    owner: str
    response: dict[str, Any]
    input: list[dict[str, Any]]
    """Input items of the request, as ``GET /v1/responses/{id}/input_items`` returns them."""
    context: Context
    """Context of a request that continues this response: everything up to and including its reply."""
    at: float
    """Time of storing, in seconds since 1970."""


class StoredResponses:
    """All stored responses, by id. A response of another API key is treated as not found."""

    def __init__(self, most: int, seconds: float, folder: Path | None) -> None:
        """Set the limits: at most ``most`` responses, each for at most ``seconds``.

        If a ``folder`` is given, responses are also written there, and those of an earlier server are read from it.
        """
        self.most, self.seconds, self.folder = most, seconds, folder
        self._held: OrderedDict[str, Stored] = OrderedDict()
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
                self._read(path)

    def put(self, stored: Stored) -> None:
        """Store a response, replace a response with the same id, and delete the oldest responses beyond the limit."""
        name = str(stored.response["id"])
        self._held[name] = stored
        if self.folder is not None:
            try:
                write_whole(self._path(name), stored.model_dump_json(), what="response", remedy="make room")
            except AgentmemError as error:  # the response stays in memory until the server ends
                LOG.warning("response_not_written", error=str(error))
        while len(self._held) > self.most:
            self.drop(next(iter(self._held)))

    def get(self, name: str, owner: str, *, param: str = "response_id") -> Stored:
        """Return the response with id ``name``; an error names the request's field ``param``.

        Raises:
            RequestRefused: status 404: the owner has no such response, or the response has expired.

        """
        found = self._held.get(name)
        if found is not None and time.time() - found.at > self.seconds:
            self.drop(name)
            found = None
        if found is None or found.owner != owner:
            raise RequestRefused(
                f"response {name[:80]!r} was not found; it may have been deleted, or forgotten, or not stored",
                status=404,
                code="response_not_found" if param == "response_id" else "previous_response_not_found",
                param=param,
            )
        return found

    def drop(self, name: str) -> None:
        """Delete the response with id ``name``, if there is such a response."""
        self._held.pop(name, None)
        if self.folder is not None:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        assert self.folder is not None  # noqa: S101  # the caller has checked
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"

    def _read(self, path: Path) -> None:
        try:
            stored = Stored.model_validate_json(path.read_bytes())
            self._held[str(stored.response["id"])] = stored
        except (OSError, ValidationError, KeyError) as error:
            LOG.warning("response_not_read", file=path.name, error=type(error).__name__)
