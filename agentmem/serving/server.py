"""A server's state: one runtime, the conversations that it holds, and the thread on which what blocks is done."""

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
from agentmem.serving.kept import Kept, Record, conversation_name
from agentmem.serving.keys import ApiKeys
from agentmem.serving.logs import LOG
from agentmem.serving.metrics import Metrics
from agentmem.serving.settings import ServerSettings
from agentmem.serving.tool_calls import ToolFormat, tool_format

T = TypeVar("T")
_RETRY = 0.05
"""Seconds between two tries for a lease that is not waited for in the runtime's own queue."""


class Running(Protocol):
    """A request to the model that runs or waits."""

    task: asyncio.Task[Any]
    request: Any

    async def stop(self, why: RequestRefused | None = None) -> None:
        """End it within one forward; ``why`` is what its client is answered."""


class Server:
    """What all routes share. It does not own the runtime."""

    def __init__(self, runtime: Runtime, settings: ServerSettings, keys: ApiKeys | None = None) -> None:
        """Nothing is run yet; :meth:`check` says whether a conversation fits."""
        self.runtime, self.settings, self.keys = runtime, settings, keys or ApiKeys()
        self.conversations = Conversations(settings.max_conversations, settings.quota_bytes, settings.forget_after)
        self.formats: ToolFormat | None = tool_format(str(getattr(runtime.tokenizer, "chat_template", None) or ""))
        self.constraints = Constraints(runtime.tokenizer, self.formats)
        self.marks = self._marks()
        """Special tokens that a tool format writes, which a decoded text leaves out."""
        self.started = int(time.time())
        self.closing = False
        self.turns: set[Running] = set()
        """Under way."""
        self.metrics = Metrics(runtime, self.conversations, self.turns)
        self.watch = Watch(settings.models, runtime, self.conversations, self.turns)
        self._passing = None if settings.state else tempfile.TemporaryDirectory(prefix="agentmem-serve-")
        self.state = settings.state or Path(self._passing.name if self._passing else "")
        self.kept = Kept(self.state / "conversations")
        self.items = Items(Kept(self.state / "items"), self._item_keys(), runtime.identity.now(), settings.item_seconds)
        threads = torch.get_num_threads()  # memories are planned by it, and it is kept per thread
        self._worker = ThreadPoolExecutor(1, "agentmem-serving", lambda: torch.set_num_threads(threads))

    def _item_keys(self) -> list[bytes]:
        return read_keys(self.settings.item_key_file or self.state / "items.key")

    def _marks(self) -> dict[int, str]:
        tokenizer, format_ = self.runtime.tokenizer, self.formats
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        return {special[text]: text for text in (() if format_ is None else format_.markers) if text in special}

    def check(self) -> None:
        """Refuse now what every conversation would be refused for.

        Raises:
            CapTooSmall, SettingsRefused: as :meth:`agentmem.Runtime.session`, and where there is no chat template.

        """
        self.runtime.session().close()

    def model(self, name: str) -> str:
        """The name under which a request asked for the model.

        Raises:
            RequestRefused: 404, this server has no such model.

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
        """Run what may wait for a forward, off the event loop; while the cap is leased out it is tried again.

        A task that is cancelled goes on being so when the call has ended, whose effects are then complete.

        Raises:
            RuntimeBusy: after the runtime's ``wait``.

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
            await asyncio.wait([future])
            future.exception()
            raise

    async def forget(self, conversation: Conversation) -> None:
        """Leave a conversation out, and free what it holds, on disk too."""
        self.conversations.forget(conversation)
        session, conversation.session = conversation.session, None

        def free() -> None:
            if session is not None:
                session.close()
            if conversation.folder is not None:
                self.kept.drop(conversation_name(conversation))

        await self._run(free)

    async def sweep(self) -> None:
        """Forget what is idle too long, too many, or too large."""
        replaced, self.conversations.replaced = self.conversations.replaced, []
        for each in (*replaced, *self.conversations.surplus()):
            if not each.busy:
                await self.forget(each)

    def settle(self, conversation: Conversation) -> None:
        """A turn of it is over: note what it holds."""
        if (session := conversation.session) is not None:
            conversation.bytes = session.stats.charged_bytes or conversation.bytes
            conversation.life.look(session)
        self.conversations.release(conversation)

    def open_session(self, conversation: Conversation) -> None:
        """Give a conversation its session: the memory in its folder, or a new one. Waits for a forward that runs.

        Raises:
            CapTooSmall, SettingsRefused: see :meth:`agentmem.Runtime.session`. SnapshotRefused: its folder's memory
                does not fit. RuntimeBusy: there is no room for it now.

        """
        recipe, runtime = conversation.recipe, self.runtime
        given = {"name": conversation.id, "after_compact": conversation.life.compacted, **recipe.arguments()}
        if conversation.folder is None:
            conversation.session = runtime.session(recipe.made_policy(), seed=secrets.randbits(62), **given)
        else:
            share = runtime.defaults.get("share", 1.0)
            conversation.session = runtime.load(conversation.folder, policy=recipe.made_policy(), share=share, **given)

    def make_item(self, conversation: Conversation, session: Session) -> tuple[str, str]:
        """A compaction item of what the session holds; the oldest items be preempted. See :meth:`Items.make`."""
        made = self.items.make(conversation, session)
        self.items.kept.sweep(self.settings.item_seconds, self.settings.quota_bytes)
        return made

    # ---- beginning and end

    def restore(self) -> None:
        """Take in the conversations that an earlier server kept; their memories are read when they are used."""
        for name in self.kept.names():
            record = self.kept.record(name)
            if record is not None:
                self.conversations.hold(record.conversation(self.kept.memory(name)))

    async def close(self) -> None:
        """End the turns under way, keep all conversations if there is a folder for it, and free everything.

        Closing twice does nothing.
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
        if self._passing is not None:
            self._passing.cleanup()

    async def _put_away(self, conversation: Conversation) -> None:
        session = conversation.session
        if session is None:
            return

        def put() -> None:
            if self._passing is None:
                self.kept.keep(conversation_name(conversation), session, Record.of(conversation))
            session.close()

        try:
            await self.blocking(put)
        except (AgentmemError, OSError) as error:
            LOG.warning("conversation_lost", error=str(error))
