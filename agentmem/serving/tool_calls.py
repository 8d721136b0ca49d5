"""Parsing of tool calls in the text of a reply, in the formats of common chat templates.

Text that is not a valid tool call stays text.

Sources: the chat templates of Qwen 2.5/3 and Hermes 2 Pro, of Llama 3.1, and of Mistral v3 and v11.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_JSON = json.JSONDecoder()
_ID = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call, with its arguments as JSON text."""

    id: str
    name: str
    arguments: str

    def plain(self) -> dict[str, Any]:
        """Return the call as an entry of a message's ``tool_calls``, with the arguments as an object."""
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


Found = list[tuple[str, Any]]
"""Name and arguments of each parsed call."""
Accepts = Callable[[str, dict[str, Any]], bool]
"""Function that checks a call's name and arguments: the request has a tool of this name, which takes the arguments."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The format in which a family of models writes tool calls."""

    name: str
    openers: tuple[str, ...]
    """Texts with which tool calls begin."""
    read: Callable[[str], tuple[Found, str]]
    """Function that parses a text beginning with an opener into its calls and the text between and after them.

    Raises:
        ValueError: the text is not a valid call.
    """
    written: tuple[str, str, str]
    """How to write one call: the text before its JSON, the JSON key of its arguments, and the text after its JSON."""
    markers: tuple[str, ...]
    """Texts of the format that may be special tokens, which decoding omits."""
    bare: bool = False
    """True if a reply may also begin with the JSON of a call, without an opener."""
    id_letters: int = 24

    def calls(self, text: str, accepts: Accepts) -> tuple[list[ToolCall], str] | None:
        """Parse the tool calls in ``text``; return the calls and the remaining text.

        ``text`` is the reply from the beginning of its first tool call to its end. Return ``None`` if any call is
        malformed or is refused by ``accepts``; the whole reply is then plain text.
        """
        try:
            found, rest = self.read(text)
            made = [self._call(name, arguments, accepts) for name, arguments in found]
        except (ValueError, RecursionError):
            return None
        return (made, rest) if made else None

    def _call(self, name: object, arguments: object, accepts: Accepts) -> ToolCall:
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict) or not accepts(name, arguments):
            raise ValueError(name)
        prefix = "call_" if self.id_letters > len("call_") * 2 else ""
        made = prefix + "".join(secrets.choice(_ID) for _ in range(self.id_letters))
        return ToolCall(made, name, json.dumps(arguments, ensure_ascii=False))


def _fields(value: object, arguments: tuple[str, ...]) -> tuple[str, Any]:
    if not isinstance(value, dict) or "name" not in value:
        raise ValueError("no call")
    given: Any = next((value[name] for name in arguments if name in value), {})
    return value["name"], given


def _hermes(text: str) -> tuple[Found, str]:
    """Parse ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, repeated; the last end tag may be missing."""
    found, rest = [], ""
    while (start := text.find("<tool_call>")) >= 0:
        rest, text = rest + text[:start], text[start + len("<tool_call>") :].lstrip()
        value, stop = _JSON.raw_decode(text)
        found.append(_fields(value, ("arguments", "parameters")))
        text = text[stop:].lstrip().removeprefix("</tool_call>")
    return found, (rest + text).strip()


def _llama3(text: str) -> tuple[Found, str]:
    """Parse one or more ``{"name": …, "parameters": {…}}``, separated by semicolons."""
    found, text = [], text.strip().removeprefix("<|python_tag|>").strip()
    while text:
        value, stop = _JSON.raw_decode(text)
        found.append(_fields(value, ("parameters", "arguments")))
        text = text[stop:].lstrip(" \n;")
    return found, ""


def _mistral(text: str) -> tuple[Found, str]:
    """Parse ``[TOOL_CALLS] [{"name": …, "arguments": {…}}]``, or ``[TOOL_CALLS]name[ARGS]{…}`` once for each call."""
    found: Found = []
    for part in text.split("[TOOL_CALLS]")[1:]:
        name, text = "", part.strip()
        if not text.startswith(("[", "{")):
            name, _, text = (piece.strip() for piece in text.partition("[ARGS]"))
        value, stop = _JSON.raw_decode(text)
        if text[stop:].strip():
            raise ValueError("text behind a call")
        values = value if isinstance(value, list) else [value]
        found += [(name, value)] if name else [_fields(each, ("arguments",)) for each in values]
    return found, ""


HERMES = ToolFormat(
    "hermes",
    ("<tool_call>",),
    _hermes,
    ("<tool_call>\n", "arguments", "\n</tool_call>"),
    ("<tool_call>", "</tool_call>"),
)
LLAMA3 = ToolFormat("llama3", ("<|python_tag|>",), _llama3, ("", "parameters", ""), ("<|python_tag|>",), bare=True)
MISTRAL = ToolFormat(
    "mistral",
    ("[TOOL_CALLS]",),
    _mistral,
    ("[TOOL_CALLS] [", "arguments", "]"),
    ("[TOOL_CALLS]", "[ARGS]"),
    id_letters=9,
)


def tool_format(template: str) -> ToolFormat | None:
    """Return the tool call format that the chat template's source text uses, or ``None`` if it uses no known format."""
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<|python_tag|>" in template or ('"parameters"' in template and "ipython" in template):
        return LLAMA3
    return None
