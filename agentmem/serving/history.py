"""Digests of a conversation's messages, which suffice to decide whether a request continues the conversation."""

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
    """Return the digest of a message; the order of a tool call's arguments does not matter."""
    calls = [
        [call.get("id"), function.get("name"), function.get("arguments")]
        for call in message.tool_calls or ()
        if isinstance(function := call.get("function"), dict)
    ]
    said = [message.role, message.content, message.name, message.tool_call_id, message.reasoning_content, calls]
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def marker(item: str) -> str:
    """Return the marker that replaces, in a list of digests, the messages that a compaction item stands for.

    ``item`` is the id of the compaction item.
    """
    return f"item:{item}"


def extends(held: Sequence[str], wanted: Sequence[str], anchors: dict[str, int]) -> int | None:
    """Return how many entries of ``wanted`` a conversation holds, or ``None`` if the request does not continue it.

    ``held`` are the digests of the conversation's messages; ``wanted`` are the digests of the request's messages. The
    request continues the conversation if ``wanted`` begins with all of ``held``.

    The first entry of ``wanted`` may be a :func:`marker` instead of a digest. A marker stands for the first ``n``
    messages of the conversation, and ``anchors`` maps each marker to its ``n``. These messages are not compared. The
    entries of ``wanted`` after the marker must begin with all other digests of ``held``. In the returned number, the
    marker counts as one entry.
    """
    if wanted and wanted[0] in anchors:
        rest, start = list(held[anchors[wanted[0]] :]), 1
    else:
        rest, start = list(held), 0
    return start + len(rest) if list(wanted[start : start + len(rest)]) == rest else None
