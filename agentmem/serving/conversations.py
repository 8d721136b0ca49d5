"""The conversations that a server holds, and the choice of conversations to continue and to forget."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Iterator
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
    """A conversation that the server holds.

    ``session`` is ``None`` before the first turn, and while the memory exists only on disk in ``folder``.
    """

    id: str
    owner: str
    label: str | None
    """The ``prompt_cache_key`` that a request must have to continue this conversation."""
    recipe: Recipe
    history: list[str] = field(default_factory=list)
    """Digests of all messages that the session read or wrote, in order."""
    anchors: dict[str, int] = field(default_factory=dict)
    """Number of history entries that a compaction item stands for; the key is the item's marker."""
    session: Session | None = None
    folder: Path | None = None
    used: float = field(default_factory=time.time)
    """Time of the last use, in seconds since 1970."""
    bytes: int = 0
    """Bytes that the conversation held when it was last used."""
    lead: str | None = None
    """Digest of the instructions that the conversation began with."""
    since_item: int = 0
    """Number of tokens that the newest compaction item stands for; 0 without an item."""
    open: bool = False
    """True if a reply was begun but has no token yet.

    Then only a request without new messages can continue the conversation.
    """
    busy: bool = False
    saved: str | None = None
    """Name of the newest save on disk that this conversation was loaded from or written to."""
    changed: bool = False
    """True from the beginning of a turn until the conversation has been saved."""
    life: Life = field(default_factory=Life)
    """The history of the memory's size, for the dashboard."""


class Conversations:
    """All held conversations, by owner and id. Call the methods on the event loop's thread; no method blocks."""

    def __init__(self, most: int, quota_bytes: int, forget_after: float) -> None:
        """Begin without conversations; :class:`agentmem.serving.settings.ServerSettings` explains the limits."""
        self.most, self.quota_bytes, self.forget_after = most, quota_bytes, forget_after
        self._held: dict[tuple[str, str], Conversation] = {}
        self.replaced: list[Conversation] = []
        """Conversations whose names new conversations took; :meth:`Server.sweep` closes them and empties this list."""

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
        saved: Iterable[Conversation] = (),
    ) -> tuple[Conversation, int]:
        """Choose or begin the conversation for a request, and mark the conversation as busy.

        Return the conversation, and the number of messages of the request that the conversation holds already. The
        conversation with the largest number is chosen. If no conversation can be continued, a new conversation begins,
        and the number is 0.

        Args:
            owner: The owner of the request.
            recipe: The session arguments (policy, settings, tools, template options) that the conversation must have.
            wanted: Digests of all messages of the request. If the request has a compaction item, the marker of the item
                comes first and counts as one message.
            name: If given, only the conversation of this name can be continued, and ``label`` is not compared.
            label: The label (``prompt_cache_key``) that the conversation must have, if no name is given.
            any_recipe: Also accept a conversation with another recipe. The conversation may then also begin with
                instructions that the request leaves out.
            saved: Saves of this owner's conversations in a folder that is shared with other servers, the oldest first.
                A save that holds more of the request than every held conversation is held from now on. If the held
                conversation with its id is idle, the save replaces it; if that is busy, the save cannot be chosen.

        Raises:
            RequestRefused: ``name`` is not a valid name, or the conversation of that name is busy with another turn.

        """
        best: tuple[Conversation, int] | None = None
        named = None if name is None else self._named(owner, name)
        for each in self._candidates(name, named, saved):
            like = Like(owner, each.recipe if any_recipe else recipe, each.label if name else label)
            count = _continues(each, like, wanted, unled=any_recipe)
            if count and (best is None or count > best[1]):
                best = each, count
        if best is None:
            best = self._begin(owner, recipe, name, label), 0
        elif self._held.get((owner, best[0].id)) is not best[0]:
            self._take(best[0])
        best[0].busy = best[0].changed = True
        return best

    def _candidates(
        self, name: str | None, named: Conversation | None, saved: Iterable[Conversation]
    ) -> Iterator[Conversation]:
        """Yield the conversations among which a request may choose, those that are held first."""
        yield from self if name is None else filter(None, [named])
        for each in saved:
            held = self._held.get((each.owner, each.id))
            if name in (None, each.id) and (held is None or not held.busy):
                yield each

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
        self._take(made)
        return made

    def _take(self, conversation: Conversation) -> None:
        """Hold a conversation in place of the held conversation with the same owner and id, if any."""
        if (old := self._held.pop((conversation.owner, conversation.id), None)) is not None:
            self.replaced.append(old)
        self._held[conversation.owner, conversation.id] = conversation

    def release(self, conversation: Conversation) -> None:
        """Mark a conversation as no longer busy, and note the time of its last use."""
        conversation.busy, conversation.used = False, time.time()

    def forget(self, conversation: Conversation) -> None:
        """Remove a conversation from the held conversations; the caller must close the conversation's session."""
        if self._held.get((conversation.owner, conversation.id)) is conversation:
            del self._held[conversation.owner, conversation.id]

    def hold(self, conversation: Conversation) -> None:
        """Add a conversation that an earlier server saved on disk."""
        self._held[conversation.owner, conversation.id] = conversation

    def surplus(self) -> list[Conversation]:
        """Return the idle conversations to forget, so that the limits of idle time, number and bytes are kept.

        The conversation that was idle longest comes first.
        """
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

    ``wanted`` are the digests of the request's messages. ``like`` holds the properties that the conversation must share
    with the request. If ``unled`` is true, the conversation may begin with instructions that the request leaves
    out.
    """
    if each.busy or Like(each.owner, each.recipe, each.label) != like:
        return None
    count = extends(each.history, wanted, each.anchors)
    if count is None and unled and each.lead is not None and each.history[:1] == [each.lead]:
        count = extends(each.history[1:], wanted, {})
    return None if each.open and count != len(wanted) else count
