"""The form that a request demands of its reply: text, any JSON object, or JSON that fits a given schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentmem.errors import RequestRefused

_NAME = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")


class Form(BaseModel):
    """The field ``response_format`` of a chat completion, or ``text.format`` of a response."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, _NAME] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, given: Any) -> Any:
        """Convert a ``response_format`` to a ``text.format``, and return a ``text.format`` unchanged.

        A ``response_format`` has the schema's fields in an object ``json_schema``; a ``text.format`` has them directly.
        """
        if isinstance(given, dict) and isinstance(given.get("json_schema"), dict):
            return {"type": given.get("type"), **given["json_schema"]}
        return given

    def wanted(self, param: str) -> dict[str, Any] | None:
        """Return the JSON schema that a reply must fit, or ``None`` if the reply is text.

        Errors name the request's field ``param``.

        Raises:
            RequestRefused: the schema is not a valid JSON schema.

        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        schema = self.schema_ or {}
        try:
            Draft202012Validator.check_schema(schema)
        except (SchemaError, RecursionError) as error:
            said = getattr(error, "message", "it is too deep")
            raise RequestRefused(f"{param}: its schema is none: {said}", param=param) from None
        return schema
