"""The record in a snapshot's manifest of how the session was made; loading makes the session again from this record."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, ValidationError

from agentmem import contracts, plugins, specs
from agentmem.contracts import Policy
from agentmem.errors import SettingsRefused, SnapshotRefused
from agentmem.sessions.settings import SessionSettings
from agentmem.settings import Settings
from agentmem.untrusted.texts import did_you_mean, faults

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.sessions.chat.template import Tool

_BESIDE = ("policy", "name", "extra_policies", "tools", "template_options", "before_compact", "after_compact")
"""Names of parameters that are not settings, suggested in error messages when a setting's name is misspelt."""
_DEPTH = 12
"""Depth to which the nested parts of a policy go into its digest."""


class Named(BaseModel):
    """A policy in a snapshot: its name, and a digest (64 hexadecimal digits) of all parts of the policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(max_length=specs.MAX_CHARACTERS)]
    parts: Annotated[str, Field(max_length=64)]

    @classmethod
    def of(cls, policy: Policy) -> Self:
        """Return the record of a policy: its name, and a digest of all its parts.

        The policy must not have been used yet. At their first use, some policies look up a table for the model and
        store this table as a part of themselves. The digest of a used policy would therefore differ from the digest of
        the same policy before its use.
        """
        return cls(name=policy.name, parts=_digest(_described(policy)))

    def again(self) -> Policy:
        """Make the policy again from its name and check that its digest is the recorded one.

        The name may be a spec, such as ``am-recall[pattern=...]``: a policy's name with options.

        Raises:
            SettingsRefused: no policy has this name, the parts of that policy differ from the recorded parts, or an
                option in the name sets a regular expression other than the policy's default.

        """
        try:
            with contracts.without_files():
                made = plugins.policy(self.name)
            _check_pattern(made)
        except SettingsRefused as error:
            raise SettingsRefused(f"{error}; give it again (policy=..., extra_policies=...)") from error
        if Named.of(made) != self:
            raise SettingsRefused(
                f"policy {self.name!r} is no longer, or never was, what that name stands for; give it again "
                "(policy=..., extra_policies=...)"
            )
        return made


def _check_pattern(made: Policy) -> None:
    """Refuse a policy if the options in its name set a regular expression that the plain policy does not have.

    The name comes from a snapshot, which is not trusted, and searching with some regular expressions takes very long.
    The plain policy is the installed policy of the same name without options.
    """
    plain = plugins.policy(specs.plain_name(made.name))
    if made.queries.pattern not in ("", plain.queries.pattern):
        raise SettingsRefused(
            f"policy {made.name[:80]!r}: it brings a pattern, which a snapshot alone must not have run"
        )


class Made(BaseModel):
    """The record of how a session was made: its name, policies, settings, and a digest of its tools and variables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    policy: Named
    extra_policies: Annotated[tuple[Named, ...], FailFast()]
    template: str
    """Digest (64 hexadecimal digits) of the tools and variables given to the chat template."""
    settings: dict[str, JsonValue]

    @classmethod
    def of(cls, settings: Mapping[str, JsonValue], where: str) -> Self:
        """Read the record from a manifest's settings; ``where`` is the place of the snapshot, for error messages.

        Raises:
            SnapshotRefused: the settings are not a valid record of a session.

        """
        try:
            made = cls.model_validate(dict(settings))
            check_settings(made.settings)
        except (ValidationError, SettingsRefused) as error:
            said = faults(error, dict(settings)) if isinstance(error, ValidationError) else error
            raise SnapshotRefused(
                f"{where}: the manifest's settings are no session's ({said}); nothing of it was used: load another "
                "snapshot"
            ) from None
        return made

    def check_template(self, template: str, where: str) -> None:
        """Check that the tools and template variables that are given now equal those of the saved session.

        They must be equal, since the memory holds what the chat template wrote of them. ``template`` is the digest of
        the tools and variables given now, and ``where`` is the place of the snapshot.

        Raises:
            SnapshotRefused: the digest ``template`` differs from the recorded one.

        """
        if self.template != template:
            raise SnapshotRefused(
                f"{where}: it was saved with other tools or template_options than are given now, and the memory holds "
                "what the chat template wrote of them; give the same"
            )


# ---- settings


def split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split settings into two dicts: first those of the session, then those of its memory."""
    own = {name: value for name, value in values.items() if name in SessionSettings.model_fields}
    return own, {name: value for name, value in values.items() if name not in own}


def check_settings(values: Mapping[str, Any]) -> None:
    """Check that settings of a session and its memory can work under some cap.

    Raises:
        SettingsRefused: a setting is unknown or invalid; the message names the field, the value and the limit.

    """
    own, inner = split(values)
    _check_names(inner)
    if "cap" in inner:
        raise SettingsRefused(f"cap: {inner['cap']!r} is the runtime's; a session has a share of it")
    SessionSettings.of(**own)
    Settings.of(cap=1, **inner)


def _check_names(inner: Mapping[str, Any]) -> None:
    unknown = sorted(inner.keys() - Settings.model_fields.keys())
    if unknown:
        known = sorted({*SessionSettings.model_fields, *Settings.model_fields} - {"cap"})
        hint = did_you_mean(unknown[0], [*known, *_BESIDE])
        named = ", ".join(name[:40] for name in unknown[:4]) + (", …" if len(unknown) > 4 else "")  # noqa: PLR2004
        raise SettingsRefused(f"{named}: no such setting; {hint}Settings are: {', '.join(known)}")


# ---- digests


def template_digest(tools: Sequence[Tool] | None, options: Mapping[str, Any] | None) -> str:
    """Return a digest of the tools and variables that a chat template is given besides the messages.

    A tool that is a function is represented by its name, signature and docstring.
    """
    functions = [
        tool if isinstance(tool, dict) else [tool.__qualname__, str(inspect.signature(tool)), tool.__doc__]
        for tool in tools or ()
    ]
    return _digest([functions, dict(options or {})])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def _described(value: Any, depth: int = 0) -> Any:
    """Describe an object as JSON: the name of its class and, recursively, its fields."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, torch.Tensor):
        return [kind, value.tolist()]
    if isinstance(value, list | tuple | set | frozenset):
        items = [_described(item, depth + 1) for item in value]
        return [kind, sorted(items, key=repr) if isinstance(value, set | frozenset) else items]
    if depth > _DEPTH or (callable(value) and hasattr(value, "__qualname__")):
        return getattr(value, "__qualname__", kind)
    return [kind, [[str(name), _described(item, depth + 1)] for name, item in _parts(value)]]


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    names = [field.name for field in fields(value)] if is_dataclass(value) else sorted(getattr(value, "__dict__", {}))
    return [(name, getattr(value, name)) for name in names]
