"""Keep measurements on disk as JSON files, which are found again only with the same settings and code."""

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
_BESIDE = ("calibration", "cli", "evaluation/ablation", "evaluation/tasks", "policies", "sessions")
"""Packages whose code a measurement does not run; :func:`settings_key` adds the sources of the measured policy."""


def settings_key(policy: Policy | str, *terms: BaseModel) -> str:
    """Return a key of 24 hexadecimal digits for a policy, its options, the settings ``terms``, and the code that runs.

    ``terms`` are any settings that the result depends on, such as those of the memory. ``policy`` may also be the name
    of a baseline that needs no policy.
    """
    parts, sources = [policy if isinstance(policy, str) else policy.name], set(_core())
    if not isinstance(policy, str):
        parts += [repr(policy.queries), _state(policy.compactor), _state(policy.budgets)]
        sources |= _policy_sources(policy)
    digest = hashlib.sha256("\n".join([*parts, *(each.model_dump_json() for each in terms)]).encode())
    for source in sorted(sources):
        digest.update(_file_digest(source))
    return digest.hexdigest()[:24]


def code_digest(folder: str) -> str:
    """Return a digest of the Python sources below one folder of the package, such as ``evaluation/tasks``."""
    digest = hashlib.sha256()
    for source in sorted((Path(__file__).parents[1] / folder).rglob("*.py")):
        digest.update(_file_digest(source))
    return digest.hexdigest()


def load(kind: type[Kept], path: Path) -> Kept | None:
    """Load the value saved at ``path``; return ``None`` if the file is missing or is no valid ``kind``."""
    try:
        found = parsed(read_plain(path, _MAX_BYTES), _MAX_BYTES, strict=False)
        return kind.model_validate(found)
    except (OSError, ValueError):
        return None


def save(value: BaseModel, path: Path) -> None:
    """Write ``value`` to ``path`` so that an interruption never leaves an incomplete file there.

    Raises:
        AgentmemError: the file cannot be written.

    """
    remedy = "choose another place with --cache-dir"
    write_whole(path, value.model_dump_json(), what="evaluation", remedy=remedy)


def _state(part: object) -> str:
    """Return the class and the options of a compactor or of budgets as text."""
    options = {**getattr(part, "__dict__", {})}
    if is_dataclass(part):  # a dataclass with __slots__ has no __dict__ of its fields
        options |= {each.name: getattr(part, each.name) for each in fields(part)}
    return f"{type(part).__module__}.{type(part).__qualname__} {sorted(options.items())}"


def _core() -> set[Path]:
    """Return the sources of agentmem that measurements run: all except those in :data:`_BESIDE` and drawing modules."""
    package = Path(__file__).parents[1]
    beside = {package / name for name in _BESIDE}
    return {path for path in package.rglob("*.py") if path.name not in _DRAWING and beside.isdisjoint(path.parents)}


def _policy_sources(policy: Policy) -> set[Path]:
    """Return the sources of the packages that define the policy's parts, or of modules that are in no package."""
    found: set[Path] = set()
    for part in (policy.compactor, policy.budgets):
        module = sys.modules.get(type(part).__module__)
        if part is None or module is None or not getattr(module, "__file__", None):
            continue
        source = Path(inspect.getfile(module))
        found.update(source.parents[_depth(module.__package__)].rglob("*.py") if module.__package__ else [source])
    return found


def _depth(package: str) -> int:
    """Return the number of steps from a package's own folder up to the folder of its outermost package.

    ``tools.kv.policies`` gives 2, because its outermost package is ``tools``. Packages inside ``agentmem`` count from
    the level below it: ``agentmem.policies.compactors`` gives 1, because its outermost package is ``policies``.
    """
    return package.removeprefix("agentmem.").count(".")


@cache
def _file_digest(source: Path) -> bytes:
    return hashlib.sha256(source.read_bytes()).digest()
