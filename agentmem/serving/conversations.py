"""The conversations that a server holds: which one a request goes on from, and which are forgotten."""

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
    """One held conversation. ``session`` is ``None`` while it lies in a ``folder``, or has not begun."""

    id: str
    owner: str
    label: str | None
    """The ``prompt_cache_key`` that pins it."""
    recipe: Recipe
    history: list[str] = field(default_factory=list)
    """Digests of all messages that the session was given or wrote."""
    anchors: dict[str, int] = field(default_factory=dict)
    """Markers of compaction items, and how much of the history each stands for."""
    session: Session | None = None
    folder: Path | None = None
    used: float = field(default_factory=time.time)
    """When it was used last, in seconds since 1970."""
    bytes: int = 0
    """What it held when it was used last."""
    lead: str | None = None
    """Digest of the instructions that it began with."""
    since_item: int = 0
    """Tokens that the newest compaction item stands for."""
    open: bool = False
    """Whether a reply was begun and has no token yet: nothing but that reply can come next."""
    busy: bool = False
    life: Life = field(default_factory=Life)
    """What a dashboard shows of its memory."""


class Conversations:
    """By owner and id. Everything here runs on the event loop's thread; nothing waits."""

    def __init__(self, most: int, quota_bytes: int, forget_after: float) -> None:
        """The limits are those of :class:`agentmem.serving.settings.ServerSettings`."""
        self.most, self.quota_bytes, self.forget_after = most, quota_bytes, forget_after
        self._held: dict[tuple[str, str], Conversation] = {}
        self.replaced: list[Conversation] = []
        """Those whose name another one has now: whoever reads this closes their sessions and empties it."""

    def __iter__(self) -> Iterator[Conversation]:
        """All of them."""
        return iter(list(self._held.values()))

    def __len__(self) -> int:
        """How many there are."""
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
        """The conversation that a request goes on from, and how many of its messages that holds; it is busy now.

        One that holds the most of them is taken; where none does, a new one begins, which holds none. ``any_recipe``
        takes one of another recipe, too, and one whose instructions the request leaves out.

        Raises:
            RequestRefused: ``name`` is no name, or names a conversation that is in mid-turn.

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
        """Its turn is over."""
        conversation.busy, conversation.used = False, time.time()

    def forget(self, conversation: Conversation) -> None:
        """Leave it out from now on; whoever calls this closes its session."""
        if self._held.get((conversation.owner, conversation.id)) is conversation:
            del self._held[conversation.owner, conversation.id]

    def hold(self, conversation: Conversation) -> None:
        """Take in one that was kept in a file."""
        self._held[conversation.owner, conversation.id] = conversation

    def surplus(self) -> list[Conversation]:
        """Those that are idle too long, or beyond the number or the bytes that are held; the longest idle first."""
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
    """What a conversation must be for a request to go on from it."""

    owner: str
    recipe: Recipe
    label: str | None


def _continues(each: Conversation, like: Like, wanted: list[str], *, unled: bool = False) -> int | None:
    """How many of the wanted messages it holds; ``None`` where it is no conversation to go on from.

    ``unled``: also where it holds them behind instructions that are not among them.
    """
    if each.busy or Like(each.owner, each.recipe, each.label) != like:
        return None
    count = extends(each.history, wanted, each.anchors)
    if count is None and unled and each.lead is not None and each.history[:1] == [each.lead]:
        count = extends(each.history[1:], wanted, {})
    return None if each.open and count != len(wanted) else count
