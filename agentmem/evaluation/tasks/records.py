"""Read and check the data files of tasks: one JSON object per line, or a JSON list; gzip is allowed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from agentmem.errors import SettingsRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHOWN = 120
_GZIP = b"\x1f\x8b"


class Record(BaseModel):
    """Base class of the records in data files; fields that a task does not need are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


Kind = TypeVar("Kind", bound=Record)


def read_records(path: str | Path, kind: type[Kind]) -> list[Kind]:
    """Read all records of a data file, in order, and return them as objects of the class ``kind``.

    Raises:
        SettingsRefused: the file cannot be read, has no record, or has an invalid record; the message names the line
            or list entry of that record.

    """
    path = Path(path).expanduser()
    found = [_record(place, value, kind) for place, value in _values(path, _text(path))]
    if not found:
        raise SettingsRefused(f"data: {path} holds no record; each is an object with {_fields(kind)}")
    return found


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if content.startswith(_GZIP) else content).decode()
    except UnicodeDecodeError as error:
        raise SettingsRefused(f"data: {path} is not UTF-8 at byte {error.start}; convert it first") from None
    except (OSError, EOFError) as error:
        raise SettingsRefused(f"data: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _values(path: Path, text: str) -> Iterator[tuple[str, object]]:
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise SettingsRefused(f"data: {path} is no JSON: {error}") from None
        yield from ((f"{path.name}[{index}]", entry) for index, entry in enumerate(entries))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except ValueError as error:
                raise SettingsRefused(f"data: {path.name}:{number} is no JSON: {error}") from None


def _record(place: str, value: object, kind: type[Kind]) -> Kind:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the record"
        raise SettingsRefused(
            f"data: {place}: {field}: {first['msg']} (got {repr(first['input'])[:_SHOWN]}); "
            f"each record is an object with {_fields(kind)}"
        ) from None


def _fields(kind: type[Record]) -> str:
    return ", ".join(name if field.is_required() else f"{name} (optional)" for name, field in kind.model_fields.items())
