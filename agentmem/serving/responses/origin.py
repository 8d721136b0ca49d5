"""The search for the stored response or the compaction item that a request continues."""

from __future__ import annotations

from fastapi import Request

from agentmem.serving.chat.route import SESSION
from agentmem.serving.responses.context import Context
from agentmem.serving.responses.request import Continued, Origin
from agentmem.serving.responses.stored import StoredResponses
from agentmem.serving.server import Server


def origin_of(server: Server, stored: StoredResponses, body: Continued, http: Request) -> Origin:
    """Find the stored response or compaction item that a request continues, and add the input of the request.

    Raises:
        RequestRefused: this API key has no such response or item, or the input is invalid.

    """
    owner, before = http.state.owner, Context()
    if body.previous_response_id is not None:
        before = stored.get(body.previous_response_id, owner, param="previous_response_id").context
    context = before.then(body.context())
    item = None if context.token is None else server.items.find(context.token, owner)
    return Origin(owner, http.headers.get(SESSION), context, item)
