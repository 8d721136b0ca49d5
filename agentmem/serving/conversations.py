"""The conversations that a server holds: the choice of one for a request, and of those to forget."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from agentmem.errors import RequestRefused
from agentmem.serving.dashboard.life import Life
from agentmem.serving.history import extends
from agentmem.serving.recipes import Recipe

if TYPE_CHECKING:
    from agentmem import Session

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(slots=True, eq=False)
class Conversation:
    """One held conversation.

    ``session`` is ``None`` before the first turn, and while the memory is only on disk in ``folder``.
    """

    id: str
    owner: str
    label: str | None
    """The ``prompt_cache_key`` that a request must have to continue this conversation."""
    recipe: Recipe
    history: list[str] = field(default_factory=list)
    """Digests of all messages that the session read or wrote."""
    anchors: dict[str, int] = field(default_factory=dict)
    """Number of history entries that each compaction item stands for, by the marker of the item."""
    session: Session | None = None
    folder: Path | None = None
    used: float = field(default_factory=time.time)
    """Time of the last use, in seconds since 1970."""
    bytes: int = 0
    """Bytes that the conversation held when it was last used."""
    lead: str | None = None
    """Digest of the instructions that the conversation began with."""
    since_item: int = 0
    """Tokens that the newest compaction item stands for."""
    open: bool = False
    """Whether a reply was begun and has no token yet; then only a request without new messages can continue."""
    busy: bool = False
    life: Life = field(default_factory=Life)
    """The history of the memory's size, for the dashboard."""


class Conversations:
    """All held conversations, by owner and id. Call all methods on the event loop's thread; none of them blocks."""

    def __init__(self, most: int, quota_bytes: int, forget_after: float) -> None:
        """Begin without conversations; for the limits see :class:`agentmem.serving.settings.ServerSettings`."""
        self.most, self.quota_bytes, self.forget_after = most, quota_bytes, forget_after
        self._held: dict[tuple[str, str], Conversation] = {}
        self.replaced: list[Conversation] = []
        """Conversations whose names new ones took; the reader of this list closes and removes them."""

    def __iter__(self) -> Iterator[Conversation]:
        """Iterate over a copy of the list of all held conversations."""
        return iter(list(self._held.values()))

    def __len__(self) -> int:
        """Return the number of held conversations."""
        return len(self._held)

    def claim(
        self,
        owner: str,
        recipe: Recipe,
        wanted: list[str],
        *,
        name: str | None = None,
        label: str | None = None,
        any_recipe: bool = False,
    ) -> tuple[Conversation, int]:
        """Choose the conversation for a request, mark it busy, and count the messages that it holds already.

        The conversation that holds the most of the ``wanted`` messages is chosen. If none holds any, a new one begins
        and the number is 0. With ``any_recipe`` the conversation may have another recipe, and may begin with
        instructions that the request leaves out.

        Raises:
            RequestRefused: ``name`` is not a valid name, or the conversation of that name is in mid-turn.

        """
        best: tuple[Conversation, int] | None = None
        named = None if name is None else self._named(owner, name)
        for each in self if name is None else filter(None, [named]):
            like = Like(owner, each.recipe if any_recipe else recipe, each.label if name else label)
            count = _continues(each, like, wanted, unled=any_recipe)
            if count and (best is None or count > best[1]):
                best = each, count
        found, held = best or (self._begin(owner, recipe, name, label), 0)
        found.busy = True
        return found, held

    def _named(self, owner: str, name: str) -> Conversation | None:
        if not _NAME.fullmatch(name):
            raise RequestRefused(
                f"X-Agentmem-Session: {name[:80]!r} is no name; use 1 to 64 letters, digits, and any of _.-",
                param="X-Agentmem-Session",
            )
        found = self._held.get((owner, name))
        if found is not None and found.busy:
            raise RequestRefused(
                f"conversation {name!r} is in mid-turn; wait for its end, or leave X-Agentmem-Session out to read the "
                "messages anew",
                status=409,
                code="conversation_busy",
                param="X-Agentmem-Session",
            )
        return found

    def _begin(self, owner: str, recipe: Recipe, name: str | None, label: str | None) -> Conversation:
        made = Conversation(name or f"conv_{secrets.token_hex(12)}", owner, label, recipe)
        if name is not None and (old := self._held.pop((owner, name), None)) is not None:
            self.replaced.append(old)
        self._held[owner, made.id] = made
        return made

    def release(self, conversation: Conversation) -> None:
        """Mark a conversation as no longer busy, and note the time of its last use."""
        conversation.busy, conversation.used = False, time.time()

    def forget(self, conversation: Conversation) -> None:
        """Remove a conversation from the held ones; the caller closes its session."""
        if self._held.get((conversation.owner, conversation.id)) is conversation:
            del self._held[conversation.owner, conversation.id]

    def hold(self, conversation: Conversation) -> None:
        """Add a conversation that was saved in a file."""
        self._held[conversation.owner, conversation.id] = conversation

    def surplus(self) -> list[Conversation]:
        """Return the conversations that exceed the limits of time, number or bytes, the longest idle first."""
        idle = sorted((each for each in self if not each.busy), key=lambda each: each.used)
        count, size, now = len(self), sum(each.bytes for each in self), time.time()
        found = []
        for each in idle:
            if count <= self.most and size <= self.quota_bytes and now - each.used <= self.forget_after:
                break
            found.append(each)
            count, size = count - 1, size - each.bytes
        return found


@dataclass(frozen=True, slots=True)
class Like:
    """Properties that a conversation and a request must share for the request to continue the conversation."""

    owner: str
    recipe: Recipe
    label: str | None


def _continues(each: Conversation, like: Like, wanted: list[str], *, unled: bool = False) -> int | None:
    """Return how many of a request's messages a conversation holds, or ``None`` if the request cannot continue it.

    ``wanted`` are the request's messages; ``like`` are properties that the conversation must share with the request.
    With ``unled`` the conversation may begin with instructions that are not among the wanted messages.
    """
    if each.busy or Like(each.owner, each.recipe, each.label) != like:
        return None
    count = extends(each.history, wanted, each.anchors)
    if count is None and unled and each.lead is not None and each.history[:1] == [each.lead]:
        count = extends(each.history[1:], wanted, {})
    return None if each.open and count != len(wanted) else count
