"""Tools of a request: their schemas, which of them the model sees or must call, and the check of calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import extend
from pydantic import BaseModel, ConfigDict, Field, model_validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from agentmem.errors import RequestRefused
from agentmem.serving.tool_calls import Accepts

_SEARCH = 0.05
"""Maximum duration in seconds of one search for a regular expression from a client's schema."""


def _pattern(_: Any, pattern: str, value: object, __: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and not regex.search(pattern, value, timeout=_SEARCH):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_Validator = extend(Draft202012Validator, {"pattern": _pattern})
"""Validator of JSON schemas with a time limit for each pattern search, so that no pattern can block the server."""


class Function(BaseModel):
    """A function that the model may call.

    If ``strict`` is true, a call whose arguments do not fit the schema is treated as text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def schema_for_template(self) -> dict[str, Any]:
        """Return the function as the tool object that chat templates expect."""
        function: dict[str, Any] = {"name": self.name, "description": self.description or ""}
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}

    @model_validator(mode="after")
    def _is_schema(self) -> Any:
        schema = self.parameters or {}
        try:
            Draft202012Validator.check_schema(schema)
        except (SchemaError, RecursionError) as error:
            said = getattr(error, "message", "it is too deep")
            raise RequestRefused(
                f"tools: the parameters of {self.name} are no JSON schema: {said}", param="tools"
            ) from None
        if self.strict and "patternProperties" in json.dumps(schema):
            raise RequestRefused(
                f"tools: {self.name} is strict and has patternProperties, which is not supported; name its properties",
                code="unsupported_parameter",
                param="tools",
            )
        if schema.get("type", "object") != "object":
            raise RequestRefused(
                f"tools: the parameters of {self.name} are of the type {str(schema['type'])[:40]!r}; a tool takes an "
                "object",
                param="tools",
            )
        return self

    def takes(self, arguments: dict[str, Any]) -> bool:
        """Check whether a call may have these arguments; a function that is not ``strict`` accepts all arguments."""
        if not self.strict or self.parameters is None:
            return True
        # An empty registry fetches nothing: a schema that refers to another document accepts no arguments.
        try:
            return bool(_Validator(self.parameters, registry=Registry()).is_valid(arguments))
        except (Unresolvable, RecursionError, TimeoutError, regex.error):
            return False


def accepting(tools: Sequence[Function]) -> Accepts | None:
    """Return a function that checks a call's name and arguments against ``tools``; return ``None`` without tools."""
    by_name = {tool.name: tool for tool in tools}

    def accepts(name: str, arguments: dict[str, Any]) -> bool:
        return name in by_name and by_name[name].takes(arguments)

    return accepts if tools else None


@dataclass(frozen=True, slots=True)
class Choice:
    """The tools that the model sees or must call, according to a request's ``tool_choice``."""

    shown: tuple[Function, ...]
    """Tools that the model sees in its prompt."""
    forced: tuple[Function, ...] = ()
    """Tools of which the reply must call exactly one; empty if the reply need not call any."""


def chosen(tools: Sequence[Function], choice: Any, *, parallel: bool = True) -> Choice:
    """Decide which tools the model sees, and which of them the reply must call.

    ``tools``, ``choice`` and ``parallel`` are the request's ``tools``, ``tool_choice`` and ``parallel_tool_calls``.

    Raises:
        RequestRefused: ``choice`` is unknown or names no tool of the request; or ``parallel`` is false although
            ``choice`` lets the model write several calls.

    """
    shown = tuple(tools)
    if choice == "none":
        return Choice(())
    if choice in (None, "auto"):
        if shown and not parallel:
            raise RequestRefused(
                "parallel_tool_calls: false is kept where tool_choice is 'required' or names a tool; leave it out",
                code="unsupported_parameter",
                param="parallel_tool_calls",
            )
        return Choice(shown)
    name = _named(choice)
    forced = shown if choice == "required" else tuple(tool for tool in shown if tool.name == name)
    if not forced:
        known = ", ".join(tool.name for tool in shown) or "none"
        raise RequestRefused(
            f"tool_choice: {str(choice)[:80]} names no tool of this request, whose tools are: {known}; use one of "
            "these, 'auto', 'required' or 'none'",
            param="tool_choice",
        )
    return Choice(shown, forced)


def _named(choice: Any) -> str | None:
    """Return the name of the tool that ``choice`` (a request's ``tool_choice``) names, or ``None`` if it names no tool.

    Both formats are read: that of ``/v1/chat/completions`` and that of ``/v1/responses``.
    """
    if not isinstance(choice, dict) or choice.get("type") != "function":
        return None
    found = choice.get("function", choice)
    return found.get("name") if isinstance(found, dict) else None
