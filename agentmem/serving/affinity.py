"""Routing keys: requests of one conversation get the same key, so that the server that holds it can be asked.

A key decides only where a request goes, never what it may read: a conversation that a server does not hold goes on from
the shared state folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentmem.errors import AgentmemError
from agentmem.serving.chat.route import SESSION
from agentmem.serving.history import digest
from agentmem.serving.responses.context import Context
from agentmem.sessions import Message

ANY = ""
"""Key of a request that any server can answer as well as another."""
_ONE = "one"
"""Key of requests without a body, so that a client always sees the dashboard and the metrics of the same server."""
_CHAT, _COMPLETIONS, _RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_COMPACT = f"{_RESPONSES}/compact"


def routing_key(
    owner: str,
    path: str,
    headers: Mapping[str, str],
    body: object,
    stored: Callable[[str], str | None],
) -> str:
    """Return the key of a request; it never raises, whatever a client sent.

    Args:
        owner: The owner of the request; keys of different owners differ.
        path: The path of the URL.
        headers: The request's headers, found by names in any case.
        body: The parsed JSON of the body; ``None`` if there is none, or it is no JSON.
        stored: Returns the key of this owner's stored response with an id, or ``None`` if there is no such response.

    The key is made of the first of these that a request has: the name of a conversation (X-Agentmem-Session), the
    ``prompt_cache_key``, the key of the response that it continues or names, and the messages up to and including the
    first of a user. Instructions are left out, since a request that only compacts may omit them.

    """
    if path.startswith(f"{_RESPONSES}/") and path != _COMPACT:
        return stored(path.split("/")[3]) or ANY
    if body is None:
        return _ONE
    if not isinstance(body, Mapping) or path == _COMPLETIONS:
        return ANY
    previous = body.get("previous_response_id")
    named = {"session": headers.get(SESSION), "label": body.get("prompt_cache_key")}
    if previous and not any(named.values()):
        return (stored(previous) if isinstance(previous, str) else None) or ANY
    kinds = named | {"messages": _beginning(path, body)}
    return next((_key(owner, kind, value) for kind, value in kinds.items() if value), ANY)


def parsed(body: bytes) -> object:
    """Return the JSON of a body, or ``None`` if it is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _key(owner: str, kind: str, value: object) -> str:
    try:
        text = json.dumps([owner, kind, value])
    except (TypeError, ValueError, RecursionError):
        return ANY
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _beginning(path: str, body: Mapping[str, Any]) -> list[str]:
    """Return digests of the messages up to and including the first user's, after the newest compaction item if any."""
    given = body.get("messages" if path == _CHAT else "input")
    try:
        if isinstance(given, str):
            return [digest(Message(role="user", content=given))]
        if not isinstance(given, Sequence):
            return []
        if path == _CHAT:
            return [digest(each) for each in Message.each(_until_user(given))]
        context = Context.of(_until_user(_since_item(given)))
        return [*([] if context.token is None else [context.token]), *map(digest, context.messages)]
    except (AgentmemError, ValueError, TypeError, AttributeError, RecursionError):
        return []


def _until_user(given: Sequence[Any]) -> list[Any]:
    for at, each in enumerate(given):
        if isinstance(each, Mapping) and each.get("role") == "user":
            return list(given[: at + 1])
    return list(given)


def _since_item(given: Sequence[Any]) -> Sequence[Any]:
    for at in reversed(range(len(given))):
        if isinstance(given[at], Mapping) and given[at].get("type") == "compaction":
            return given[at:]
    return given
