"""Parse JSON from untrusted sources, after checking its bytes, its nesting depth and the number of its values."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, Final

from agentmem.untrusted.texts import shown

MAX_DEPTH: Final = 64
"""The deepest nesting of lists and objects."""
MAX_CONTAINERS: Final = 1 << 20
"""The most lists and objects in one JSON text; each takes far more memory than its bytes in the file."""
MAX_VALUES: Final = 1 << 21
"""The most values (counted by commas) in one JSON text."""
MAX_KEYS: Final = 1 << 15
"""The most keys of one object."""


def parsed(raw: bytes, max_bytes: int, *, strict: bool = True) -> dict[str, Any]:
    """Parse a JSON object with :func:`json_value`; raise ValueError if ``raw`` has another kind of value."""
    found = json_value(raw, max_bytes, strict=strict)
    if not isinstance(found, dict):
        raise ValueError(f"JSON of type {type(found).__name__}; an object is expected")  # noqa: TRY004  # bytes are wrong
    return found


def json_value(raw: bytes, max_bytes: int, *, strict: bool = True) -> Any:
    """Parse the JSON text in ``raw``. With ``strict``, repeated keys, NaN and infinite numbers are refused.

    Raises:
        ValueError: ``raw`` is no JSON, exceeds a limit, or is refused by ``strict``.

    """
    _check(raw, max_bytes)
    hooks: dict[str, Any] = {"object_pairs_hook": _few_keys}
    if strict:
        hooks = {"object_pairs_hook": _no_key_twice, "parse_float": _finite, "parse_constant": _finite}
    return json.loads(raw.decode("utf-8"), **hooks)


def tuples(found: Any) -> Any:
    """Replace all lists in parsed JSON by tuples, which strict pydantic models require."""
    if isinstance(found, dict):
        return {key: tuples(each) for key, each in found.items()}
    return tuple(map(tuples, found)) if isinstance(found, list) else found


def _check(raw: bytes, max_bytes: int) -> None:
    """Check the limits on a JSON text before it is parsed, because parsing could take too much memory.

    Raises:
        ValueError: a limit is exceeded; the message has the value and the limit.

    """
    if len(raw) > max_bytes:
        raise ValueError(f"JSON of {len(raw)} bytes; the limit is {max_bytes}")
    marks = _STRING.sub(b"", raw)
    values = marks.count(b",")
    containers = max(marks.count(b"[") + marks.count(b"{"), marks.count(b"]") + marks.count(b"}"))
    if containers > MAX_CONTAINERS:
        raise ValueError(f"JSON with {containers} lists and objects; the limit is {MAX_CONTAINERS}")
    if values > MAX_VALUES:
        raise ValueError(f"JSON with {values} values; the limit is {MAX_VALUES}")
    _check_depth(re.sub(rb"[^\[\]{}]++", b"", marks))


_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""Matches a string, or everything after an unclosed quote, in linear time."""


def _check_depth(brackets: bytes) -> None:
    depth = deepest = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ValueError(f"JSON nested {deepest} deep; the limit is {MAX_DEPTH}")


def _few_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object from pairs; refuse too many keys, because validation may later report an error for each key."""
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"JSON with an object of {len(pairs)} keys; the limit is {MAX_KEYS}")
    return dict(pairs)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = _few_keys(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"JSON with the key {shown(max(counts, key=lambda key: counts[key]))} twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"JSON with the number {shown(text)}; only finite numbers are allowed")
    return number
