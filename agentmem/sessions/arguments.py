"""One check for each kind of value that a session's callers hand over; every other kind is refused by its name."""

from __future__ import annotations

import math
from reprlib import Repr

from agentmem.errors import SettingsRefused

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def refusal(field: str, value: object, remedy: str) -> SettingsRefused:
    """What is said of a value that cannot work."""
    return SettingsRefused(f"{field}={_SHORT.repr(value)}: {remedy}")


def check_count(field: str, value: object, least: int = 0) -> None:
    """Refuse what is no whole number from ``least`` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise refusal(field, value, f"give a whole number, {least} at least")


def check_seconds(field: str, value: object, least: float = -math.inf) -> None:
    """Refuse what is no time."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= least:
        raise refusal(field, value, "give a number of seconds" + ("" if least < 0 else f", {least:g} at least"))


def check_name(value: object) -> None:
    """Refuse what is no name of a session; ``None`` is none, and one is made."""
    if value is not None and (not isinstance(value, str) or not value):
        raise refusal("name", value, "give a text of one character at least, or leave it out")


def check_target(value: object) -> None:
    """Refuse what is neither a part of a text nor slots per head."""
    part = isinstance(value, float) and 0 < value < 1
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not part and not count:
        raise refusal("target", value, "give a fraction between 0 and 1, such as 0.25, or slots per head")
