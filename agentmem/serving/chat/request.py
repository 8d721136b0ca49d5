"""The body of a chat completion request, and its conversion to the request of a turn."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentmem.errors import RequestRefused, SettingsRefused
from agentmem.serving.forms import Form
from agentmem.serving.parameters import Parameters, stops
from agentmem.serving.recipes import Recipe
from agentmem.serving.settings import ServerSettings
from agentmem.serving.tools import Function, accepting, chosen
from agentmem.serving.turns import Request
from agentmem.sessions import Message
from agentmem.settings import SEED_MAX, SEED_MIN

Count = Annotated[int, Field(ge=1)]


class Tool(BaseModel):
    """An entry of the field ``tools``: a function that the model may call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["function"]
    function: Function


class StreamOptions(BaseModel):
    """The field ``stream_options``. ``include_obfuscation`` is accepted and has no effect."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(Parameters):
    """The body of a ``/v1/chat/completions`` request."""

    ignored: ClassVar[frozenset[str]] = Parameters.ignored | {"store"}
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "logprobs": (False,),
        "top_logprobs": (),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "moderation": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
        "functions": ([],),
        "function_call": ("none",),
    }

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=SEED_MIN, le=SEED_MAX)] | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: Any = None
    parallel_tool_calls: Annotated[bool, Field(strict=True)] = True
    response_format: Form | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None

    def asks(self, owner: str, name: str | None, settings: ServerSettings) -> Request:
        """Convert the body to the request of a turn; ``name`` is the name of the conversation, if the client gave any.

        Raises:
            RequestRefused: a field cannot be served; the error names the field.
            UnknownPolicy, SettingsRefused: the policy does not exist, or its options are wrong.

        """
        if self.stream_options is not None and not self.stream:
            raise RequestRefused("stream_options: it belongs to stream=true", param="stream_options")
        choice = chosen([tool.function for tool in self.tools], self.tool_choice, parallel=self.parallel_tool_calls)
        tools = choice.shown
        recipe = Recipe.of(self.agentmem, [tool.schema_for_template() for tool in tools] or None)
        length = self.max_completion_tokens or self.max_tokens or settings.reply_tokens
        return Request(
            owner,
            messages_of(self.messages),
            recipe,
            self.sampling(length, seed=self.seed, stop=stops(self.stop)),
            name,
            self.prompt_cache_key,
            accepting(tools),
            self.agentmem.compact is not None,
            self.agentmem.focus,
            forced=choice.forced,
            schema=None if self.response_format is None else self.response_format.wanted("response_format"),
        )


def messages_of(given: list[dict[str, Any]]) -> list[Message]:
    """Convert the message objects of a request to the messages that sessions read.

    Raises:
        RequestRefused: an object is not a valid message; the error gives the index of the first invalid object.

    """
    made = []
    for at, each in enumerate(given):
        try:
            made += Message.each([each])
        except SettingsRefused as error:
            raise RequestRefused(f"messages[{at}]: {error}", param=f"messages[{at}]") from None
    return made
