"""Write the table of a calibration, which is a JSON file.

The table has the *share* of every head: the number of slots that the head should get, divided by the mean number per
head. If the method finds error curves, the table also has the errors of every head at several fractions of kept slots.
The table also has the settings, and the command that repeats the calibration.
"""

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

    ``shares [heads]`` has each head's number of slots, divided by the mean number per head.
    ``errors [heads][fractions]`` has the error curve of each head: one error per fraction of kept slots, in nats per
    token. ``errors`` is empty if the method finds no errors.
    """

    shares: Sequence[float]
    errors: Sequence[Sequence[float]] = ()


def as_table(model: ModelIdentity, terms: Terms, origin: Origin, found: Found) -> dict[str, Any]:
    """Return the table as JSON values.

    A head's share, its number of slots divided by the mean number per head, is rounded to 4 decimal places. Errors are
    rounded to 3 significant digits.
    """
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
    """Return ``value`` as JSON text on one line; a list of lists gets one line for each inner list instead.

    A dictionary without the key ``errors`` is always written on one line. In a dictionary with this key, each
    value that is a list of lists is divided into lines.
    """
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
