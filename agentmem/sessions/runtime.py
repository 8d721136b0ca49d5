"""The runtime: it serves many sessions of one model and one tokenizer under one cap."""

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
from agentmem.engine import Engine, Scheduler
from agentmem.errors import CapTooSmall, CopyRefused, MemoryClosed, SettingsRefused
from agentmem.language import Language
from agentmem.memory.memory import unwatched
from agentmem.reporting import log_events
from agentmem.sessions.arguments import check_count, check_making, check_name, check_place, check_seconds
from agentmem.sessions.changes import put_back
from agentmem.sessions.chat.template import ChatTemplate
from agentmem.sessions.forking import RUNTIMES
from agentmem.sessions.hook_calls import HookCalls
from agentmem.sessions.leasing.admission import Leases
from agentmem.sessions.leasing.holding import Holding, Stage
from agentmem.sessions.leasing.queue import wait_for_lease
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
from agentmem.settings import exact_bytes, parse_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from agentmem.contracts import Policy
    from agentmem.memory.memory import Memory
    from agentmem.sessions.chat.template import Tool
    from agentmem.sessions.conversation import Place
    from agentmem.sessions.hooks import AfterCompact, BeforeCompact

_NUMBERS = count(1)  # of runtimes, for their names
_SCHEDULERS: WeakKeyDictionary[Any, Scheduler] = WeakKeyDictionary()
"""The scheduler of each model. All runtimes of a model share it, so that only one forward runs at a time."""


class Runtime:
    """A runtime for many sessions of one model; one cap limits the bytes that all their memories hold and work with.

    :meth:`session` begins a session. While a turn of the session runs, the session has a *lease*: a share of the cap,
    which is reserved for its memory. By default leases are elastic: the turns that run divide the cap among them.

    If a turn needs bytes that memories of idle sessions hold, these memories are preempted in stages. ``trim``: they
    give up their free room, and nothing is lost. ``compact``: they are compacted further, which loses information as
    every compaction does. ``disk``: they are moved to disk, and nothing is lost. The next turn of a session gets back
    the free room of its memory, and reads the memory from disk if necessary.

    The model runs one forward at a time. If the model can be fed several sequences at once, a forward feeds as many of
    the waiting turns as ``max_batch_tokens`` allows (:mod:`agentmem.engine.scheduler`).
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
        name: str | None = None,
        **settings: Any,
    ) -> None:
        """Check the settings; the model stays unchanged until the first session is made.

        Args:
            model: a transformers causal language model in eval mode.
            tokenizer: the model's tokenizer; messages with roles need a tokenizer with a chat template.
            cap: the cap in bytes, as an integer or a text such as ``"64MiB"``.
            policy: the policy of sessions that are made without one.
            pressure: the stages by which idle memories are preempted, in order; a stage that is left out is never used.
            spill: the folder in which the runtime makes a private folder for idle memories; by default
                ``agentmem-USER`` in the system's temporary folder.
            wait: seconds that a turn waits for its lease. A call that blocks an event loop does not wait, nor does one
                whose own thread holds the bytes in a turn that it has not ended.
            max_waiting: number of turns that may wait for a lease at once; further ones are refused immediately.
            max_batch_tokens: most tokens of a forward that feeds several sessions. The next tokens of replies come
                first, then pieces of texts that are read. A lower number keeps replies flowing while a long text is
                read.
            name: the runtime's name in log events; by default ``runtime-`` and a number.
            settings: defaults for the :class:`SessionSettings` and :class:`agentmem.settings.Settings` of sessions.

        Raises:
            SettingsRefused: a setting cannot work with any policy. Whether the cap is too small for a session is
                checked by :meth:`session`, since that depends on the session's policy and share.

        """
        hf.check_tokenizer(tokenizer)
        self.model, self.tokenizer, self.policy = hf.text_model(model), tokenizer, policy
        self.cap, self.wait, self.max_waiting, self.defaults = parse_bytes(cap, "cap"), wait, max_waiting, settings
        check_seconds("wait", wait, 0)
        check_count("max_waiting", max_waiting)
        check_count("max_batch_tokens", max_batch_tokens, 1)
        check_name(name)
        self.max_batch_tokens, self.name = max_batch_tokens, name or f"runtime-{next(_NUMBERS)}"
        check_settings(settings)
        SessionSettings.of(**split(settings)[0]).lease(self.cap)
        plugins.policy(policy)  # sessions make their own: some policies keep what they looked up for a model
        _check_pressure(pressure)
        if spill is not None:
            check_place("spill", spill)
        self.leases = Leases(self.cap, pressure)
        self.sessions: list[Session] = []
        self.scheduler = _SCHEDULERS.setdefault(self.model, Scheduler())
        """The scheduler's lock is held while the model computes or memories move. Threads of event loops never wait
        for that lock."""
        self.guard = threading.RLock()
        """Lock for the lists of sessions and holdings; it is held only briefly."""
        self.waiters: deque[Place] = deque()
        """Queue of the turns that wait for a lease, first come first served. Calling an entry makes the turn try again
        to get its lease."""
        self.identity = Identity(self.model, tokenizer)
        self._spill = Spill(None if spill is None else local_path(spill))
        self.turns, self._names = count(1), count(1)
        self.templates: WeakKeyDictionary[ChatTemplate, str] = WeakKeyDictionary()
        """Digest of the tools and options that each session's chat template was given."""
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
        """Begin a new conversation.

        Args:
            policy: name or spec of a policy, or a policy object; by default the runtime's policy.
            name: the session's name in reports and errors; by default ``session-`` and a number.
            extra_policies: further policies that hooks and calls of ``compact`` may choose.
            tools: JSON schemas or functions, for the chat template; they are pinned with the system prompt.
            template_options: variables of the chat template.
            before_compact: called before a compaction; see :mod:`agentmem.sessions.hooks`.
            after_compact: called after each compaction with the report.
            settings: fields of :class:`SessionSettings` (``share``, ``pin_roles``, ``soft``, ``seed``, …) and of
                :class:`agentmem.settings.Settings` (``keep_first``, ``keep_recent``, ``target``, ``rebase``, …).

        Raises:
            SettingsRefused: a setting cannot work.
            CapTooSmall: the share is too small; the message names the share and the bytes that would suffice.

        """
        self._open_or_raise()
        check_making(name, tools, template_options, before_compact=before_compact, after_compact=after_compact)
        settings = {**self.defaults, **settings}
        check_settings(settings)
        own, inner = split(settings)
        chosen = SessionSettings.of(**own)
        lease = chosen.lease(self.cap)
        policies = [plugins.policy(self.policy if policy is None else policy), *plugins.beside(extra_policies)]
        named = tuple(map(Named.of, policies))  # before any use, which could change their digests
        try:
            memory = open_memory(self.model, lease, policies[0], self.tokenizer, inner, policies[1:])
        except CapTooSmall as error:
            if chosen.share is None:
                raise
            raise CapTooSmall(
                f"share={chosen.share!r} is {exact_bytes(lease)} of the runtime's {exact_bytes(self.cap)}: {error}. "
                "The cap of a session is its share: raise that, or the runtime's cap"
            ) from error
        template = self._template(chosen, tools, template_options)
        hooks = HookCalls(before_compact, after_compact, chosen.soft)
        with self.guard:
            self._open_or_raise()
            name = name or f"session-{next(self._names)}"
            memory.names = names = {"session": name, "runtime": self.name}
            holding = Holding(self.model, memory, lease, elastic=chosen.share is None and Engine.compacts(memory))
            holding.named, holding.stage = named, "trim"  # so that only the bytes that it holds are charged
            session = Session(self, name, chosen, holding, template, hooks)
            self.leases.holdings.append(holding)
            self.sessions.append(session)
        self.speak(session, memory)
        log_events.session_opened(names, lease_bytes=lease)
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
        """Make the memory ask the model for summaries through the session's chat template, if there is one."""
        language = memory.language
        if language is None or session.template is None:
            return
        template = session.template

        def ask(text: str) -> Sequence[int]:
            return template.instruction(session.dialogue, text)

        memory.language = Language(language.read, language.write, ask, tuple(template.end_ids))

    def fork(self, session: Session, name: str | None = None) -> Session:
        """Return a new session that continues from the present state of ``session``; see :meth:`Session.fork`."""
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
        log_events.session_forked(other.names, source=session.name)
        return other

    @cached_property
    def packs(self) -> bool:
        """True if the model can be fed several sequences in one forward."""
        return hf.packs(self.model)

    # ---- leases

    @contextmanager
    def turn(
        self, session: Session, *, brief: bool = False, reads: bool = False, until: float | None = None
    ) -> Iterator[None]:
        """Run the ``with`` block as a turn of a session and end the turn afterwards.

        Args:
            session: the session, which must be idle.
            brief: True if the block is a short call, which does not queue behind turns that wait for a lease.
            reads: True if the block only reads the memory. It then needs no lease, unless the memory is on disk or an
                operation in it is unfinished.
            until: the deadline of the wait for the lease, on the monotonic clock; ``wait`` seconds at most.

        Raises:
            RuntimeBusy: the cap had no room for the lease in time.

        """
        turn = object()
        try:  # end the turn twice, in case an interrupt comes before the first call
            try:
                if not (reads and self._begin_reading(session, turn)):
                    self.admit(session, turn, brief=brief, until=until)
                yield
            finally:
                self.end(session, turn)
        finally:
            self.end(session, turn)

    def _begin_reading(self, session: Session, turn: object) -> bool:
        """Mark a session as busy if its memory can be read without a lease; return whether that is so."""
        with self.scheduler.lock:  # without it, another turn could move the memory to disk before the session is busy
            if session.holding.quiet:
                self.begin(session, turn)
            return session.turn is turn

    def admit(self, session: Session, turn: object, *, brief: bool = False, until: float | None = None) -> None:
        """Give a session its lease for a turn; wait for it if other threads hold the bytes.

        ``turn`` is an object that identifies the turn. The caller must pass it to :meth:`end` afterwards, also if this
        method raises an error. A ``brief`` turn waits only if its lease is not free at once.

        Raises:
            RuntimeBusy: see :func:`agentmem.sessions.leasing.queue.wait_for_lease`.

        """
        places = list(self.waiters)  # if the first has not tried yet, it may get its lease at once and blocks nobody
        waiting = bool(places) and places[0].tried and not brief
        alone = not places and not any(each.busy for each in list(self.sessions))
        if waiting or not self.try_admit(session, turn):
            wait_for_lease(session, turn, until, alone=alone)

    def try_admit(self, session: Session, turn: object) -> bool:
        """Give a session its lease for a turn if the bytes are free or can be freed; return whether that succeeded."""
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
        """Mark a session as busy with ``turn``: until :meth:`end`, no other turn of this session and no fork can begin.

        Raises:
            MemoryClosed: the runtime or the session was closed.
            SettingsRefused: another turn of the session is running.

        """
        with self.guard:
            self._open_or_raise()
            _not_busy(session)
            session.turn, session.thread, session.leave = turn, threading.get_ident(), None
        put_back(session)

    def end(self, session: Session, turn: object) -> None:
        """End a turn, so that the session is idle again, and wake the first turn that waits for a lease.

        This method never waits. It changes nothing in the session if the turn never began or has already ended.
        """
        try:
            memory = session.holding.memory
            if memory is not None and session.turn in (turn, None):
                memory.boundary = unwatched
        finally:
            if session.turn is turn:
                session.turn = None
        self.wake_next()

    def wake_next(self) -> None:
        """Make the turn that has waited longest for a lease try again. Any thread may call this."""
        for wake in list(self.waiters)[:1]:
            wake()

    def folder(self) -> Path:
        """Return the runtime's private folder for idle memories on disk; it is made when first needed."""
        return self._spill.folder()

    # ---- files

    def save(self, session: Session, url: str | os.PathLike[str]) -> None:
        """Save a session under a path or an fsspec URL; see :meth:`Session.save`."""
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
        """Load a session that was saved with this model and tokenizer; it continues as if it had never stopped.

        ``settings`` replace the saved settings; a ``seed`` among them restarts the sampling. Tools, template options
        and hooks are not saved: give them again. Also give ``policy`` and ``extra_policies`` again if they were policy
        objects that a name or spec cannot rebuild.

        Raises:
            SnapshotRefused: the snapshot is of another model, damaged, hostile, or larger than the session's share.
            SettingsRefused: an argument is invalid.
            RuntimeBusy: the cap has no room for the session's lease now.

        """
        check_making(name, tools, template_options, before_compact=before_compact, after_compact=after_compact)
        given = archive.Given(policy, extra_policies, tools, template_options, before_compact, after_compact)
        session: Session = archive.load(self, url, name, given, settings)
        return session

    # ---- the end

    def forget(self, session: Session) -> None:
        """Close a session and free its memory; see :meth:`Session.close`."""
        with self.scheduler.lock, self.guard:
            if session.closed:
                return
            session.closed = True
            session.holding.sessions.discard(id(session))
            self.sessions.remove(session)
            if not session.holding.sessions:
                session.holding.release()
                self.leases.holdings.remove(session.holding)
        log_events.session_closed(session.names)
        self.wake_next()

    def close(self) -> None:
        """Close all sessions and restore the model as it was before; closing twice does nothing."""
        self._closed = True
        with self.scheduler.lock:
            for session in list(self.sessions):
                self.forget(session)
            self._spill.close()
        for wake in list(self.waiters):
            wake()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise CopyRefused, since a runtime can be neither copied nor pickled."""
        raise CopyRefused.of(self)

    def __enter__(self) -> Self:
        """Return the runtime, which is closed at the end of the ``with`` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the runtime."""
        self.close()

    @property
    def stats(self) -> RuntimeStats:
        """Current statistics of this runtime: bytes, numbers of sessions and turns, and speed."""
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
            "early wants contextlib.aclosing(session.astream(...)) around it), or fork before it begins"
        )
