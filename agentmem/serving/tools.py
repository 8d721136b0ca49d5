"""Tools of a request: their schemas, which of them the model is shown, and what a call of one must be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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
"""Seconds of one search for a client's pattern."""


def _pattern(_: Any, pattern: str, value: object, __: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and not regex.search(pattern, value, timeout=_SEARCH):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_Validator = extend(Draft202012Validator, {"pattern": _pattern})
"""One whose patterns cannot hold the server up."""


class Function(BaseModel):
    """A tool's function. Where it is ``strict``, only a call whose arguments fit its schema is one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def schema_for_template(self) -> dict[str, Any]:
        """As chat templates write it."""
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
        """Whether a call may have these arguments."""
        if not self.strict or self.parameters is None:
            return True
        # Without a registry nothing is fetched: a schema that refers elsewhere fits nothing.
        try:
            return bool(_Validator(self.parameters, registry=Registry()).is_valid(arguments))
        except (Unresolvable, RecursionError, TimeoutError, regex.error):
            return False


def accepting(tools: Sequence[Function]) -> Accepts | None:
    """What tells a call of these tools from text; ``None`` where there are no tools."""
    by_name = {tool.name: tool for tool in tools}

    def accepts(name: str, arguments: dict[str, Any]) -> bool:
        return name in by_name and by_name[name].takes(arguments)

    return accepts if tools else None


def chosen(tools: Sequence[Function], choice: Any) -> Sequence[Function]:
    """The tools that the model is shown: all, or with ``tool_choice="none"`` no one.

    Raises:
        RequestRefused: a choice that only constrained decoding could keep.

    """
    if choice in (None, "auto"):
        return tools
    if choice == "none":
        return ()
    raise RequestRefused(
        f"tool_choice: {str(choice)[:80]} needs constrained decoding, which is not supported; use 'auto' or 'none'",
        code="unsupported_parameter",
        param="tool_choice",
    )
