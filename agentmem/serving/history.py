"""The messages of a conversation as digests, which suffice to decide whether a request continues it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentmem.sessions import Message

_DIGITS = 32
"""Hexadecimal digits of a digest: 128 bits."""


def digest(message: Message) -> str:
    """Return the digest of a message; the order of a call's arguments does not change it."""
    calls = [
        [call.get("id"), function.get("name"), function.get("arguments")]
        for call in message.tool_calls or ()
        if isinstance(function := call.get("function"), dict)
    ]
    said = [message.role, message.content, message.name, message.tool_call_id, message.reasoning_content, calls]
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def marker(item: str) -> str:
    """Return the marker of the compaction item with id ``item``, used in place of the digests of its messages."""
    return f"item:{item}"


def extends(held: Sequence[str], wanted: Sequence[str], anchors: dict[str, int]) -> int | None:
    """Return how many of the ``wanted`` messages a conversation holds, or ``None`` if it holds any other message.

    ``anchors`` maps the marker of a compaction item to the number of ``held`` messages that the item stands for. If
    ``wanted`` begins with such a marker, the rest of ``wanted`` is compared with the ``held`` messages after these.
    """
    if wanted and wanted[0] in anchors:
        rest, start = list(held[anchors[wanted[0]] :]), 1
    else:
        rest, start = list(held), 0
    return start + len(rest) if list(wanted[start : start + len(rest)]) == rest else None
