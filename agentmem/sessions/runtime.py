"""The runtime: one model, one tokenizer, one cap, many sessions."""

from __future__ import annotations

import tempfile
import threading
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from agentmem import hf
from agentmem.doors import open_memory
from agentmem.errors import MemoryClosed, SettingsRefused
from agentmem.image import give, take
from agentmem.language import Language
from agentmem.sessions.asking import Asking
from agentmem.sessions.holding import Holding, Stage
from agentmem.sessions.leases import Leases
from agentmem.sessions.saved import Made, Saved, restore, saved, session_of
from agentmem.sessions.session import Session
from agentmem.sessions.settings import SessionSettings
from agentmem.sessions.snapshot import check_row, identity, row_of
from agentmem.sessions.snapshot_files import read_manifest, read_snapshot, write_snapshot
from agentmem.sessions.stats import RuntimeStats
from agentmem.sessions.template import ChatTemplate
from agentmem.settings import parse_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from agentmem.contracts import Policy
    from agentmem.memory import Memory
    from agentmem.sessions.hooks import AfterCompact, BeforeCompact
    from agentmem.sessions.template import Tool


class Runtime:
    """Sessions of one model under one cap, which is the sum of what they all hold and work with.

    A session has a *lease*, its share of the cap; it is charged while a turn runs. When another session needs the
    bytes, idle memories give way in stages: their free room is taken (nothing is lost), they are compacted further
    (their policy's loss), they are moved to disk (nothing is lost). They come back when they are used. The model runs
    one forward at a time.
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
        **settings: Any,
    ) -> None:
        """Attach nothing yet.

        Args:
            model: a transformers causal language model in eval mode.
            tokenizer: its tokenizer; roles need one with a chat template.
            cap: bytes, as an integer or a text such as ``"64MiB"``.
            policy: of sessions that name none.
            pressure: the stages by which idle memories give way, in order; leave out what must not happen.
            spill: the folder where idle memories go; by default a temporary one, which the runtime deletes.
            wait: seconds that a stream waits for its lease.
            max_waiting: streams that may wait at once; more are refused at once.
            settings: defaults of the sessions' :class:`SessionSettings` and :class:`agentmem.settings.Settings`.

        Raises:
            SettingsRefused: a setting cannot work.

        """
        self.model, self.tokenizer, self.policy = hf.text_model(model), tokenizer, policy
        self.cap, self.wait, self.max_waiting, self.defaults = parse_bytes(cap), wait, max_waiting, settings
        unknown = [stage for stage in pressure if stage not in get_args(Stage)]
        if unknown:
            raise SettingsRefused(f"pressure: {unknown} unknown; stages are {', '.join(get_args(Stage))}")
        self.leases = Leases(self.cap, pressure)
        self.sessions: list[Session] = []
        self.lock = threading.RLock()
        self.waiting = 0
        self.identity = identity(self.model, tokenizer)
        self._spill = None if spill is None else Path(spill)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._turns, self._names = count(1), count(1)
        self._closed = False

    # ---- sessions

    def session(
        self,
        policy: str | Policy | None = None,
        *,
        name: str | None = None,
        others: Sequence[str | Policy] = (),
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
            others: policies that hooks and calls of ``compact`` may ask for.
            tools: JSON schemas or functions, for the chat template; they are pinned with the system prompt.
            template_options: the chat template's own variables.
            before_compact: asked before a compaction; see :mod:`agentmem.sessions.hooks`.
            after_compact: told its report.
            settings: :class:`SessionSettings` (``share``, ``pin_roles``, ``soft``, ``seed``, …) and
                :class:`agentmem.settings.Settings` (``keep_first``, ``keep_recent``, ``target``, ``rebase``, …).

        Raises:
            SettingsRefused: a setting cannot work; ``CapTooSmall`` names the share that would do.

        """
        self._open_or_raise()
        own, inner = _split({**self.defaults, **settings})
        chosen = SessionSettings.of(**own)
        lease = chosen.lease(self.cap)
        memory = open_memory(self.model, lease, policy or self.policy, self.tokenizer, inner, others)
        template = self._template(chosen, tools, template_options)
        asking = Asking(before_compact, after_compact, chosen.soft)
        with self.lock:
            holding = Holding(self.model, memory, lease)
            holding.stage = "trim"  # it holds nothing yet, and is charged for that
            self.leases.holdings.append(holding)
            session = Session(self, name or f"session-{next(self._names)}", chosen, holding, template, asking)
            self.sessions.append(session)
        self._speak(session, memory)
        return session

    def _template(
        self, settings: SessionSettings, tools: Sequence[Tool] | None, options: Mapping[str, Any] | None
    ) -> ChatTemplate | None:
        if not getattr(self.tokenizer, "chat_template", None):
            if tools:
                raise SettingsRefused("tools: this tokenizer has no chat template; describe them in a text instead")
            return None
        eos = self.model.generation_config.eos_token_id
        return ChatTemplate(self.tokenizer, tools=tools, history=settings.history, eos=eos, options=options)

    def _speak(self, session: Session, memory: Memory) -> None:
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
        with self.lock:
            _not_busy(session)
            other = Session(
                self,
                name or f"{session.name}-fork-{next(self._names)}",
                session.settings,
                session.holding,
                session.template,
                Asking(session.asking.before, session.asking.after, session.asking.soft),
            )
            restore(other, saved(session))
            self.sessions.append(other)
        return other

    # ---- leases

    def admit(self, session: Session) -> None:
        """Give a session its lease for a turn, or refuse.

        Raises:
            RuntimeBusy: others are in mid-turn and hold the cap.

        """
        if not self.try_admit(session):
            with self.lock:
                needed, active = session.holding.lease, sum(each.busy for each in self.sessions)
                raise self.leases.refusal(session.name, needed, active)

    def try_admit(self, session: Session) -> bool:
        """Give a session its lease for a turn if there is room for it, or can be made."""
        with self.lock:
            self._open_or_raise()
            _not_busy(session)
            holding = session.holding
            copies = len(holding.sessions) > 1
            needed = holding.lease - (0 if copies else holding.charged)
            if not self.leases.free(needed, (holding,), self._active, self._give_way):
                return False
            if copies:
                self._part(session)
            else:
                holding.wake(self.identity)
            session.holding.used = next(self._turns)
            session.busy = True
            self._speak(session, session.memory)
            return True

    def leave(self, session: Session) -> None:
        """A turn is over: the session is idle."""
        with self.lock:
            session.busy = False
            session.holding.note()
            if session.holding.memory is not None:
                session.holding.memory.boundary = _nothing

    def _part(self, session: Session) -> None:
        """Give a session a memory of its own; the others keep the one that they shared."""
        shared = session.holding
        own = shared.copied(self.identity)
        shared.sessions.discard(id(session))
        own.sessions = {id(session)}
        session.holding = own
        self.leases.holdings.append(own)

    def _active(self, holding: Holding) -> bool:
        return any(session.busy and session.holding is holding for session in self.sessions)

    def _give_way(self, holding: Holding, stage: Stage) -> None:
        holding.give_way(stage, self._folder(), self.identity)

    def _folder(self) -> Path:
        if self._spill is not None:
            self._spill.mkdir(parents=True, exist_ok=True)
            return self._spill
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="agentmem-")
        return Path(self._temporary.name)

    # ---- files

    def save(self, session: Session, url: str | os.PathLike[str]) -> None:
        """See :meth:`Session.save`."""
        self.admit(session)
        try:
            image, tensors = take(session.memory)
            state = {"row": image.model_dump(mode="json"), "session": saved(session).model_dump(mode="json")}
            write_snapshot(url, tensors, state, identity=self.identity, settings=session_of(session))
        finally:
            self.leave(session)

    def load(
        self,
        url: str | os.PathLike[str],
        *,
        policy: str | Policy | None = None,
        name: str | None = None,
        tools: Sequence[Tool] | None = None,
        **settings: Any,
    ) -> Session:
        """A session that was saved, of this model and tokenizer; it goes on as if it had never stopped.

        ``settings`` replace those that it was saved with; ``policy`` must be given again if it was no named one.

        Raises:
            SnapshotRefused: another model's, damaged, hostile, or larger than the session's share.
            RuntimeBusy: there is no room for it now.

        """
        made = Made.of(read_manifest(url).settings, str(url))
        own: dict[str, Any] = {**made.settings, **settings}
        session = self.session(policy or made.policy, name=name or made.name, tools=tools, **own)
        try:
            self.admit(session)
            try:
                self._fill(session, url)
            finally:
                self.leave(session)
        except BaseException:
            self.forget(session)
            raise
        return session

    def _fill(self, session: Session, url: str | os.PathLike[str]) -> None:
        tensors, state = read_snapshot(
            url,
            identity=self.identity,
            max_bytes=session.holding.lease,
            check=lambda found, specs: _check_all(session.memory, found, specs),
        )
        give(session.memory, row_of(state), tensors)
        session.view.columns = session.memory.rows[0].seen
        restore(session, Saved.of(state))

    # ---- the end

    def forget(self, session: Session) -> None:
        """See :meth:`Session.close`."""
        with self.lock:
            if session.closed:
                return
            session.closed = True
            session.holding.sessions.discard(id(session))
            self.sessions.remove(session)
            if not session.holding.sessions:
                session.holding.release()
                self.leases.holdings.remove(session.holding)

    def close(self) -> None:
        """Close all sessions and leave the model as it was; closing twice does nothing."""
        with self.lock:
            for session in list(self.sessions):
                self.forget(session)
            self._closed = True
            if self._temporary is not None:
                self._temporary.cleanup()

    def __enter__(self) -> Self:
        """Close at the end of a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    @property
    def stats(self) -> RuntimeStats:
        """A moment of this runtime."""
        with self.lock:
            states = [session.stats.state for session in self.sessions]
            return RuntimeStats(
                cap_bytes=self.cap,
                charged_bytes=self.leases.charged,
                active=states.count("active"),
                idle=states.count("idle"),
                on_disk=states.count("on disk"),
                waiting=self.waiting,
            )

    def _open_or_raise(self) -> None:
        if self._closed:
            raise MemoryClosed("this runtime was closed; make another one")


def _check_all(memory: Memory, state: dict[str, Any], specs: Mapping[str, Any]) -> None:
    check_row(memory, state, specs)
    Saved.of(state)


def _split(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A session's own settings, and its memory's."""
    own = {name: value for name, value in values.items() if name in SessionSettings.model_fields}
    return own, {name: value for name, value in values.items() if name not in own}


def _not_busy(session: Session) -> None:
    if session.closed:
        raise MemoryClosed(f"session {session.name!r} was closed; make another one, or load a snapshot")
    if session.busy:
        raise SettingsRefused(
            f"session {session.name!r} is in mid-turn; end the turn first (close its events), or fork before it begins"
        )


def _nothing() -> None:
    """No boundary is watched."""
