"""The state that all routes of a server share: the runtime, the conversations, and a thread for blocking calls."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from agentmem import Runtime, Session
from agentmem.errors import AgentmemError, RequestRefused, RuntimeBusy
from agentmem.serving.constraints import Constraints
from agentmem.serving.conversations import Conversation, Conversations
from agentmem.serving.dashboard.watch import Watch
from agentmem.serving.items import Items, read_keys
from agentmem.serving.kept import Kept
from agentmem.serving.keys import ApiKeys
from agentmem.serving.logs import LOG
from agentmem.serving.metrics import Metrics
from agentmem.serving.settings import ServerSettings
from agentmem.serving.shelf import Shelf
from agentmem.serving.tool_calls import ToolFormat, tool_format
from agentmem.sessions import aio

T = TypeVar("T")
_RETRY = 0.05
"""Seconds after which a call that raised ``RuntimeBusy`` is tried again."""


class Running(Protocol):
    """The part of a turn's interface that the server uses; a turn is one request to the model."""

    task: asyncio.Task[Any]
    request: Any

    async def stop(self, why: RequestRefused | None = None) -> None:
        """End the turn after the running forward pass or blocking call; ``why`` is the error that the client gets."""


class Server:
    """The state that all routes share. Closing the server does not close the runtime."""

    def __init__(self, runtime: Runtime, settings: ServerSettings, keys: ApiKeys | None = None) -> None:
        """Prepare the server without running the model.

        Call :meth:`check` to find out whether the cap is large enough for a conversation.
        """
        self.runtime, self.settings, self.keys = runtime, settings, keys or ApiKeys()
        self.conversations = Conversations(settings.max_conversations, settings.quota_bytes, settings.forget_after)
        self.formats: ToolFormat | None = tool_format(str(getattr(runtime.tokenizer, "chat_template", None) or ""))
        self.constraints = Constraints(runtime.tokenizer, self.formats)
        self.marks = self._marks()
        """Texts of the special tokens that the tool format uses and that decoding omits; the keys are token ids."""
        self.started = int(time.time())
        self.closing = False
        self.turns: set[Running] = set()
        """Turns that are running or waiting."""
        self.metrics = Metrics(runtime, self.conversations, self.turns)
        self.watch = Watch(settings.models, runtime, self.conversations, self.turns)
        self._passing = None if settings.state else tempfile.TemporaryDirectory(prefix="agentmem-serve-")
        self.state = settings.state or Path(self._passing.name if self._passing else "")
        self.shelf = Shelf(Kept(self.state / "conversations"), shared=settings.shared)
        self.items = Items(Kept(self.state / "items"), self._item_keys(), runtime.identity.now(), settings.item_seconds)
        threads = torch.get_num_threads()  # memory plans depend on this number, and PyTorch keeps it per thread
        self._worker = ThreadPoolExecutor(1, "agentmem-serving", lambda: torch.set_num_threads(threads))

    def _item_keys(self) -> list[bytes]:
        return read_keys(self.settings.item_key_file or self.state / "items.key")

    def _marks(self) -> dict[int, str]:
        tokenizer, format_ = self.runtime.tokenizer, self.formats
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        return {special[text]: text for text in (() if format_ is None else format_.markers) if text in special}

    def check(self) -> None:
        """Open and close a session, so that an error that every conversation would cause is raised at once.

        Raises:
            CapTooSmall, SettingsRefused: see :meth:`agentmem.Runtime.session`.

        """
        self.runtime.session().close()

    def model(self, name: str) -> str:
        """Return ``name`` unchanged if the served model has this name.

        Raises:
            RequestRefused: status 404, this server has no model of that name.

        """
        if name not in self.settings.models:
            known = ", ".join(self.settings.models)
            raise RequestRefused(
                f"model {name[:200]!r} is not served here; choose from: {known}",
                status=404,
                code="model_not_found",
                param="model",
            )
        return name

    async def blocking(self, call: Callable[[], T]) -> T:
        """Run ``call`` on the worker thread and return its result.

        While ``call`` raises :class:`RuntimeBusy`, because running turns have leased the cap, the call is repeated.
        If the calling task is cancelled, ``call`` still runs to its end before the cancellation is raised.

        Raises:
            RuntimeBusy: the cap was still leased after the runtime's ``wait`` seconds.

        """
        until = time.monotonic() + self.runtime.wait
        while True:
            try:
                return await self._run(call)
            except RuntimeBusy:
                if time.monotonic() >= until:
                    raise
            await asyncio.sleep(_RETRY)

    async def _run(self, call: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._worker, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await aio.ended(future)  # a second cancellation must not leave the call at work on a session that goes
            raise

    async def forget(self, conversation: Conversation) -> None:
        """Remove a conversation and close its session.

        Its files are deleted, except from a folder that other servers share: they may go on from them.
        """
        self.conversations.forget(conversation)
        session, conversation.session = conversation.session, None

        def free() -> None:
            if session is not None:
                session.close()
            if conversation.saved is not None and not self.settings.shared:
                self.shelf.drop(conversation)

        await self._run(free)

    async def sweep(self) -> None:
        """Forget conversations beyond the limits of idle time, number and bytes.

        A new conversation may have taken the name of an older conversation. The older one is then forgotten as well.
        Busy conversations are kept.
        """
        replaced, self.conversations.replaced = self.conversations.replaced, []
        for each in (*replaced, *self.conversations.surplus()):
            if not each.busy:
                await self.forget(each)

    def settle(self, conversation: Conversation) -> None:
        """After a turn, note how many bytes the conversation holds, and mark the conversation as no longer busy."""
        self._measure(conversation)
        self.conversations.release(conversation)

    def _measure(self, conversation: Conversation) -> None:
        if (session := conversation.session) is not None:
            conversation.bytes = session.stats.charged_bytes or conversation.bytes
            conversation.life.look(session)

    async def saved(self, owner: str) -> list[Conversation]:
        """Return the saves of an owner's conversations that other servers of a shared folder made, oldest first.

        The server's own saves are among them, and deleted saves are not. Without a shared folder the list is empty.
        """
        if not self.settings.shared:
            return []
        await asyncio.to_thread(self.shelf.look)
        return list(self.shelf.conversations(owner))

    async def share(self, conversation: Conversation) -> None:
        """After a turn, save a conversation if the folder is shared, so that other servers can go on from it.

        An error is logged: the conversation goes on here, and is saved after its next turn.
        """
        session = conversation.session
        if not self.settings.shared or session is None:
            return
        self._measure(conversation)
        conversation.used = time.time()

        def save() -> None:
            self.shelf.save(conversation, session)
            limits = self.settings
            self.shelf.kept.sweep(limits.forget_after, limits.quota_bytes, limits.max_conversations)

        try:
            await self.blocking(save)
        except (AgentmemError, OSError) as error:
            LOG.warning("conversation_not_saved", error=str(error))

    def open_session(self, conversation: Conversation) -> None:
        """Load the session of a conversation from its folder, or open a new session if there is no folder.

        A forward pass that is running is awaited first.

        Raises:
            CapTooSmall, SettingsRefused: see :meth:`agentmem.Runtime.session`.
            SnapshotRefused: the memory in the folder is damaged, of another model, or too large.
            RuntimeBusy: the cap has no room for the session at present.

        """
        recipe, runtime = conversation.recipe, self.runtime
        given = {"name": conversation.id, "after_compact": conversation.life.compacted, **recipe.arguments()}
        if conversation.folder is None:
            conversation.session = runtime.session(recipe.made_policy(), seed=secrets.randbits(62), **given)
        else:
            share = runtime.defaults.get("share", 1.0)
            conversation.session = runtime.load(conversation.folder, policy=recipe.made_policy(), share=share, **given)

    def make_item(self, conversation: Conversation, session: Session) -> tuple[str, str]:
        """Save the present memory of a session on disk as a compaction item; return the item's id and token.

        The token is an encrypted string with the id. A client sends the token to continue from the saved memory.
        Afterwards, items beyond the limits of age and bytes are deleted. :meth:`Items.make` describes the errors.
        """
        made = self.items.make(conversation, session)
        self.items.kept.sweep(self.settings.item_seconds, self.settings.quota_bytes)
        return made

    # ---- beginning and end

    def restore(self) -> None:
        """Register the conversations that an earlier server saved; a memory is loaded when a turn first needs it.

        In a shared folder they are looked for whenever a request comes.
        """
        if self.settings.shared:
            return
        self.shelf.look()
        for conversation in self.shelf.conversations():
            self.conversations.hold(conversation)

    async def close(self) -> None:
        """End running turns, save all conversations if there is a state folder, and close their sessions.

        A second call does nothing.
        """
        if self.closing:
            return
        self.closing = True
        if tasks := [turn.task for turn in self.turns]:
            await asyncio.wait(tasks, timeout=self.settings.shutdown_seconds)
        for turn in list(self.turns):
            await turn.stop()
        for each in self.conversations:
            await self._put_away(each)
        self._worker.shutdown()
        self.shelf.kept.close()
        self.items.kept.close()
        if self._passing is not None:
            self._passing.cleanup()

    async def _put_away(self, conversation: Conversation) -> None:
        session = conversation.session
        if session is None:
            return

        def put() -> None:
            if self._passing is None and conversation.changed:
                self.shelf.save(conversation, session)
            session.close()

        try:
            await self.blocking(put)
        except (AgentmemError, OSError) as error:
            LOG.warning("conversation_lost", error=str(error))
