"""The settings of one session, as a user gives them and as a snapshot stores them."""

from __future__ import annotations

from typing import Annotated, Literal

import regex
from pydantic import AfterValidator, BeforeValidator, FailFast, Field

from agentmem.errors import SettingsRefused
from agentmem.queries import MAX_PATTERN
from agentmem.sessions.chat.dialogue import Role
from agentmem.settings import Described, Seed, check_part, exact_bytes, parse_bytes


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


class SessionSettings(Described):
    """The settings of one session; build them with :meth:`of`.

    Raises:
        SettingsRefused: :meth:`of` found an invalid value; the message names the field, the value and the limit.

    """

    share: Annotated[float | int | str | None, BeforeValidator(_share)] = None
    """The session's lease: a fraction of the runtime's cap (a float, at most 1.0), a number of bytes (``4194304``,
    ``"4MiB"``), or ``None``.

    With ``None`` the lease is elastic: turns that run at the same time divide the cap evenly among them (by two, four
    or eight), and a turn that runs alone has all of it. A running turn gives back what others wait for before its next
    forward, and compacts its memory first if that holds more than its new part. Leases of sessions that do not compact
    by themselves are not elastic: they have the whole cap.
    """
    pin_roles: Annotated[tuple[Role, ...], FailFast()] = ("system",)
    """Roles whose messages are never compacted. Tool schemas count as part of the system message."""
    pin_names: Annotated[tuple[str, ...], FailFast()] = ()
    """Names whose messages are never compacted."""
    pin_pattern: Annotated[str, AfterValidator(_expression)] = ""
    """Regular expression; text that it matches in appended messages is never compacted."""
    pin_request: Annotated[bool, Field(strict=True)] = True
    """Pin the newest request until a reply to it ends.

    The request is the user's last message together with the user's messages right before it. While it is pinned it is
    not compacted. A compaction leaves the same number of slots as without the pin, so fewer are left for other tokens.
    If the request takes more than a quarter of the slots between prefix, other pins and recent window, only its last
    message is pinned; if that is too long as well, nothing is pinned and a log event ``request_not_pinned`` is
    written. The request is pinned again when a tool's result is appended.
    """
    history: Literal["keep", "refuse"] = "keep"
    """Behaviour if the chat template would now write earlier messages differently from what the memory holds:
    ``"keep"`` uses the memory's version, ``"refuse"`` refuses the new message."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """When more turns wait than one forward can feed, turns of sessions with a higher priority are fed first."""
    soft: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """The ``before_compact`` hook is called when at most this fraction of the capacity is free."""
    seed: Seed | None = None
    """Seed of this session's own sampling. With ``None`` the session samples from torch's global generator, as
    ``generate`` does."""

    def lease(self, cap: int) -> int:
        """Return the bytes of the session's lease under a runtime's cap, or its greatest lease if it is elastic.

        Raises:
            SettingsRefused: the share is more than the cap, or it is a fraction and not above 0.

        """
        if self.share is None:
            return cap
        if isinstance(self.share, float):
            if not 0 < self.share <= 1:
                raise SettingsRefused(
                    f"share: {self.share} is no part of the runtime's cap; give one above 0, 1.0 at most"
                )
            return int(self.share * cap)
        lease = parse_bytes(self.share, "share")
        if lease > cap:
            raise SettingsRefused(
                f"share: {exact_bytes(lease)} are more than the runtime's cap of {exact_bytes(cap)}; give that at most"
            )
        return lease
