"""Text for a terminal: what would steer it is shown, not sent.

A model can write any character, and what it writes is quoted in logs and errors. One at a time, so that a sequence
that comes in two pieces does not pass either.
"""

from __future__ import annotations

import re

_CONTROL = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
"""Control characters but newline and tab, marks that turn the direction of writing, and halves of characters."""
_PICTURES, _DELETE = 0x2400, 0x7F


def printable(text: str) -> str:
    """The text with a visible character in place of each that is none; newlines and tabs stay."""
    return _CONTROL.sub(_shown, text)


def escaped(json_text: str) -> str:
    """The same value as JSON without any such character outside of an escape."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", json_text)


def _shown(found: re.Match[str]) -> str:
    code = ord(found.group())
    if code < ord(" "):
        return chr(_PICTURES + code)
    return "\N{SYMBOL FOR DELETE}" if code == _DELETE else "\N{REPLACEMENT CHARACTER}"
