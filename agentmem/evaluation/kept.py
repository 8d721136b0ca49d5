"""Measurements on disk: one JSON file each, found again only by the same settings and the same code."""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from agentmem.models.files import write_whole
from agentmem.untrusted.files import read_plain
from agentmem.untrusted.json_text import parsed

if TYPE_CHECKING:
    from agentmem.contracts import Policy

_MAX_BYTES = 64 << 20
Kept = TypeVar("Kept", bound=BaseModel)
_DRAWING = frozenset({"pictures.py", "plots.py"})
_BESIDE = ("calibration", "cli", "policies", "sessions")
"""Packages that a measurement does not run through; a policy's own sources are added for that policy."""


def settings_key(policy: Policy | str, *terms: BaseModel) -> str:
    """Names a policy with its options, its terms and the code they run through; 24 hexadecimal digits.

    A text stands for a way of reading that needs no policy.
    """
    parts, sources = [policy if isinstance(policy, str) else policy.name], set(_core())
    if not isinstance(policy, str):
        parts += [repr(policy.queries), _state(policy.compactor), _state(policy.budgets)]
        sources |= _policy_sources(policy)
    digest = hashlib.sha256("\n".join([*parts, *(each.model_dump_json() for each in terms)]).encode())
    for source in sorted(sources):
        digest.update(_file_digest(source))
    return digest.hexdigest()[:24]


def load(kind: type[Kept], path: Path) -> Kept | None:
    """What was saved at ``path``; ``None`` if nothing whole of that kind is there."""
    try:
        found = parsed(read_plain(path, _MAX_BYTES), _MAX_BYTES, strict=False)
        return kind.model_validate(found)
    except (OSError, ValueError):
        return None


def save(value: BaseModel, path: Path) -> None:
    """Write ``value`` so that ``path`` is whole or absent, whatever happens meanwhile.

    Raises:
        AgentmemError: the file cannot be written.

    """
    remedy = "choose another place with --cache-dir"
    write_whole(path, value.model_dump_json(), what="evaluation", remedy=remedy)


def _state(part: object) -> str:
    """The class of a compactor or of budgets with its options."""
    options = {**getattr(part, "__dict__", {})}
    if is_dataclass(part):  # one with slots has no __dict__ of its fields
        options |= {each.name: getattr(part, each.name) for each in fields(part)}
    return f"{type(part).__module__}.{type(part).__qualname__} {sorted(options.items())}"


def _core() -> set[Path]:
    """The sources of the runtime and of this instrument, without those that only draw."""
    package = Path(__file__).parents[1]
    beside = {package / name for name in _BESIDE}
    return {path for path in package.rglob("*.py") if path.name not in _DRAWING and beside.isdisjoint(path.parents)}


def _policy_sources(policy: Policy) -> set[Path]:
    """The sources of the package that defines the policy's parts, or of their module if it is in none."""
    found: set[Path] = set()
    for part in (policy.compactor, policy.budgets):
        module = sys.modules.get(type(part).__module__)
        if part is None or module is None or not getattr(module, "__file__", None):
            continue
        source = Path(inspect.getfile(module))
        found.update(source.parents[_depth(module.__package__)].rglob("*.py") if module.__package__ else [source])
    return found


def _depth(package: str) -> int:
    """Folders between a package and the outermost one around it; ``agentmem`` itself does not count as one."""
    return package.removeprefix("agentmem.").count(".")


@cache
def _file_digest(source: Path) -> bytes:
    return hashlib.sha256(source.read_bytes()).digest()
