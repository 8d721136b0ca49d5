"""Find policies by name in the entry-point group ``agentmem.policies``, which built-ins and third parties share.

An entry point names a factory: a function that takes keyword options, all of them optional, and returns a
:class:`agentmem.contracts.Policy`. Loading these factories is the only dynamic import of the project.
A *spec* is a text that names a policy with options, such as ``am-halving[score=max,steps=4]``; :mod:`agentmem.specs`
parses it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from agentmem import specs
from agentmem.contracts import Policy
from agentmem.errors import SettingsRefused, UnknownPolicy
from agentmem.untrusted.texts import did_you_mean, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agentmem.contracts import PolicyFactory

GROUP = "agentmem.policies"
_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class CatalogueRow:
    """The catalogue's entry for one registered policy name.

    If the policy cannot be used, ``error`` is the reason, and ``summary`` and ``source`` are empty.
    """

    name: str
    summary: str
    source: str
    distribution: str
    error: str | None = None


def policy(name_or_policy: str | Policy, **options: object) -> Policy:
    """Return the policy that a name or spec stands for, made with ``options``; return a :class:`Policy` unchanged.

    A policy made from a spec with options has the whole spec as its name, so that reports show the options.

    Raises:
        UnknownPolicy: no policy of that name is installed; the message suggests similar names and lists all.
        SettingsRefused: the spec cannot be parsed; an option is unknown, given twice or has a wrong value; two
            distributions offer the name; or the factory cannot be imported or does not return a policy.

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
    try:
        spec = specs.parsed(name_or_policy, "policy")
    except ValueError as error:
        raise SettingsRefused(str(error)) from None
    twice = ", ".join(sorted(spec.options.keys() & options.keys()))
    if twice:
        raise SettingsRefused(f"policy {name_or_policy!r}: option {twice} is given beside the spec too; give it once")
    made = _make(_only(spec.name), options, spec.options)
    return replace(made, name=name_or_policy.strip()) if spec.options else made


def beside(extra_policies: Sequence[str | Policy]) -> list[Policy]:
    """Make the extra policies of a memory, which single compactions may use instead of the memory's own policy.

    Raises:
        SettingsRefused: ``extra_policies`` is no list, or :func:`policy` refuses one of its entries.

    """
    if isinstance(extra_policies, str | Policy) or not isinstance(extra_policies, Iterable):
        raise SettingsRefused(
            f"extra_policies={extra_policies!r} is no list of policies; write extra_policies=['window']"
        )
    try:
        return [policy(each) for each in extra_policies]
    except SettingsRefused as error:
        raise type(error)(f"extra_policies: {error}") from error


def listed(text: str) -> list[str]:
    """Split a comma-separated list of names and specs; drop repetitions.

    Raises:
        SettingsRefused: the list is empty or cannot be parsed.

    """
    try:
        found = specs.entries(text, "policies")
    except ValueError as error:
        raise SettingsRefused(str(error)) from None
    if not found:
        raise SettingsRefused(f"policies: {text!r} names no policy; write am-halving,window")
    return list(dict.fromkeys(found))


def names() -> tuple[str, ...]:
    """Return every registered name, sorted, without loading the policies; :func:`catalogue` loads them."""
    return tuple(sorted(_registered()))


def catalogue() -> list[CatalogueRow]:
    """Return one row per registered name, sorted. The row of a policy that cannot be used has an ``error``."""
    rows = []
    for name, points in sorted(_registered().items()):
        distribution = ", ".join(map(_distribution, points))
        try:
            made = _make(_only(name))
        except SettingsRefused as error:
            rows.append(CatalogueRow(name, "", "", distribution, str(error)))
        else:
            rows.append(CatalogueRow(name, made.summary, made.source, distribution))
    return rows


def _registered() -> Mapping[str, list[EntryPoint]]:
    """Return the entry points of the group by name; read them again only if a folder of ``sys.path`` changed."""
    return _read_registered(tuple((folder, _changed(folder)) for folder in sys.path))


@lru_cache(maxsize=1)
def _read_registered(_state: tuple[tuple[str, int], ...]) -> Mapping[str, list[EntryPoint]]:
    registered: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        registered.setdefault(point.name, []).append(point)
    return registered


def _changed(folder: str) -> int:
    """Return the time of a folder's last change in nanoseconds, or 0 if the folder does not exist."""
    try:
        return Path(folder).stat().st_mtime_ns
    except OSError:
        return 0


def _only(name: str) -> EntryPoint:
    """Return the only entry point of that name.

    Raises:
        UnknownPolicy: there is no entry point of that name.
        SettingsRefused: there are several.

    """
    registered = _registered()
    points = registered.get(name, [])
    if not points:
        installed = ", ".join(sorted(registered)) or "none"
        raise UnknownPolicy(
            f"policy {shown(name)} is unknown; {did_you_mean(name, registered, most=3)}Installed: {installed}"
        )
    if len(points) > 1:
        offers = " and ".join(f"{point.value!r} of {_distribution(point)}" for point in points)
        raise SettingsRefused(f"policy {name!r} is offered {len(points)} times: {offers}; uninstall all but one")
    return points[0]


def _make(point: EntryPoint, given: Mapping[str, object] = _NONE, written: Mapping[str, str] = _NONE) -> Policy:
    """Make the policy of an entry point.

    ``given`` holds options as Python values; ``written`` holds options as the texts that a spec gives.
    """
    factory = _load(point)
    options = {**written, **given}
    try:
        specs.check_options(options, factory, f"policy {point.name!r}")
        values = {**specs.typed(written, factory), **given}
        specs.check_values(values, factory, f"policy {point.name!r}")
    except ValueError as error:
        raise SettingsRefused(str(error)) from None
    try:
        made = factory(**values)
    except ValueError as error:
        raise SettingsRefused(f"policy {point.name!r}: {error}") from error
    except TypeError as error:
        named = ", ".join(f"{name}={value!r}" for name, value in options.items()) or "no options"
        raise SettingsRefused(
            f"{_origin(point)} failed with {named}: TypeError: {error}; check the options' values"
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
    """Describe an entry point for an error message, with the name and version of its distribution."""
    return f"policy {point.name!r}, factory {point.value!r} of {_distribution(point)}"


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
