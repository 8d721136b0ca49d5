"""Checks of the arguments that callers pass to sessions and runtimes, one function for each kind of value.

Every check raises :class:`SettingsRefused` for an invalid value; its message names the argument and the value.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence

from agentmem import hf
from agentmem.errors import SettingsRefused
from agentmem.untrusted.texts import shown

_SURROGATE = re.compile("[\ud800-\udfff]")


def refusal(field: str, value: object, remedy: str) -> SettingsRefused:
    """Return an error whose message has the name of a field, its invalid value and a remedy."""
    return SettingsRefused(f"{field}={shown(value)}: {remedy}")


def check_count(field: str, value: object, least: int = 0) -> None:
    """Check that a value is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise refusal(field, value, f"give a whole number, {least} at least")


def check_seconds(field: str, value: object, least: float = -math.inf) -> None:
    """Check that a value is a number (of seconds) of at least ``least``."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= least:
        raise refusal(field, value, "give a number of seconds" + ("" if least < 0 else f", {least:g} at least"))


def check_name(value: object) -> None:
    """Check that a value is a valid session name, or ``None``, which stands for a default name."""
    if value is not None and (not isinstance(value, str) or not value):
        raise refusal("name", value, "give a text of one character at least, or leave it out")
    check_encodable("name", value)


def check_text(field: str, value: object) -> None:
    """Check that a value is a string."""
    if not isinstance(value, str):
        raise refusal(field, value, "give a text")


def check_encodable(field: str, value: object) -> None:
    """Check that a text has no lone surrogate; check texts inside lists and dicts, too.

    A lone surrogate is half of a surrogate pair, and no tokenizer can read it. Lone surrogates come from an emoji that
    was cut in two, or from bytes that are not UTF-8, for example in file names.

    Raises:
        SettingsRefused: a text has a lone surrogate; the message names the field, the surrogate and its place.

    """
    if isinstance(value, str):
        if (found := _SURROGATE.search(value)) is not None:
            raise SettingsRefused(
                f"{field}: the character {found.group()!a} at {found.start()} is half of a surrogate pair, which no "
                "encoding has; repair the text first, for example with text.encode('utf-8', 'replace').decode()"
            )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_encodable(field, key)
            check_encodable(f"{field}.{key}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_encodable(field, item)


def check_flag(field: str, value: object) -> None:
    """Check that a value is True or False."""
    if not isinstance(value, bool):
        raise refusal(field, value, "give True or False")


def check_hook(field: str, value: object) -> None:
    """Check that a hook can be called or is ``None``, which means no hook."""
    if value is not None and not callable(value):
        raise refusal(field, value, "give a function, or leave it out")


def check_tools(value: object) -> None:
    """Check that a value is a list of valid tools, or ``None``, which means no tools."""
    if value is None:
        return
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise refusal("tools", value, "give a list of JSON schemas or functions")
    for tool in value:
        hf.check_tool(tool)


def check_variables(value: object) -> None:
    """Check that a value is ``None`` or a dict of chat-template variables by their names."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        raise refusal("template_options", value, "give a dict of the chat template's variables by their names")


def check_place(field: str, value: object) -> None:
    """Check that a value is a path or a URL. An empty path is refused, since it would mean the current folder."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise refusal(field, value, "give the path of a folder, or a URL that fsspec knows")


def check_making(name: object, tools: object, variables: object, **hooks: object) -> None:
    """Check the arguments that make a session: its name, tools, variables of the chat template, and hooks."""
    check_name(name)
    check_tools(tools)
    check_variables(variables)
    for field, hook in hooks.items():
        check_hook(field, hook)


def check_target(value: object) -> None:
    """Check that a value is a fraction between 0 and 1 (a float) or a number of slots per head (an integer)."""
    part = isinstance(value, float) and 0 < value < 1
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not part and not count:
        raise refusal("target", value, "give a fraction between 0 and 1, such as 0.25, or slots per head")
