"""``POST /v1/completions``: continue a text without a chat template and without keeping a conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from agentmem.errors import RequestRefused
from agentmem.serving import turns
from agentmem.serving.attendance import begun, ended
from agentmem.serving.chat.request import Count, StreamOptions
from agentmem.serving.event_stream import EventStream, event
from agentmem.serving.parameters import Parameters, stops
from agentmem.serving.pieces import Ended, Piece, Text
from agentmem.serving.recipes import Recipe
from agentmem.serving.refusals import error_object, refusal
from agentmem.serving.server import Server
from agentmem.settings import SEED_MAX, SEED_MIN

_TOKENS = 16
"""Maximum number of tokens of a completion whose request sets no limit; OpenAI's default."""


class CompletionRequest(Parameters):
    """The body of a ``/v1/completions`` request: one prompt, as text or as token ids."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "best_of": (1,),
        "echo": (False,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "logprobs": (),
        "suffix": ("",),
    }

    prompt: str | list[int] | list[str]
    max_tokens: Count | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=SEED_MIN, le=SEED_MAX)] | None = None
    stream_options: StreamOptions | None = None

    def asks(self, owner: str, tokenizer: Any) -> turns.Request:
        """Convert the body to the request of a turn that reads the prompt as raw token ids.

        Raises:
            RequestRefused: there is no prompt or more than one, or a field cannot be served.
            UnknownPolicy, SettingsRefused: the policy does not exist, or its options are wrong.

        """
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise RequestRefused(f"prompt: {len(prompt)} prompts; send one a request", param="prompt")
            prompt = prompt[0]
        if not prompt:
            raise RequestRefused("prompt: it is empty; give a text, or ids", param="prompt")
        sampling = self.sampling(self.max_tokens or _TOKENS, seed=self.seed, stop=stops(self.stop))
        recipe = Recipe.of(self.agentmem, None)
        return turns.Request(owner, (), recipe, sampling, raw=_ids(prompt, tokenizer))


def _ids(prompt: str | list[Any], tokenizer: Any) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestRefused(f"prompt: it cannot be encoded at {error.start}; repair it", param="prompt") from None
    return list(tokenizer(prompt)["input_ids"])


class CompletionAnswer:
    """Builder of the JSON of one completion: one whole object, or stream chunks with a common id."""

    def __init__(self, model: str, *, usage: bool = False) -> None:
        """Begin an answer with a new id; if ``usage`` is true, a stream ends with a chunk of token counts."""
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._usage = usage

    def whole(self, end: Ended) -> dict[str, Any]:
        """Return the completion of a turn that has ended, as one object."""
        return {**self.piece(end.text, end), "usage": end.usage.chat(), "agentmem": end.facts}

    def piece(self, text: str, end: Ended | None = None) -> dict[str, Any]:
        """Return the object for a piece of the text; it includes the finish reason if ``end`` is given."""
        reason = None if end is None else "stop" if end.reason == "stop" else "length"
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {**self._head, "choices": [choice]}

    def last(self, end: Ended) -> list[dict[str, Any]]:
        """Return the chunks that follow the text: the finish reason, then token counts if asked for."""
        chunks = [self.piece("", end) | {"agentmem": end.facts}]
        return [*chunks, {**self._head, "choices": [], "usage": end.usage.chat()}] if self._usage else chunks


def router(server: Server) -> APIRouter:
    """Return a router with the completions route of ``server``."""
    made = APIRouter()

    @made.post("/v1/completions")
    async def create(body: CompletionRequest, http: Request) -> Response:
        answer = CompletionAnswer(
            server.model(body.model), usage=body.stream_options is not None and body.stream_options.include_usage
        )
        request = body.asks(http.state.owner, server.runtime.tokenizer)
        if not body.stream:
            _, end = await ended(server, request, http)
            return JSONResponse(answer.whole(end))
        pieces, _ = await begun(server, request)
        return EventStream(_chunks(answer, pieces), server.settings.send_seconds, {})

    return made


async def _chunks(answer: CompletionAnswer, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[bytes]:
    """Yield the server-sent events of a streamed completion, up to ``[DONE]``.

    If the turn fails, an event with the error precedes ``[DONE]``.
    """
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                if isinstance(piece, Text):
                    yield event(answer.piece(piece.text))
                elif isinstance(piece, Ended):
                    for chunk in answer.last(piece):
                        yield event(chunk)
        except Exception as error:  # noqa: BLE001  # the status has been sent: the stream reports it
            yield event({"error": error_object(refusal(error))})
        yield event("[DONE]")
