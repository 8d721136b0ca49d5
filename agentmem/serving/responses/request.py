"""The bodies for ``/v1/responses`` and ``/v1/responses/compact``, and their conversion to the request of a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentmem.errors import RequestRefused
from agentmem.serving.forms import Form
from agentmem.serving.history import digest
from agentmem.serving.items import Item
from agentmem.serving.parameters import Parameters
from agentmem.serving.recipes import Recipe
from agentmem.serving.responses.context import Context
from agentmem.serving.settings import ServerSettings
from agentmem.serving.tools import Function, accepting, chosen
from agentmem.serving.turns import Request
from agentmem.sessions import Message

InputItems = str | list[dict[str, Any]]
Count = Annotated[int, Field(ge=1)]


class Tool(Function):
    """An entry of the field ``tools``: a function that the model may call."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _served(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else "function"
        if kind != "function":
            raise RequestRefused(
                f"tools: the type {str(kind)[:40]!r} is not supported; this server has functions alone",
                code="unsupported_parameter",
                param="tools",
            )
        return given


class ContextManagement(BaseModel):
    """An entry of the field ``context_management``: when to compact the conversation automatically."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["compaction"]
    compact_threshold: Count | None = None
    """The conversation is compacted when it has this number of tokens after the newest compaction item."""


class TextFormat(BaseModel):
    """The field ``text`` of a request, which says whether the reply must be text or JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Form | None = None
    verbosity: Literal["medium"] | None = None


class Continued(Parameters):
    """The fields that ``/v1/responses`` and ``/v1/responses/compact`` share."""

    ignored: ClassVar[frozenset[str]] = Parameters.ignored | {"image"}

    input: InputItems | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None

    def context(self) -> Context:
        """Convert the ``input`` field to a context.

        Raises:
            RequestRefused: an item of the input is invalid; the error gives its index.

        """
        return Context() if self.input is None else Context.of(self.input)


class CompactRequest(Continued):
    """The body of a ``/v1/responses/compact`` request."""


class ResponseRequest(Continued):
    """The body of a ``/v1/responses`` request."""

    ignored: ClassVar[frozenset[str]] = Continued.ignored | {"truncation", "stream_options"}
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background_options": (),
        "conversation": (),
        "include": ([], ["reasoning.encrypted_content"]),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}),
        "top_logprobs": (0,),
    }

    max_output_tokens: Count | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = None
    store: bool = True
    background: bool = False
    text: TextFormat = TextFormat()
    tools: tuple[Tool, ...] = ()
    tool_choice: Any = None
    parallel_tool_calls: Annotated[bool, Field(strict=True)] = True
    context_management: tuple[ContextManagement, ...] = ()

    def check(self) -> None:
        """Refuse fields that contradict each other.

        Raises:
            RequestRefused: ``background`` is set without ``store``, or together with ``stream``.

        """
        if self.background and (self.stream or not self.store):
            raise RequestRefused("background: it needs store=true and stream=false", param="background")

    @property
    def threshold(self) -> int | None:
        """Number of new tokens after which the conversation is compacted; ``None`` to compact only on demand.

        New tokens are those after the newest compaction item, or all tokens if there is no item.
        """
        found = [each.compact_threshold for each in self.context_management if each.compact_threshold is not None]
        return min(found, default=None)


@dataclass(frozen=True, slots=True)
class Origin:
    """The owner of a request, and the conversation, context and compaction item that the request continues.

    A compaction item is a saved memory that stands for all earlier messages.
    """

    owner: str
    name: str | None
    """Name of the conversation from the header ``X-Agentmem-Session``, or ``None``."""
    context: Context
    item: Item | None


def asks(body: ResponseRequest, origin: Origin, settings: ServerSettings) -> Request:
    """Convert the body for ``/v1/responses`` to the request of a turn.

    Raises:
        RequestRefused: a field cannot be served; the error names the field.
        UnknownPolicy, SettingsRefused: the policy does not exist, or its options are wrong.

    """
    choice = chosen(body.tools, body.tool_choice, parallel=body.parallel_tool_calls)
    tools = choice.shown
    recipe = Recipe.of(body.agentmem, [tool.schema_for_template() for tool in tools] or None)
    item, trigger = origin.item, origin.context.trigger
    messages, lead = led(origin, body.instructions)
    return Request(
        origin.owner,
        messages,
        recipe if item is None else item_recipe(recipe, item),
        body.sampling(body.max_output_tokens or settings.reply_tokens),
        origin.name,
        body.prompt_cache_key,
        accepting(tools),
        body.agentmem.compact is not None,
        body.agentmem.focus,
        item,
        lead,
        compact=trigger,
        threshold=body.threshold,
        write=not trigger,
        forced=choice.forced,
        schema=None if body.text.format is None else body.text.format.wanted("text.format"),
    )


def asks_compaction(body: CompactRequest, origin: Origin) -> Request:
    """Convert the body for ``/v1/responses/compact`` to the request of a turn that compacts and writes no reply."""
    messages, lead = led(origin, body.instructions)
    return Request(
        origin.owner,
        messages,
        Recipe.of(body.agentmem, None) if origin.item is None else origin.item.record.recipe,
        name=origin.name,
        label=body.prompt_cache_key,
        focus=body.agentmem.focus,
        item=origin.item,
        lead=lead,
        any_recipe=True,
        compact=True,
        write=False,
    )


def led(origin: Origin, instructions: str | None) -> tuple[Sequence[Message], str | None]:
    """Return the messages that a request's turn must read, and the digest (hash) of the request's instructions.

    The first of these messages has the instructions. A request may continue a compaction item (``origin.item``), which
    is a saved memory in place of all earlier messages. If the saved memory already begins with the same instructions,
    they are left out of the messages. The digest is ``None`` if there are no instructions.

    Raises:
        RequestRefused: there are no messages, no instructions and no compaction item.

    """
    messages = origin.context.messages
    if instructions is None:
        if not messages and origin.item is None:
            raise RequestRefused("input: it is missing, and nothing is gone on from; give one", param="input")
        return messages, None
    lead = Message.of(role="system", content=instructions)
    if origin.item is not None and origin.item.record.lead == digest(lead):
        return messages, digest(lead)
    return (lead, *messages), digest(lead)


def item_recipe(asked: Recipe, item: Item) -> Recipe:
    """Return the recipe (session arguments) of ``item``, which a request continues.

    ``item`` is a compaction item: a saved memory. ``asked`` is the recipe that the request gives. It must have the same
    tools as the item's recipe. The request may leave out all other fields of the item's recipe, or repeat all of them.

    Raises:
        RequestRefused: the request asks for another recipe.

    """
    kept = item.record.recipe
    if asked not in (kept, replace(kept, policy=None, settings="{}", options="null")):
        raise RequestRefused(
            "input: the compaction item was made with other tools or other fields under 'agentmem', which its memory "
            "holds; send the same, or read the conversation anew",
            code="compaction_other_recipe",
            param="input",
        )
    return kept
