"""What a conversation has said so far, as digests: enough to see whether a request goes on from it, and no text."""

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
    """What a message says, however a client writes it: null and empty content, or a call's arguments in any order."""
    calls = [
        [call.get("id"), function.get("name"), function.get("arguments")]
        for call in message.tool_calls or ()
        if isinstance(function := call.get("function"), dict)
    ]
    said = [message.role, message.content, message.name, message.tool_call_id, message.reasoning_content, calls]
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def marker(item: str) -> str:
    """What stands for everything that a compaction item holds."""
    return f"item:{item}"


def extends(held: Sequence[str], wanted: Sequence[str], anchors: dict[str, int]) -> int | None:
    """How many of the ``wanted`` messages a conversation holds; ``None`` if it holds others.

    ``anchors`` are places in ``held`` that a compaction item stands for: a request that begins with its marker wants
    what follows that place.
    """
    if wanted and wanted[0] in anchors:
        rest, start = list(held[anchors[wanted[0]] :]), 1
    else:
        rest, start = list(held), 0
    return start + len(rest) if list(wanted[start : start + len(rest)]) == rest else None
