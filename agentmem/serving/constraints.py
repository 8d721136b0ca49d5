"""Constrained replies: the package llguidance forces a reply to be a tool call, or JSON that fits a schema.

A grammar is made from the schemas of a request, and checked before the turn begins. While the reply is decoded, the
grammar decides which tokens are allowed next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from agentmem.errors import RequestRefused

if TYPE_CHECKING:
    from agentmem.serving.tool_calls import ToolFormat
    from agentmem.serving.tools import Function

_PLAIN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space that the JSON of a reply may have, as models usually write it.

If more white space were allowed, a small model could write white space without end.
"""


_NONE = {"type": "object", "properties": {}}
"""Schema for the arguments of a tool whose request gives no schema: an object without properties."""


class Constraints:
    """Maker of grammars for one tokenizer. llguidance analyses the tokenizer when the first grammar is made."""

    def __init__(self, tokenizer: Any, writes: ToolFormat | None) -> None:
        """Set the tokenizer, and ``writes``, the format in which the model writes tool calls, if known."""
        self._tokenizer, self._format = tokenizer, writes
        self._tokens: Any = None

    def of(self, forced: Sequence[Function], schema: Mapping[str, Any] | None, param: str) -> str | None:
        """Return the grammar that a reply must follow, or ``None`` if the reply is not constrained.

        If there are ``forced`` tools, the reply must call one of them. Otherwise, if there is a ``schema``, the reply
        must be JSON that fits the schema. ``param`` is the name of the schema's field in the request;
        an error about the schema gives this name.

        Raises:
            RequestRefused: see :meth:`of_calls` and :meth:`of_schema`.

        """
        if forced:
            return self.of_calls(forced)
        return None if schema is None else self.of_schema(schema, param)

    def of_calls(self, tools: Sequence[Function], param: str = "tool_choice") -> str:
        """Return a grammar that allows exactly one call of one of ``tools``.

        Raises:
            RequestRefused: the format in which the model writes tool calls is unknown, or llguidance does not support
                the schema of a tool.

        """
        if self._format is None:
            raise _refused("this model's chat template teaches no format of calls; use 'auto' or 'none'", param)
        begin, key, end = self._format.written
        rules = [
            f'call_{at}: {_name(each.name, key)} {_json(_closed(each.parameters or _NONE))} "}}"'
            for at, each in enumerate(tools)
        ]
        any_call = " | ".join(f"call_{at}" for at in range(len(tools)))
        start = f"start: {self._written(begin)} ({any_call}) {self._written(end)}"
        return self._checked("\n".join([start, *rules]), param)

    def of_schema(self, schema: Mapping[str, Any], param: str) -> str:
        """Return a grammar that allows only JSON that fits ``schema``.

        Raises:
            RequestRefused: the schema is invalid, or llguidance does not support it.

        """
        return self._checked(f"start: {_json(schema)}", param)

    def follow(self, grammar: str) -> Following:
        """Return a logits processor that constrains one reply to the grammar."""
        from llguidance import LLMatcher

        return Following(LLMatcher(self._known(), LLMatcher.grammar_from_lark(grammar)))

    def _checked(self, grammar: str, param: str) -> str:
        from llguidance import LLMatcher

        try:
            fault = LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar), self._known(param))
        except ValueError as error:
            fault = str(error)
        if fault:
            raise _refused(f"{fault[:300]}; simplify the schema", param)
        return grammar

    def _written(self, text: str) -> str:
        """Return the grammar expression for a literal text; special tokens in the text are written as token ids."""
        tokenizer = self._tokenizer
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        found = next((mark for mark in special if mark in text), None)
        if found is None:
            return json.dumps(text) if text else ""
        before, _, after = text.partition(found)
        return " ".join(filter(None, (self._written(before), f"<[{special[found]}]>", self._written(after))))

    def _known(self, param: str | None = None) -> Any:
        if self._tokens is None:
            from llguidance.hf import from_tokenizer

            try:
                self._tokens = from_tokenizer(self._tokenizer)
            except (ValueError, TypeError) as error:
                raise _refused(
                    f"this model's tokenizer cannot be held to a form ({error}); leave it out", param
                ) from None
        return self._tokens


class Following:
    """Logits processor for one reply that excludes every token that the grammar does not allow next."""

    def __init__(self, matcher: Any) -> None:
        """Take an llguidance matcher that has not consumed any token yet."""
        self._matcher, self._read = matcher, -1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores `[1, vocabulary]` with −inf for every excluded token."""
        length = input_ids.shape[1]
        if self._read >= 0:
            self._matcher.consume_tokens(input_ids[0, self._read :].tolist())
        self._read = length
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        taken = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
        taken[: len(allowed)] = (allowed == 0).to(scores.device)[: scores.shape[1]]
        return scores.masked_fill(taken, float("-inf"))


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _PLAIN})}"


def _closed(schema: Any) -> Any:
    """Return a copy of a schema in which objects may have only the properties that the schema names.

    An object schema that sets ``additionalProperties`` or ``patternProperties`` itself keeps its setting.
    """
    if not isinstance(schema, dict):
        return schema
    made = {**schema}
    if isinstance(own := schema.get("properties"), dict):
        made["properties"] = {name: _closed(each) for name, each in own.items()}
        if "patternProperties" not in schema:
            made.setdefault("additionalProperties", False)
    if "items" in schema:
        made["items"] = _closed(schema["items"])
    return made


def _name(name: str, key: str) -> str:
    return json.dumps(f'{{"name": "{name}", "{key}": ')


def _refused(why: str, param: str | None = None) -> RequestRefused:
    return RequestRefused(f"{param or 'request'}: {why}", code="unsupported_parameter", param=param)
