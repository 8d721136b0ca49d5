"""Policies by name: the entry-point group ``agentmem.policies``, the same way for built-ins and third parties.

An entry point names a factory: called with keyword options, all of them optional, it returns a
:class:`agentmem.contracts.Policy`. This is the only dynamic import of the project. A *spec* is a policy with options
as one text: ``am-halving[score=max,steps=4]``.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from agentmem.contracts import Policy
from agentmem.errors import SettingsRefused, UnknownPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agentmem.contracts import PolicyFactory

GROUP = "agentmem.policies"
MAX_SPEC = 4096
"""Characters of a spec, or of a list of them, at most: they may come from a snapshot."""
SPEC = "name[option=value,option=value]"
"""How a policy with options is written."""


@dataclass(frozen=True, slots=True)
class CatalogueRow:
    """One registered name. ``error`` says why it cannot be used; then summary and source are empty."""

    name: str
    summary: str
    source: str
    distribution: str
    error: str | None = None


def policy(name_or_policy: str | Policy, **options: object) -> Policy:
    """The policy of that name or spec made with ``options``; a :class:`Policy` is returned as it is.

    A policy made from a spec with options has the spec as its name, so that reports say what ran.

    Raises:
        UnknownPolicy: nothing of that name is installed; the message suggests the nearest names and lists all.
        SettingsRefused: a spec cannot be read, an option is unknown, given twice or its value cannot work, the name is
            offered twice, or what it names cannot be imported or does not return a policy.

    """
    if isinstance(name_or_policy, Policy):
        if options:
            given = ", ".join(sorted(options))
            raise SettingsRefused(
                f"policy {name_or_policy.name!r} is already made, options {given} would be lost; "
                "give the policy's name with the options, or put them into the policy"
            )
        return name_or_policy
    if not isinstance(name_or_policy, str):
        raise SettingsRefused(
            f"policy {name_or_policy!r} is neither a name nor a Policy; give one of {', '.join(names())}, or a Policy"
        )
    _check_length(name_or_policy)
    name, written = _read(name_or_policy)
    twice = ", ".join(sorted(written.keys() & options.keys()))
    if twice:
        raise SettingsRefused(f"policy {name_or_policy!r}: option {twice} is given beside the spec too; give it once")
    made = _make(_only(name), {**written, **options})
    return replace(made, name=name_or_policy.strip()) if written else made


def beside(extra_policies: Sequence[str | Policy]) -> list[Policy]:
    """The policies that a memory is planned for beside its own.

    Raises:
        SettingsRefused: no list of them, or as in :func:`policy`.

    """
    if isinstance(extra_policies, str | Policy) or not isinstance(extra_policies, Iterable):
        raise SettingsRefused(
            f"extra_policies={extra_policies!r} is no list of policies; write extra_policies=['window']"
        )
    try:
        return [policy(each) for each in extra_policies]
    except SettingsRefused as error:
        raise type(error)(f"extra_policies: {error}") from error


def specs(text: str) -> list[str]:
    """The names and specs of a comma-separated list, each once; commas inside brackets belong to their spec.

    Raises:
        SettingsRefused: the list is empty, or a bracket has no partner.

    """
    _check_length(text)
    found = [spec.strip() for spec in _split(text, text) if spec.strip()]
    if not found:
        raise SettingsRefused(f"policies: {text!r} names no policy; write am-halving,window")
    return list(dict.fromkeys(found))


def names() -> tuple[str, ...]:
    """Every registered name, sorted; whether each works is for :func:`catalogue` to say."""
    return tuple(sorted(_registered()))


def catalogue() -> list[CatalogueRow]:
    """One row per registered name, sorted. A name that cannot be used has an ``error`` and hides no other."""
    rows = []
    for name, points in sorted(_registered().items()):
        distribution = ", ".join(map(_distribution, points))
        try:
            made = _make(_only(name), {})
        except SettingsRefused as error:
            rows.append(CatalogueRow(name, "", "", distribution, str(error)))
        else:
            rows.append(CatalogueRow(name, made.summary, made.source, distribution))
    return rows


def _check_length(spec: str) -> None:
    if len(spec) > MAX_SPEC:
        raise SettingsRefused(
            f"policy {spec[:40]!r}… has {len(spec)} characters; {MAX_SPEC} are allowed. Make the policy in Python"
        )


def _read(spec: str) -> tuple[str, dict[str, object]]:
    """The name and the options of a spec; a plain name has none."""
    name, bracket, rest = (part.strip() for part in spec.partition("["))
    options: dict[str, object] = {}
    if not bracket and "]" not in name:
        return name, options
    if not name or not rest.endswith("]"):
        raise SettingsRefused(f"policy {spec!r} cannot be read: {_misplaced(name, rest)}; write {SPEC}")
    for item in _split(rest[:-1], spec):
        option, equals, value = (part.strip() for part in item.partition("="))
        if not option.isidentifier() or not equals or not value:
            raise SettingsRefused(f"policy {spec!r} cannot be read: {item.strip()!r} is no option=value; write {SPEC}")
        if option in options:
            raise SettingsRefused(f"policy {spec!r}: option {option!r} is given twice; give it once")
        options[option] = _Written(value)
    return name, options


def _misplaced(name: str, rest: str) -> str:
    if not rest:
        return "']' without '['" if "]" in name else "nothing follows '['"
    if "]" not in rest:
        return "its '[' is never closed"
    return "']' does not end it" if name else "no name before '['"


def _split(text: str, whole: str) -> list[str]:
    """``text`` at its commas, those inside brackets left alone; ``whole`` is what a refusal quotes."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if depth < 0:
            break
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    if depth:
        fault = "a '[' is never closed" if depth > 0 else "a ']' closes nothing"
        raise SettingsRefused(f"policy {whole!r} cannot be read: {fault}; write {SPEC}")
    return pieces


class _Written(str):
    """An option's value as a spec has it; what it is, the factory's default says."""

    __slots__ = ()


def _typed(factory: PolicyFactory, options: dict[str, object]) -> dict[str, object]:
    """Written values as texts where the factory's default is one (a pattern of digits stays a text)."""
    known = inspect.signature(factory).parameters
    texts = {name for name, parameter in known.items() if isinstance(parameter.default, str)}
    return {
        name: value if not isinstance(value, _Written) else str(value) if name in texts else _value(value)
        for name, value in options.items()
    }


def _value(text: str) -> object:
    """An integer, a number or a truth value if it reads as one, else the text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return str(text)


def _registered() -> Mapping[str, list[EntryPoint]]:
    """All entry points of the group by name; read anew only when something was installed or removed."""
    return _read_registered(tuple((folder, _changed(folder)) for folder in sys.path))


@lru_cache(maxsize=1)
def _read_registered(_state: tuple[tuple[str, int], ...]) -> Mapping[str, list[EntryPoint]]:
    registered: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        registered.setdefault(point.name, []).append(point)
    return registered


def _changed(folder: str) -> int:
    """When a folder of the import path last changed, in nanoseconds; 0 where there is none."""
    try:
        return Path(folder).stat().st_mtime_ns
    except OSError:
        return 0


def _only(name: str) -> EntryPoint:
    """The one entry point of that name."""
    registered = _registered()
    points = registered.get(name, [])
    if not points:
        lower = {each.lower(): each for each in registered}
        near = [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise UnknownPolicy(f"policy {name!r} is unknown; {hint}Installed: {', '.join(sorted(registered)) or 'none'}")
    if len(points) > 1:
        offers = " and ".join(f"{point.value!r} of {_distribution(point)}" for point in points)
        raise SettingsRefused(f"policy {name!r} is offered {len(points)} times: {offers}; uninstall all but one")
    return points[0]


def _make(point: EntryPoint, options: dict[str, object]) -> Policy:
    factory = _load(point)
    _check_options(point.name, factory, options)
    try:
        made = factory(**_typed(factory, options))
    except ValueError as error:
        raise SettingsRefused(f"policy {point.name!r}: {error}") from error
    except TypeError as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items()) or "no options"
        raise SettingsRefused(
            f"{_origin(point)} failed with {given}: TypeError: {error}; check the options' values"
        ) from error
    except Exception as error:
        raise SettingsRefused(
            f"{_origin(point)} failed: {type(error).__name__}: {error}; mend or uninstall it"
        ) from error
    if not isinstance(made, Policy):
        raise SettingsRefused(
            f"{_origin(point)} returned {type(made).__name__}; it must return an agentmem.contracts.Policy"
        )
    return made


def _load(point: EntryPoint) -> PolicyFactory:
    try:
        factory: object = point.load()
    except Exception as error:
        raise SettingsRefused(
            f"{_origin(point)} cannot be imported: {type(error).__name__}: {error}; mend or uninstall it"
        ) from error
    if not callable(factory):
        raise SettingsRefused(
            f"{_origin(point)} is {type(factory).__name__}; it must be a function that returns a Policy"
        )
    return factory


def _origin(point: EntryPoint) -> str:
    """What an error calls it; a distribution's name and version are read from its files."""
    return f"policy {point.name!r}, factory {point.value!r} of {_distribution(point)}"


def _check_options(name: str, factory: PolicyFactory, options: dict[str, object]) -> None:
    """Refuse option names that the factory does not take, before it runs."""
    parameters = inspect.signature(factory).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            near = difflib.get_close_matches(option, parameters, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(parameters) or "none"
            raise SettingsRefused(f"policy {name!r} has no option {option!r}; {hint}Its options: {known}")


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
