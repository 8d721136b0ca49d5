"""A server's state: one runtime, the conversations that it holds, and the thread on which what blocks is done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch

from agentmem import Runtime, Session
from agentmem.errors import AgentmemError, RequestRefused, RuntimeBusy
from agentmem.serving.conversations import Conversation, Conversations
from agentmem.serving.keys import ApiKeys
from agentmem.serving.logs import LOG
from agentmem.serving.settings import ServerSettings
from agentmem.serving.tool_calls import ToolFormat, tool_format

if TYPE_CHECKING:
    from agentmem.serving.turns import Turn

T = TypeVar("T")
_RETRY = 0.05
"""Seconds between two tries for a lease that is not waited for in the runtime's own queue."""


class Server:
    """What all routes share. It does not own the runtime."""

    def __init__(self, runtime: Runtime, settings: ServerSettings, keys: ApiKeys | None = None) -> None:
        """Nothing is run yet; :meth:`check` says whether a conversation fits."""
        self.runtime, self.settings, self.keys = runtime, settings, keys or ApiKeys()
        self.conversations = Conversations(settings.max_conversations, settings.quota_bytes, settings.forget_after)
        self.formats: ToolFormat | None = tool_format(str(getattr(runtime.tokenizer, "chat_template", None) or ""))
        self.marks = self._marks()
        """Special tokens that a tool format writes, which a decoded text leaves out."""
        self.started = int(time.time())
        self.closing = False
        self.turns: set[Turn] = set()
        """Under way."""
        threads = torch.get_num_threads()  # memories are planned by it, and it is kept per thread
        self._worker = ThreadPoolExecutor(1, "agentmem-serving", lambda: torch.set_num_threads(threads))

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
        """Leave a conversation out, and free what it holds."""
        self.conversations.forget(conversation)
        if (session := conversation.session) is not None:
            conversation.session = None
            await self._run(session.close)

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
        self.conversations.release(conversation)

    async def close(self) -> None:
        """Free everything; no request is served any more."""
        self.closing = True
        for each in self.conversations:
            try:
                await self.forget(each)
            except AgentmemError as error:
                LOG.warning("conversation_not_freed", error=str(error))
        self._worker.shutdown()

    def new_session(self, conversation: Conversation, seed: int) -> Session:
        """A session for a conversation that begins; see :meth:`agentmem.Runtime.session`."""
        recipe = conversation.recipe
        return self.runtime.session(recipe.made_policy(), name=conversation.id, seed=seed, **recipe.arguments())
