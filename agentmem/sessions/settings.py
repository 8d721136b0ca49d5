"""How one session behaves, as a user writes it and as a snapshot keeps it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import regex
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from agentmem.errors import SettingsRefused
from agentmem.queries import MAX_PATTERN
from agentmem.sessions.chat.dialogue import Role
from agentmem.settings import Seed, check_part, parse_bytes
from agentmem.untrusted.texts import faults


def _expression(pattern: str) -> str:
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a pattern of {len(pattern)} characters; {MAX_PATTERN} are allowed")
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    return pattern


def _share(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("give a fraction of the runtime's cap, such as 0.5, or bytes")  # noqa: TRY004  # for pydantic
    if isinstance(value, str):
        check_part(value, "share")
    return value


class SessionSettings(BaseModel):
    """How one session behaves.

    Raises:
        SettingsRefused: through :meth:`of`, with the field, the value and the limit.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: Annotated[float | int | str, BeforeValidator(_share)] = 1.0
    """The lease: a fraction of the runtime's cap (a float, 1.0 at most), or bytes (``4194304``, ``"4MiB"``)."""
    pin_roles: Annotated[tuple[Role, ...], FailFast()] = ("system",)
    """Messages of these roles are never compacted; tool schemas belong to the system's."""
    pin_names: Annotated[tuple[str, ...], FailFast()] = ()
    """Likewise messages of these names."""
    pin_pattern: Annotated[str, AfterValidator(_expression)] = ""
    """Likewise what this regular expression matches in messages that are appended."""
    pin_request: Annotated[bool, Field(strict=True)] = True
    """The newest request, a user's last message with those right before it, is not compacted until a reply to it ends.

    It is read and answered as it stands, at the cost of other tokens: what compactions leave stays the same. Where it
    takes more than a quarter of the slots between prefix, pins and recent window, its last message alone is tried,
    then nothing is pinned, and a log event ``request_not_pinned`` says so. A tool's result pins it again.
    """
    history: Literal["keep", "refuse"] = "keep"
    """Where the chat template would rewrite what the memory holds: keep the memory's, or refuse."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """When more turns wait than a forward can feed, those of higher priority are fed first."""
    soft: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """A ``before_compact`` hook is called when less than this part of the capacity is free."""
    seed: Seed | None = None
    """Seed of this session's own sampling; ``None`` samples from torch's global generator, as ``generate`` does."""

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Build settings; every violation becomes one :class:`SettingsRefused`."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsRefused(faults(error, values) + f". Settings are: {', '.join(cls.model_fields)}") from None

    def lease(self, cap: int) -> int:
        """The session's bytes under a runtime's cap.

        Raises:
            SettingsRefused: no share of it.

        """
        if isinstance(self.share, float):
            if not 0 < self.share <= 1:
                raise SettingsRefused(
                    f"share: {self.share} is no part of the runtime's cap; give one above 0, 1.0 at most"
                )
            return int(self.share * cap)
        lease = parse_bytes(self.share, "share")
        if lease > cap:
            raise SettingsRefused(f"share: {lease} bytes are more than the runtime's cap of {cap}; give {cap} at most")
        return lease
