"""One check for each kind of value that a session's callers hand over; every other kind is refused by its name."""

from __future__ import annotations

from reprlib import Repr

from agentmem.errors import SettingsRefused

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def refusal(field: str, value: object, remedy: str) -> SettingsRefused:
    """What is said of a value that cannot work."""
    return SettingsRefused(f"{field}={_SHORT.repr(value)}: {remedy}")


def check_target(value: object) -> None:
    """Refuse what is neither a part of a text nor slots per head."""
    part = isinstance(value, float) and 0 < value < 1
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not part and not count:
        raise refusal("target", value, "give a fraction between 0 and 1, such as 0.25, or slots per head")
