"""The runtime: one model, one tokenizer, one cap, many sessions."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, Self, get_args
from weakref import WeakKeyDictionary

from agentmem import hf, plugins
from agentmem.api import open_memory
from agentmem.engine import Scheduler
from agentmem.errors import CapTooSmall, CopyRefused, MemoryClosed, SettingsRefused
from agentmem.language import Language
from agentmem.memory.memory import unwatched
from agentmem.sessions.arguments import check_count, check_making, check_name, check_place, check_seconds
from agentmem.sessions.changes import put_back
from agentmem.sessions.chat.template import ChatTemplate
from agentmem.sessions.forking import RUNTIMES
from agentmem.sessions.hook_calls import HookCalls
from agentmem.sessions.leasing.admission import Leases
from agentmem.sessions.leasing.holding import Holding, Stage
from agentmem.sessions.leasing.spill import Spill
from agentmem.sessions.leasing.swapping import lend
from agentmem.sessions.session import Session
from agentmem.sessions.settings import SessionSettings
from agentmem.sessions.snapshots import archive
from agentmem.sessions.snapshots.folder import local_path
from agentmem.sessions.snapshots.recipe import Named, check_settings, split, template_digest
from agentmem.sessions.snapshots.session_state import restore, saved
from agentmem.sessions.snapshots.snapshot import Identity
from agentmem.sessions.stats import RuntimeStats
from agentmem.settings import parse_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from agentmem.contracts import Policy
    from agentmem.memory.memory import Memory
    from agentmem.sessions.chat.template import Tool
    from agentmem.sessions.conversation import Place
    from agentmem.sessions.hooks import AfterCompact, BeforeCompact

_SCHEDULERS: WeakKeyDictionary[Any, Scheduler] = WeakKeyDictionary()
"""By model, so that runtimes of one model run one forward at a time together."""


class Runtime:
    """Sessions of one model under one cap, which is the sum of what they all hold and work with.

    A session has a *lease*, its share of the cap; it is charged while a turn runs. When another session needs the
    bytes, idle memories are preempted in stages: their free room is taken (nothing is lost), they are compacted further
    (their policy's loss), they are moved to disk (nothing is lost). They come back when they are used. The model runs
    one forward at a time, which feeds all turns that wait for one (:mod:`agentmem.engine.scheduler`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        cap: int | str,
        policy: str | Policy = "am-halving",
        pressure: Sequence[Stage] = ("trim", "compact", "disk"),
        spill: str | os.PathLike[str] | None = None,
        wait: float = 60.0,
        max_waiting: int = 256,
        max_batch_tokens: int = 256,
        **settings: Any,
    ) -> None:
        """Attach nothing yet.

        Args:
            model: a transformers causal language model in eval mode.
            tokenizer: its tokenizer; roles need one with a chat template.
            cap: bytes, as an integer or a text such as ``"64MiB"``.
            policy: of sessions that name none.
            pressure: the stages by which idle memories are preempted, in order; leave out what must not happen.
            spill: the folder where idle memories go, below which the runtime has one of its own; by default
                ``agentmem-USER`` among the system's temporary ones.
            wait: seconds that a stream waits for its lease.
            max_waiting: streams that may wait at once; more are refused at once.
            max_batch_tokens: tokens of a forward that feeds several sessions: replies' next tokens first, then pieces
                of texts that are read. Fewer keep replies flowing while a long text is read.
            settings: defaults of the sessions' :class:`SessionSettings` and :class:`agentmem.settings.Settings`.

        Raises:
            SettingsRefused: a setting cannot work, whatever the policy. That the cap is too small for a session is
                for :meth:`session` to say, which knows its policy and its share.

        """
        hf.check_tokenizer(tokenizer)
        self.model, self.tokenizer, self.policy = hf.text_model(model), tokenizer, policy
        self.cap, self.wait, self.max_waiting, self.defaults = parse_bytes(cap, "cap"), wait, max_waiting, settings
        check_seconds("wait", wait, 0)
        check_count("max_waiting", max_waiting)
        check_count("max_batch_tokens", max_batch_tokens, 1)
        self.max_batch_tokens = max_batch_tokens
        check_settings(settings)
        SessionSettings.of(**split(settings)[0]).lease(self.cap)
        plugins.policy(policy)  # sessions make their own: some policies keep what they looked up for a model
        _check_pressure(pressure)
        if spill is not None:
            check_place("spill", spill)
        self.leases = Leases(self.cap, pressure)
        self.sessions: list[Session] = []
        self.scheduler = _SCHEDULERS.setdefault(self.model, Scheduler())
        """Its lock is held while the model computes or memories move; no event loop's thread waits for it."""
        self.guard = threading.RLock()
        """Held for an instant, while it is written down who holds what."""
        self.waiters: deque[Place] = deque()
        """Turns that wait for a lease, the first to be served first; called to have one try again."""
        self.identity = Identity(self.model, tokenizer)
        self._spill = Spill(None if spill is None else local_path(spill))
        self.turns, self._names = count(1), count(1)
        self.templates: WeakKeyDictionary[ChatTemplate, str] = WeakKeyDictionary()
        """What the chat template of each session was given besides messages, as a digest."""
        self._closed = False
        RUNTIMES.add(self)

    # ---- sessions

    def session(
        self,
        policy: str | Policy | None = None,
        *,
        name: str | None = None,
        extra_policies: Sequence[str | Policy] = (),
        tools: Sequence[Tool] | None = None,
        template_options: Mapping[str, Any] | None = None,
        before_compact: BeforeCompact | None = None,
        after_compact: AfterCompact | None = None,
        **settings: Any,
    ) -> Session:
        """A new conversation.

        Args:
            policy: name, spec or policy; the runtime's without it.
            name: for reports and errors.
            extra_policies: policies that hooks and calls of ``compact`` may ask for.
            tools: JSON schemas or functions, for the chat template; they are pinned with the system prompt.
            template_options: the chat template's own variables.
            before_compact: called before a compaction; see :mod:`agentmem.sessions.hooks`.
            after_compact: called with its report.
            settings: :class:`SessionSettings` (``share``, ``pin_roles``, ``soft``, ``seed``, …) and
                :class:`agentmem.settings.Settings` (``keep_first``, ``keep_recent``, ``target``, ``rebase``, …).

        Raises:
            SettingsRefused: a setting cannot work; ``CapTooSmall`` names the share and the bytes that would do.

        """
        self._open_or_raise()
        check_making(name, tools, template_options, before_compact=before_compact, after_compact=after_compact)
        settings = {**self.defaults, **settings}
        check_settings(settings)
        own, inner = split(settings)
        chosen = SessionSettings.of(**own)
        lease = chosen.lease(self.cap)
        policies = [plugins.policy(self.policy if policy is None else policy), *plugins.beside(extra_policies)]
        named = tuple(map(Named.of, policies))  # while they are fresh
        try:
            memory = open_memory(self.model, lease, policies[0], self.tokenizer, inner, policies[1:])
        except CapTooSmall as error:
            raise CapTooSmall(
                f"share={chosen.share!r} is {lease} of the runtime's {self.cap} bytes: {error}. The cap of a session "
                "is its share: raise that, or the runtime's cap"
            ) from error
        template = self._template(chosen, tools, template_options)
        hooks = HookCalls(before_compact, after_compact, chosen.soft)
        with self.guard:
            self._open_or_raise()
            holding = Holding(self.model, memory, lease)
            holding.named, holding.stage = named, "trim"  # it holds nothing yet, and is charged for that
            session = Session(self, name or f"session-{next(self._names)}", chosen, holding, template, hooks)
            self.leases.holdings.append(holding)
            self.sessions.append(session)
        self.speak(session, memory)
        return session

    def _template(
        self, settings: SessionSettings, tools: Sequence[Tool] | None, options: Mapping[str, Any] | None
    ) -> ChatTemplate | None:
        if not getattr(self.tokenizer, "chat_template", None):
            if tools:
                raise SettingsRefused("tools: this tokenizer has no chat template; describe them in a text instead")
            return None
        eos = self.model.generation_config.eos_token_id
        made = ChatTemplate(self.tokenizer, tools=tools, history=settings.history, eos=eos, options=options)
        self.templates[made] = template_digest(tools, options)
        return made

    def speak(self, session: Session, memory: Memory) -> None:
        """Have the memory ask for summaries as the conversation would."""
        language = memory.language
        if language is None or session.template is None:
            return
        template = session.template

        def ask(text: str) -> Sequence[int]:
            return template.instruction(session.dialogue, text)

        memory.language = Language(language.read, language.write, ask, tuple(template.end_ids))

    def fork(self, session: Session, name: str | None = None) -> Session:
        """See :meth:`Session.fork`."""
        check_name(name)
        with self.guard:
            _not_busy(session)
            put_back(session)
            other = Session(
                self,
                name or f"{session.name}-fork-{next(self._names)}",
                session.settings,
                session.holding,
                session.template,
                HookCalls(session.hooks.before, session.hooks.after, session.hooks.soft),
            )
            state = saved(session)
            restore(other, state, session.ids[: len(session.ids) - len(state.pending)])
            self.sessions.append(other)
        return other

    @cached_property
    def packs(self) -> bool:
        """Whether the model can be fed several sequences in one forward."""
        return hf.packs(self.model)

    # ---- leases

    @contextmanager
    def turn(self, session: Session, *, brief: bool = False, leased: bool = True) -> Iterator[None]:
        """Around a turn of a session, or a ``brief`` call that nobody comes before; ``leased`` if it needs bytes.

        Raises:
            RuntimeBusy: there is no room for the lease.

        """
        turn = object()
        try:  # twice, should an interrupt come between
            try:
                if leased:
                    self.admit(session, turn, brief=brief)
                else:
                    self.begin(session, turn)
                yield
            finally:
                self.end(session, turn)
        finally:
            self.end(session, turn)

    def admit(self, session: Session, turn: object, *, brief: bool = False) -> None:
        """Give a session its lease for a turn, or refuse.

        ``turn`` stands for it: whoever made it ends it by :meth:`end`, whether it was admitted or not.

        Raises:
            RuntimeBusy: others are in mid-turn and hold the cap, or wait for it.

        """
        places = list(self.waiters)  # whoever has not tried yet may find room at once, and keeps nobody from trying
        waiting = len(places) if places and places[0].tried and not brief else 0
        if waiting or not self.try_admit(session, turn):
            active = sum(each.busy for each in list(self.sessions))
            raise self.leases.refusal(session.name, session.holding.lease, active, waiting)

    def try_admit(self, session: Session, turn: object) -> bool:
        """Give a session its lease for a turn if there is room for it, or can be made."""
        admitted = False
        with self.scheduler.lock:
            try:
                self.begin(session, turn)
                admitted = lend(self, session)
            finally:
                if not admitted and session.turn is turn:
                    session.turn = None
            return admitted

    def begin(self, session: Session, turn: object) -> None:
        """From now on nobody forks it, and no other turn of it begins."""
        with self.guard:
            self._open_or_raise()
            _not_busy(session)
            session.turn = turn
        put_back(session)

    def end(self, session: Session, turn: object) -> None:
        """A turn is over, if it ever began: the session is idle. Never waits; ending twice does nothing."""
        try:
            memory = session.holding.memory
            if memory is not None and session.turn in (turn, None):
                memory.boundary = unwatched
        finally:
            if session.turn is turn:
                session.turn = None
        self.wake_next()

    def wake_next(self) -> None:
        """Have who has waited longest try again; from any thread."""
        for wake in list(self.waiters)[:1]:
            wake()

    def folder(self) -> Path:
        """Where idle memories go."""
        return self._spill.folder()

    # ---- files

    def save(self, session: Session, url: str | os.PathLike[str]) -> None:
        """See :meth:`Session.save`."""
        archive.save(self, session, url)

    def load(
        self,
        url: str | os.PathLike[str],
        *,
        policy: str | Policy | None = None,
        name: str | None = None,
        extra_policies: Sequence[str | Policy] | None = None,
        tools: Sequence[Tool] | None = None,
        template_options: Mapping[str, Any] | None = None,
        before_compact: BeforeCompact | None = None,
        after_compact: AfterCompact | None = None,
        **settings: Any,
    ) -> Session:
        """A session that was saved, of this model and tokenizer; it goes on as if it had never stopped.

        ``settings`` replace those that it was saved with (a ``seed`` begins anew). Tools, template options and hooks
        are not saved: give them again, and ``policy`` and ``extra_policies`` where they were no named ones.

        Raises:
            SnapshotRefused: another model's, damaged, hostile, or larger than the session's share.
            SettingsRefused: what is given here could never work.
            RuntimeBusy: there is no room for it now.

        """
        check_making(name, tools, template_options, before_compact=before_compact, after_compact=after_compact)
        given = archive.Given(policy, extra_policies, tools, template_options, before_compact, after_compact)
        session: Session = archive.load(self, url, name, given, settings)
        return session

    # ---- the end

    def forget(self, session: Session) -> None:
        """See :meth:`Session.close`."""
        with self.scheduler.lock, self.guard:
            if session.closed:
                return
            session.closed = True
            session.holding.sessions.discard(id(session))
            self.sessions.remove(session)
            if not session.holding.sessions:
                session.holding.release()
                self.leases.holdings.remove(session.holding)
        self.wake_next()

    def close(self) -> None:
        """Close all sessions and leave the model as it was; closing twice does nothing."""
        self._closed = True
        with self.scheduler.lock:
            for session in list(self.sessions):
                self.forget(session)
            self._spill.close()
        for wake in list(self.waiters):
            wake()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse ``copy`` and ``pickle``."""
        raise CopyRefused.of(self)

    def __enter__(self) -> Self:
        """Close at the end of a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    @property
    def stats(self) -> RuntimeStats:
        """A moment of this runtime."""
        with self.guard:
            busy = [session.busy for session in self.sessions]
            here = [session.holding.memory is not None for session in self.sessions]
            figures = self.scheduler.figures()
            return RuntimeStats(
                cap_bytes=self.cap,
                **self.leases.by_kind({id(each.holding) for each in self.sessions if each.busy}),
                active=sum(busy),
                idle=sum(memory and not active for memory, active in zip(here, busy, strict=True)),
                on_disk=len(here) - sum(here),
                waiting=len(self.waiters),
                feeding=figures.waiting,
                sequences_per_forward=figures.sequences,
                tokens_per_second=figures.tokens_per_second,
                fed_tokens=figures.fed,
                pause_p50_seconds=figures.pauses[0],
                pause_p95_seconds=figures.pauses[1],
                pause_max_seconds=figures.pauses[2],
            )

    def _open_or_raise(self) -> None:
        if self._closed:
            raise MemoryClosed("this runtime was closed; make another one")


def _check_pressure(pressure: Sequence[Stage]) -> None:
    unknown = [pressure] if isinstance(pressure, str) else [each for each in pressure if each not in get_args(Stage)]
    if unknown:
        raise SettingsRefused(f"pressure: {unknown} unknown; stages are {', '.join(get_args(Stage))}, in a list")


def _not_busy(session: Session) -> None:
    if session.closed:
        raise MemoryClosed(f"session {session.name!r} was closed; make another one, or load a snapshot")
    if session.busy:
        raise SettingsRefused(
            f"session {session.name!r} is in mid-turn; end the turn first (close its events; a stream that is left "
            "early wants contextlib.aclosing(session.stream(...)) around it), or fork before it begins"
        )
