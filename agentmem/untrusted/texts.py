"""Write error messages of limited length, even if they quote long or unusual values."""

from __future__ import annotations

import difflib
from reprlib import Repr
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import ValidationError

MAX_MESSAGE: Final = 2000
"""The most characters of an error message."""
_END: Final = 500
"""The number of characters kept from the end of a message that is too long; the remedy is there."""
_LISTED: Final = 4
_DESCRIBED: Final = 1000
"""The most violations of one validation for which some are described; beyond this, only their number is stated."""
_COMPARED: Final = 40
"""The most characters of a wrong name that are compared with the known names."""
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def bounded(text: str) -> str:
    """Return ``text``, with its middle cut out if it is longer than :data:`MAX_MESSAGE`."""
    if len(text) <= MAX_MESSAGE:
        return text
    cut = " … "
    return text[: MAX_MESSAGE - _END - len(cut)] + cut + text[-_END:]


def shown(value: object) -> str:
    """Return the shortened ``repr`` of a value for a message; a huge integer is described by its number of bits."""
    try:
        return _SHORT.repr(value[:200] if isinstance(value, str) else value)
    except ValueError:  # Python refuses to write integers with too many digits
        bits = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        return f"<{type(value).__name__}{bits}>"


def did_you_mean(wrong: str, known: Iterable[str], most: int = 1) -> str:
    """Return ``did you mean 'x'? `` with up to ``most`` known names that are similar, or an empty text if none is."""
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(wrong[:_COMPARED].lower(), lower, n=most, cutoff=0.5)
    return f"did you mean {' or '.join(repr(lower[name]) for name in near)}? " if near else ""


def faults(error: ValidationError, given: object = None) -> str:
    """Describe the first few errors of a pydantic validation: place, error, and the value at that place in ``given``.

    Callers should parse JSON first and let pydantic validate the result. If pydantic validates a JSON text, it copies
    the surrounding values for each error, which may take much memory.
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
    """Quote the value at a place in ``given``; return an empty text if there is no value at this place."""
    if given is None:
        return ""
    try:
        for part in place:
            given = given[part]
    except (IndexError, KeyError, TypeError):
        return ""
    return f" (got {shown(given)})"
