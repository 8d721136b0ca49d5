"""Saving sessions and loading them again: everything is checked before any of it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentmem import plugins
from agentmem.errors import SettingsRefused, SnapshotRefused
from agentmem.sessions.arguments import check_place
from agentmem.sessions.leasing.swapping import reporting_compactions
from agentmem.sessions.snapshots.files import read_manifest, read_snapshot, write_snapshot
from agentmem.sessions.snapshots.recipe import Made, check_settings, made_of, template_digest
from agentmem.sessions.snapshots.session_state import Saved, restore, saved
from agentmem.sessions.snapshots.snapshot import read_row, refusing, take_row

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from agentmem.contracts import Policy
    from agentmem.memory.state import SavedRow
    from agentmem.sessions.chat.template import Tool
    from agentmem.sessions.hooks import AfterCompact, BeforeCompact
    from agentmem.sessions.conversation import Host
    from agentmem.sessions.conversation import Conversation


def save(runtime: Host, session: Conversation, url: str | os.PathLike[str]) -> None:
    """See :meth:`agentmem.sessions.session.Session.save`."""
    check_place("url", url)
    if session.holding.quiet:
        runtime.begin(session)  # nothing is to be done but to read, which needs no lease
    else:
        runtime.admit(session, brief=True)
    try:
        with runtime.lock, reporting_compactions(runtime, session.holding):
            image, tensors = take_row(session.memory)
        made = made_of(session, _template_of(runtime, session))
        state = {"row": image.plain(), "session": saved(session).model_dump(mode="json")}
        write_snapshot(url, tensors, state, identity=runtime.identity, settings=made)
    finally:
        runtime.leave(session)


def _template_of(runtime: Host, session: Conversation) -> str:
    return template_digest(None, None) if session.template is None else runtime.templates[session.template]


@dataclass(frozen=True, slots=True)
class Given:
    """What is not saved, or is given anew."""

    policy: str | Policy | None
    extra_policies: Sequence[str | Policy] | None
    tools: Sequence[Tool] | None
    template_options: Mapping[str, Any] | None
    before_compact: BeforeCompact | None
    after_compact: AfterCompact | None


def load(
    runtime: Host, url: str | os.PathLike[str], name: str | None, given: Given, settings: Mapping[str, Any]
) -> Conversation:
    """See :meth:`agentmem.sessions.runtime.Runtime.load`."""
    check_place("url", url)
    check_settings(settings)
    manifest = read_manifest(url)
    if manifest.identity != runtime.identity:
        read_snapshot(url, identity=runtime.identity, max_bytes=0)  # which says whose it is
    made = Made.of(manifest.settings, str(url))
    session = _again(runtime, url, name, made, given, settings)
    try:
        runtime.admit(session, brief=True)
        try:
            _fill(runtime, session, url, anew="seed" in settings)
        finally:
            runtime.leave(session)
    except BaseException:
        runtime.forget(session)
        raise
    return session


def _again(
    runtime: Host,
    url: str | os.PathLike[str],
    name: str | None,
    made: Made,
    given: Given,
    settings: Mapping[str, Any],
) -> Conversation:
    """A session like the one that was saved, which has read nothing."""
    policy = None if given.policy is None else plugins.policy(given.policy)
    extra_policies = None if given.extra_policies is None else plugins.beside(given.extra_policies)
    made.check_template(template_digest(given.tools, given.template_options), str(url))
    _check_pattern(runtime, made, settings, url)
    with refusing(url, SettingsRefused, remedy="Give load what the session can live with."):
        return runtime.session(
            policy or made.policy.again(),
            name=name or made.name,
            extra_policies=[each.again() for each in made.extra_policies] if extra_policies is None else extra_policies,
            tools=given.tools,
            template_options=given.template_options,
            before_compact=given.before_compact,
            after_compact=given.after_compact,
            **{**made.settings, **settings},
        )


def _check_pattern(runtime: Host, made: Made, settings: Mapping[str, Any], url: str | os.PathLike[str]) -> None:
    """Refuse a pattern that only the snapshot brings: a search for it would run on all that is appended.

    Raises:
        SnapshotRefused: neither the caller nor the runtime gives a ``pin_pattern`` of its own.

    """
    saved_one = made.settings.get("pin_pattern")
    if saved_one and "pin_pattern" not in settings and saved_one != runtime.defaults.get("pin_pattern"):
        raise SnapshotRefused(
            f"the snapshot in {url} brings pin_pattern={str(saved_one)[:80]!r}, which a snapshot alone must not have "
            "run. Give load the same pin_pattern if you trust it, or pin_pattern='' to go on without"
        )


def _fill(runtime: Host, session: Conversation, url: str | os.PathLike[str], *, anew: bool) -> None:
    def check(image: SavedRow, state: dict[str, Any]) -> None:
        pinned = max((high for _, high in image.pins), default=0)
        Saved.of(state).check(image.tokens, pinned, session.memory.shape.vocabulary)

    memory = session.memory
    state = Saved.of(read_row(memory, url, identity=runtime.identity, dtype=runtime.model.dtype, check=check))
    restore(session, state.model_copy(update={"sampling": None}) if anew else state, memory.rows[0].ids)
