"""What a server is started with, besides its runtime."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentmem.errors import SettingsRefused
from agentmem.untrusted.texts import faults

HOUR = 3600


class ServerSettings(BaseModel):
    """Limits and places of a server. Seconds and bytes.

    Raises:
        SettingsRefused: through :meth:`of`, with the field, the value and the limit.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = Field(min_length=1)
    """Names of the one model that is served: its own, then aliases for clients that insist on a name."""
    state: Path | None = None
    """The folder that outlives the server: conversations, responses, compaction items and their key. ``None``: nothing
    outlives it."""
    item_key_file: Path | None = None
    """Keys of compaction items; ``state``'s own without it, and a passing one without that."""
    max_body_bytes: int = Field(default=4 << 20, ge=1)
    """Of one request's body."""
    body_seconds: float = Field(default=30.0, gt=0)
    """In which a request's body must have arrived."""
    send_seconds: float = Field(default=30.0, gt=0)
    """In which a client must take each piece of a stream."""
    turn_seconds: float = Field(default=600.0, gt=0)
    """Of one request: reading, compacting and writing together."""
    max_requests: int = Field(default=64, ge=1)
    """Requests to the model at once, running or waiting; more are answered with 429."""
    retry_after: int = Field(default=2, ge=1)
    """Seconds that a client is asked to wait after a 429."""
    reply_tokens: int = Field(default=1024, ge=1)
    """Length of a reply where the request has no limit of its own."""
    max_conversations: int = Field(default=256, ge=1)
    """Conversations that are held; the longest idle one is forgotten for a new one."""
    forget_after: float = Field(default=24 * HOUR, gt=0)
    """Idle seconds after which a conversation is forgotten."""
    quota_bytes: int = Field(default=4 << 30, ge=0)
    """Of all held conversations together, in memory and on disk, and likewise of all compaction items."""
    max_responses: int = Field(default=4096, ge=0)
    """Stored responses."""
    item_seconds: float = Field(default=7 * 24 * HOUR, gt=0)
    """In which a compaction item, and a stored response, can be used."""
    shutdown_seconds: float = Field(default=10.0, ge=0)
    """That running turns have when the server ends."""

    @property
    def responses(self) -> Path | None:
        """Where stored responses are kept."""
        return None if self.state is None else self.state / "responses"

    @classmethod
    def of(cls, **values: object) -> Self:
        """Build settings; every violation becomes one :class:`SettingsRefused`."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsRefused(faults(error, values) + f". Settings are: {', '.join(cls.model_fields)}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
