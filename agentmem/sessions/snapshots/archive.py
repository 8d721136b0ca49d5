"""Saving and loading of sessions. Loading checks a whole snapshot before it uses any part of the snapshot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agentmem import plugins
from agentmem.errors import AgentmemError, SettingsRefused, SnapshotRefused
from agentmem.reporting import log_events
from agentmem.sessions.arguments import check_place
from agentmem.sessions.leasing.swapping import reporting_compactions
from agentmem.sessions.snapshots.files import check_identity, differing, read_manifest, shown, write_snapshot
from agentmem.sessions.snapshots.recipe import Made, check_settings, template_digest
from agentmem.sessions.snapshots.session_state import Saved, restore, saved
from agentmem.sessions.snapshots.snapshot import loadable, read_sequence, refusing, take_sequence

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from agentmem.contracts import Policy
    from agentmem.memory.state import SavedSequence
    from agentmem.sessions.chat.template import Tool
    from agentmem.sessions.conversation import Conversation, Host
    from agentmem.sessions.hooks import AfterCompact, BeforeCompact


def save(runtime: Host, session: Conversation, url: str | os.PathLike[str]) -> None:
    """Save a session; see :meth:`agentmem.sessions.session.Session.save`."""
    check_place("url", url)
    with runtime.turn(session, brief=True, reads=True):
        identity = _identity(runtime, session)
        with runtime.scheduler.lock, reporting_compactions(runtime, session.holding):
            sequence, tensors = take_sequence(session.holding.finished(), runtime.model.dtype)
        made = _made_of(session, _template_of(runtime, session))
        beside = saved(session)
        with loadable():
            _check(session, sequence, beside)
        state = {"row": sequence.plain(), "session": beside.model_dump(mode="json")}
        write_snapshot(url, tensors, state, identity=identity, settings=made)
    log_events.session_saved(session.names, place=shown(url))


def _made_of(session: Conversation, template: str) -> dict[str, Any]:
    """Return the record of how a session was made, as JSON values for the manifest.

    ``template`` is the digest of the tools and variables that the session's chat template was given.
    """
    settings = session.memory.settings.model_dump(mode="json")
    del settings["cap"]
    made = Made(
        name=session.name,
        policy=session.holding.named[0],
        extra_policies=session.holding.named[1:],
        template=template,
        settings={**settings, **session.settings.model_dump(mode="json")},
    )
    return made.model_dump(mode="json")


def _identity(runtime: Host, session: Conversation) -> dict[str, str]:
    """Return the identity that a snapshot of the session gets: fingerprints of model, tokenizer and chat template.

    Raises:
        AgentmemError: the model, tokenizer or chat template has changed since the session read its first token, or some
            weights cannot be read.

    """
    now, then = runtime.identity.lasting(), session.holding.identity
    if session.holding.seen and (part := differing(then, now)) is not None:
        raise AgentmemError(
            f"session {session.name!r} cannot be saved: its {part} was {then.get(part)} when it began and is "
            f"{now.get(part)} now, and a snapshot holds the keys of one model; set it back, or begin a new session"
        )
    return now


def _template_of(runtime: Host, session: Conversation) -> str:
    return template_digest(None, None) if session.template is None else runtime.templates[session.template]


@dataclass(frozen=True, slots=True)
class Given:
    """The arguments of :meth:`Runtime.load` that a snapshot does not contain or that replace saved values."""

    policy: str | Policy | None
    extra_policies: Sequence[str | Policy] | None
    tools: Sequence[Tool] | None
    template_options: Mapping[str, Any] | None
    before_compact: BeforeCompact | None
    after_compact: AfterCompact | None


def load(
    runtime: Host, url: str | os.PathLike[str], name: str | None, given: Given, settings: Mapping[str, Any]
) -> Any:
    """Load a session; see :meth:`agentmem.sessions.runtime.Runtime.load`."""
    check_place("url", url)
    check_settings(settings)
    manifest = read_manifest(url)
    check_identity(shown(url), manifest, runtime.identity.lasting())
    made = Made.of(manifest.settings, shown(url))
    session = _again(runtime, url, name, made, given, settings)
    session.holding.least = runtime.cap  # an elastic lease must hold what was saved, whose size is not known yet
    try:
        with runtime.turn(session, brief=True):
            _fill(runtime, session, url, anew="seed" in settings)
    except BaseException:
        runtime.forget(session)
        raise
    log_events.session_loaded(session.names, place=shown(url))
    return session


def _again(
    runtime: Host,
    url: str | os.PathLike[str],
    name: str | None,
    made: Made,
    given: Given,
    settings: Mapping[str, Any],
) -> Any:
    """Make an empty session with the policies and settings of the saved session, except for those that are given."""
    policy = None if given.policy is None else plugins.policy(given.policy)
    extra_policies = None if given.extra_policies is None else plugins.beside(given.extra_policies)
    made.check_template(template_digest(given.tools, given.template_options), shown(url))
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
    """Refuse a ``pin_pattern`` (a regular expression) that only the snapshot has.

    Such a pattern would be run on all messages that are read later, although nobody has confirmed it.

    Raises:
        SnapshotRefused: the snapshot has a ``pin_pattern`` that differs from the runtime's, and the caller gives none.

    """
    saved_one = made.settings.get("pin_pattern")
    if saved_one and "pin_pattern" not in settings and saved_one != runtime.defaults.get("pin_pattern"):
        raise SnapshotRefused(
            f"the snapshot in {shown(url)} brings pin_pattern={str(saved_one)[:80]!r}, which a snapshot alone must not "
            "have run. Give load the same pin_pattern if you trust it, or pin_pattern='' to go on without"
        )


def _fill(runtime: Host, session: Conversation, url: str | os.PathLike[str], *, anew: bool) -> None:
    def check(saved: SavedSequence, state: dict[str, Any]) -> None:
        _check(session, saved, Saved.of(state))

    memory = session.memory
    state = Saved.of(
        read_sequence(memory, url, identity=session.holding.identity, dtype=runtime.model.dtype, check=check)
    )
    sequence = memory.sequences[0]
    if not session.settings.pin_request:
        sequence.pins = replace(sequence.pins, request=())
    restore(session, state.model_copy(update={"sampling": None}) if anew else state, sequence.ids)


def _check(session: Conversation, saved: SavedSequence, state: Saved) -> None:
    """Check a session's state; this is called before the state is saved and before a saved state is used.

    Raises:
        ValueError: the state is invalid; see :meth:`agentmem.sessions.snapshots.session_state.Saved.check`.

    """
    pinned = max((high for _, high in (*saved.pins, *saved.request)), default=0)
    state.check(saved.tokens, pinned, session.memory.shape.vocabulary)
