"""The settings of a server, except those of its runtime."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from agentmem.settings import Described

HOUR = 3600


class ServerSettings(Described):
    """Limits and file locations of a server. Times are in seconds, sizes in bytes.

    Raises:
        SettingsRefused: :meth:`of` got a wrong value; the error names the field, the value and the limit.

    """

    models: tuple[str, ...] = Field(min_length=1)
    """Names of the one model that is served: its own name, then aliases for clients that expect another name."""
    state: Path | None = None
    """Folder for conversations, responses, compaction items and the items' key, which the next server uses again.

    With ``None``, nothing is kept after the server ends.
    """
    shared: bool = False
    """True if several servers use the ``state`` folder at a time.

    Each conversation is then saved after every turn, and whichever server gets its next request goes on from there.
    """
    item_key_file: Path | None = None
    """File with the keys of compaction items.

    The default is ``items.key`` in the ``state`` folder, or a temporary file if there is no ``state`` folder.
    """
    max_body_bytes: int = Field(default=4 << 20, ge=1)
    """Maximum size of a request's body in bytes."""
    body_seconds: float = Field(default=30.0, gt=0)
    """Seconds within which a request's body must arrive."""
    send_seconds: float = Field(default=30.0, gt=0)
    """Seconds within which a client must receive each event of a stream."""
    turn_seconds: float = Field(default=600.0, gt=0)
    """Maximum duration of one request to the model in seconds: reading, compacting and writing together."""
    max_requests: int = Field(default=64, ge=1)
    """Maximum number of POST requests that run or wait at a time; further requests get status 429."""
    retry_after: int = Field(default=2, ge=1)
    """Seconds that a client is asked to wait after status 429."""
    reply_tokens: int = Field(default=1024, ge=1)
    """Maximum number of tokens of a reply if the request sets no limit."""
    max_conversations: int = Field(default=256, ge=1)
    """Maximum number of held conversations; above this number, the longest idle conversation is forgotten."""
    forget_after: float = Field(default=24 * HOUR, gt=0)
    """Seconds without use after which a conversation is forgotten."""
    quota_bytes: int = Field(default=4 << 30, ge=0)
    """Maximum bytes of all conversations together, in memory and on disk.

    The same limit applies separately to all compaction items together.
    """
    max_responses: int = Field(default=4096, ge=0)
    """Maximum number of stored responses; above this number, the oldest are deleted."""
    item_seconds: float = Field(default=7 * 24 * HOUR, gt=0)
    """Seconds for which a compaction item or a stored response can be used."""
    shutdown_seconds: float = Field(default=10.0, ge=0)
    """Seconds that running turns are given to finish when the server ends."""

    @model_validator(mode="after")
    def _has_what_is_shared(self) -> Self:
        if self.shared and self.state is None:
            raise ValueError("shared servers need the folder that they share; give state")
        return self

    @property
    def responses(self) -> Path | None:
        """Folder of stored responses; ``None`` without a ``state`` folder."""
        return None if self.state is None else self.state / "responses"


def is_loopback(host: str) -> bool:
    """Check whether only this machine can reach a server that is bound to ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
