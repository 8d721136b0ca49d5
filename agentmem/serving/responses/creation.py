"""Creation of a response: the pieces of its turn become stream events and a stored object."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from agentmem.serving import turns
from agentmem.serving.attendance import turn_of
from agentmem.serving.event_stream import event
from agentmem.serving.pieces import Ended, Made, Piece
from agentmem.serving.responses.answer import Event, ResponseAnswer
from agentmem.serving.responses.context import Context, listed
from agentmem.serving.responses.request import Origin, ResponseRequest
from agentmem.serving.responses.stored import Stored, StoredResponses
from agentmem.serving.server import Server
from agentmem.sessions import Message


@dataclass(slots=True)
class Creation:
    """Work on one response while its turn runs.

    Each piece of the turn updates the response and becomes stream events. At the end, the response is stored.
    """

    body: ResponseRequest
    origin: Origin
    answer: ResponseAnswer
    stored: StoredResponses
    route: str
    """Routing key of the request."""
    made: str | None = None
    """``encrypted_content`` of the compaction item that the turn made, if any."""

    def take(self, piece: Piece) -> list[Event]:
        """Update the response with a piece of the turn, and return the stream events for this piece."""
        events = list(self.answer.events(piece))
        if isinstance(piece, Made):
            self.made = piece.token
        elif isinstance(piece, Ended):
            self.store(piece)
        return events

    def fail(self, error: Exception) -> list[Event]:
        """Record that the turn failed, store the response, and return the last events of the stream."""
        events = list(self.answer.failed(error))
        self.store()
        return events

    def leave(self) -> None:
        """Store the response as cancelled if its stream is closed before the turn has ended."""
        if self.answer.status == "in_progress":
            self.answer.status = "cancelled"
            self.store()

    def store(self, end: Ended | None = None) -> None:
        """Store the response in its present state, unless the request forbids storing (``store`` is false).

        ``end`` is the last piece of the turn, if the turn has ended. Its reply becomes part of the stored context.
        """
        if not self.body.store:
            return
        before = self.origin.context if self.made is None else Context(token=self.made)
        reply: tuple[Message, ...] = ()
        if end is not None and end.reason != "read":
            calls = tuple(call.plain() for call in end.calls) or None
            reply = (Message(role="assistant", content=end.text, tool_calls=calls),)
        context = Context(token=before.token, messages=before.messages + reply)
        items = listed(self.body.input or [])
        self.stored.put(
            Stored(
                owner=self.origin.owner,
                response=self.answer.object(),
                input=items,
                context=context,
                route=self.route,
                at=time.time(),
            )
        )


async def event_lines(creation: Creation, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[bytes]:
    """Yield the events of a streamed response as bytes; if the turn fails, the last events report the error."""
    async with aclosing(pieces):
        creation.store()
        for each in creation.answer.begin():
            yield _line(each)
        try:
            async for piece in pieces:
                for each in creation.take(piece):
                    yield _line(each)
        except Exception as error:  # noqa: BLE001  # the status has been sent: the stream reports it
            for each in creation.fail(error):
                yield _line(each)
        finally:
            creation.leave()


def _line(sent: Event) -> bytes:
    return event(sent, sent["type"])


async def in_background(server: Server, request: turns.Request, creation: Creation) -> None:
    """Run a turn for which no client waits; the response is stored when the turn ends or fails."""
    try:
        async with turn_of(server, request) as turn:
            async for piece in turn.pieces():
                creation.take(piece)
    except Exception as error:  # noqa: BLE001  # the stored response reports it
        creation.fail(error)
