"""Texts of messages: bounded, whatever they quote."""

from __future__ import annotations

import difflib
from reprlib import Repr
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import ValidationError

MAX_MESSAGE: Final = 2000
"""Characters of one message of an error."""
_END: Final = 500
"""Of those, how many of a message's last ones are kept: the remedy stands there."""
_LISTED: Final = 4
_DESCRIBED: Final = 1000
"""Violations of one validation that are looked at; where there are more, they are counted."""
_COMPARED: Final = 40
"""Characters of a wrong name that are compared with the known ones."""
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def bounded(text: str) -> str:
    """``text``, without its middle if it is longer than :data:`MAX_MESSAGE`."""
    if len(text) <= MAX_MESSAGE:
        return text
    cut = " … "
    return text[: MAX_MESSAGE - _END - len(cut)] + cut + text[-_END:]


def shown(value: object) -> str:
    """A value as messages quote it: its ``repr``, cut; an integer too long to be written is named by its bits."""
    try:
        return _SHORT.repr(value[:200] if isinstance(value, str) else value)
    except ValueError:  # of integers with more digits than Python writes
        bits = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        return f"<{type(value).__name__}{bits}>"


def did_you_mean(wrong: str, known: Iterable[str], most: int = 1) -> str:
    """``did you mean 'x'? `` with the ``most`` nearest of the known names, however they are capitalised, or nothing."""
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(wrong[:_COMPARED].lower(), lower, n=most, cutoff=0.5)
    return f"did you mean {' or '.join(repr(lower[name]) for name in near)}? " if near else ""


def faults(error: ValidationError, given: object = None) -> str:
    """What a pydantic model does not take: the first few places, with what is wrong, and the value there of ``given``.

    Validate what was parsed, not its text: for that, pydantic keeps a copy of all that is around it for each fault.
    """
    count = error.error_count()
    if count > _DESCRIBED:
        return f"{count} of its values are wrong"
    found = error.errors(include_url=False, include_input=False, include_context=False)
    more = f"; and {count - _LISTED} more" if count > _LISTED else ""
    return "; ".join(_fault(item["loc"], item["msg"], given) for item in found[:_LISTED]) + more


def _fault(place: tuple[int | str, ...], message: str, given: object) -> str:
    where = ".".join(str(part)[:80] for part in place[:8])
    said = message.removeprefix("Value error, ")[:400].removeprefix(f"{where}: ")
    return (f"{where}: " if where else "") + said + _quoted(place, given)


def _quoted(place: tuple[int | str, ...], given: Any) -> str:
    """The value at that place, if there is one."""
    if given is None:
        return ""
    try:
        for part in place:
            given = given[part]
    except (IndexError, KeyError, TypeError):
        return ""
    return f" (got {shown(given)})"
