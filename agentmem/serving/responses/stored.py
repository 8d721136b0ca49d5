"""Stored responses, each with its owner, input and context: in memory, or in files that several servers may share."""

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
    route: str = ""
    """Routing key of the request, which those that continue the response have too.

    See :mod:`agentmem.serving.affinity`.
    """
    at: float
    """Time of storing, in seconds since 1970."""


class StoredResponses:
    """All stored responses, by id. A response of another API key is treated as not found."""

    def __init__(self, most: int, seconds: float, folder: Path | None) -> None:
        """Set the limits: at most ``most`` responses, each for at most ``seconds``.

        If a ``folder`` is given, each response is a file in it, and is read when it is asked for: those of an earlier
        server, and of others that share the folder, are found, and what another one deletes is gone.
        """
        self.most, self.seconds, self.folder = most, seconds, folder
        self._held: OrderedDict[str, Stored] = OrderedDict()
        """All responses if there is no folder, otherwise those that could not be written."""
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, stored: Stored) -> None:
        """Store a response, replace a response with the same id, and delete the oldest responses beyond the limit."""
        name = str(stored.response["id"])
        self._held[name] = stored
        if self.folder is not None:
            try:
                write_whole(self._path(name), stored.model_dump_json(), what="response", remedy="make room")
                del self._held[name]
            except AgentmemError as error:  # the response stays in memory until the server ends
                LOG.warning("response_not_written", error=str(error))
        self._trim()

    def get(self, name: str, owner: str, *, param: str = "response_id") -> Stored:
        """Return the response with id ``name``; an error names the request's field ``param``.

        Raises:
            RequestRefused: status 404: the owner has no such response, or the response has expired.

        """
        found = self._held.get(name) or self._read(name)
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

    def route(self, name: str, owner: str) -> str | None:
        """Return the routing key of the response with id ``name``, or ``None`` if the owner has no such response."""
        try:
            return self.get(name, owner).route
        except RequestRefused:
            return None

    def drop(self, name: str) -> None:
        """Delete the response with id ``name``, if there is such a response."""
        self._held.pop(name, None)
        if self.folder is not None:
            self._path(name).unlink(missing_ok=True)

    def _trim(self) -> None:
        """Delete the oldest responses beyond the limit, whichever server stored them."""
        while len(self._held) > self.most:
            self._held.popitem(last=False)
        paths = [] if self.folder is None else list(self.folder.glob("*.json"))
        if len(paths) > self.most:
            for path in sorted(paths, key=_written)[: len(paths) - self.most]:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        assert self.folder is not None  # noqa: S101  # the caller has checked
        return self.folder / f"{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.json"

    def _read(self, name: str) -> Stored | None:
        if self.folder is None:
            return None
        try:
            return Stored.model_validate_json(self._path(name).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            LOG.warning("response_not_read", file=self._path(name).name, error=type(error).__name__)
            return None


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another server deleted it
        return 0.0
