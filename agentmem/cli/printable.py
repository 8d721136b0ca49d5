"""Text for a terminal: characters that would control the terminal are replaced by visible ones.

A model can write any character, and logs and errors quote the model's text. Each control character is replaced
separately, so that an escape sequence that arrives in two pieces cannot control the terminal either.
"""

from __future__ import annotations

import re

_CONTROL = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
"""Matches control characters except newline and tab, marks that change the writing direction, and lone surrogates."""
_PICTURES, _DELETE = 0x2400, 0x7F


def printable(text: str) -> str:
    """Return the text with a visible character in place of each control character; newlines and tabs stay."""
    return _CONTROL.sub(_shown, text)


def escaped(json_text: str) -> str:
    """Return equivalent JSON in which every control character is written as a Unicode escape."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", json_text)


def _shown(found: re.Match[str]) -> str:
    code = ord(found.group())
    if code < ord(" "):
        return chr(_PICTURES + code)
    return "\N{SYMBOL FOR DELETE}" if code == _DELETE else "\N{REPLACEMENT CHARACTER}"
