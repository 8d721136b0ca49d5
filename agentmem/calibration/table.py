"""Write the table of a calibration: shares, error curves, and the settings and command to repeat the calibration."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from agentmem.calibration.partial import REMEDY
from agentmem.models.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from agentmem.calibration.terms import Terms
    from agentmem.contracts import ModelIdentity

VERSION = 1
"""Version of the file format; readers refuse other versions."""
_DIGITS = 4
_SIGNIFICANT = 3


@dataclass(frozen=True, slots=True)
class Origin:
    """Identify the text that was read, and the command that makes the table again."""

    text: str
    sha256: str
    """SHA-256 of the whole text in UTF-8, including the part before ``offset``."""
    offset: int
    tokens: int
    command: str


@dataclass(frozen=True, slots=True)
class Found:
    """Hold the outcome of a calibration.

    ``shares [heads]`` are the heads' numbers of slots, divided by their mean. ``errors [heads][fractions]`` are the
    error curves in nats per token, with one error per fraction of kept slots; they are empty if the method finds no
    errors.
    """

    shares: Sequence[float]
    errors: Sequence[Sequence[float]] = ()


def as_table(model: ModelIdentity, terms: Terms, origin: Origin, found: Found) -> dict[str, Any]:
    """Return the table as JSON values; shares are rounded to 4 decimal places, errors to 3 significant digits."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(terms).items()}
    settings.pop("method")  # it has a key of its own
    table: dict[str, Any] = {
        "format": "agentmem head shares",
        "version": VERSION,
        "command": origin.command,
        "model": {"name": model.name, "fingerprint": model.fingerprint, "kv_heads": list(model.kv_heads)},
        "text": {"name": origin.text, "sha256": origin.sha256, "offset": origin.offset, "tokens": origin.tokens},
        "agentmem": version("agentmem-runtime"),
        "method": terms.method,
        "settings": settings,
        "shares": _by_layer([round(share, _DIGITS) for share in found.shares], model.kv_heads),
    }
    if found.errors:
        errors = [[float(f"{error:.{_SIGNIFICANT}g}") for error in curve] for curve in found.errors]
        table["curves"] = {"fractions": list(terms.fractions), "errors": _by_layer(errors, model.kv_heads)}
    return table


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write the table to ``path``, with one line per layer.

    Raises:
        AgentmemError: the file cannot be written.

    """
    lines = [f"{json.dumps(name)}: {_lines(value)}" for name, value in table.items()]
    write_whole(path, "{\n  " + ",\n  ".join(lines) + "\n}\n", what="calibration", remedy=REMEDY)


def _lines(value: Any) -> str:
    """Return ``value`` as JSON. Of a list of lists, each inner list gets a line; any other value is one line."""
    if isinstance(value, dict) and "errors" in value:
        return "{" + ", ".join(f"{json.dumps(name)}: {_lines(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n    " + ",\n    ".join(map(json.dumps, value)) + "\n  ]"
    return json.dumps(value)


def _by_layer(heads: Sequence[Any], kv_heads: Sequence[int]) -> list[list[Any]]:
    found, first = [], 0
    for count in kv_heads:
        found.append(list(heads[first : first + count]))
        first += count
    return found
