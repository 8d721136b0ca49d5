"""Save measurements as JSON files under keys that change with the settings and with the code."""

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
"""Folders whose code does not affect a measurement, apart from the sources of the measured policy."""


def settings_key(policy: Policy | str, *terms: BaseModel) -> str:
    """Return a key of 24 hexadecimal digits under which the result of a measurement is saved.

    The key is a hash of three things: the policy with its options, the settings ``terms``, and the source code that the
    measurement runs. ``terms`` must contain all settings that the result depends on. If a baseline is measured instead
    of a policy, ``policy`` is the baseline's name.
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
    """Load a value of the class ``kind`` from ``path``; return ``None`` if the file is missing or not valid."""
    try:
        found = parsed(read_plain(path, _MAX_BYTES), _MAX_BYTES, strict=False)
        return kind.model_validate(found)
    except (OSError, ValueError):
        return None


def save(value: BaseModel, path: Path) -> None:
    """Write ``value`` to ``path`` as JSON; an interruption never leaves an incomplete file at ``path``.

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
    """Return the source files that every measurement runs.

    The result has the Python files of agentmem, without modules that draw figures and without the folders listed in
    :data:`_BESIDE`. Code in these folders does not affect a measurement, apart from the code of the measured policy.
    """
    package = Path(__file__).parents[1]
    beside = {package / name for name in _BESIDE}
    return {path for path in package.rglob("*.py") if path.name not in _DRAWING and beside.isdisjoint(path.parents)}


def _policy_sources(policy: Policy) -> set[Path]:
    """Return the source files that define a policy's compactor and budgets.

    The compactor and the budgets are objects of two classes. For each of the two classes, the result has all Python
    files of the outermost package that contains the class; see :func:`_depth`. If no package contains the class, the
    result has only the file in which the class is defined.
    """
    found: set[Path] = set()
    for part in (policy.compactor, policy.budgets):
        module = sys.modules.get(type(part).__module__)
        if part is None or module is None or not getattr(module, "__file__", None):
            continue
        source = Path(inspect.getfile(module))
        found.update(source.parents[_depth(module.__package__)].rglob("*.py") if module.__package__ else [source])
    return found


def _depth(package: str) -> int:
    """Return the depth of a package below its outermost package, such as 2 for ``tools.kv.policies`` below ``tools``.

    In agentmem, packages directly below ``agentmem`` count as outermost: ``agentmem.policies.compactors`` gives 1.
    """
    return package.removeprefix("agentmem.").count(".")


@cache
def _file_digest(source: Path) -> bytes:
    return hashlib.sha256(source.read_bytes()).digest()
