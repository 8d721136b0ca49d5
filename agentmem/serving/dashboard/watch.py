"""The data of the dashboard: a record of the server's state for each second, and one owner's conversations.

The records are called moments.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import time
from collections import deque
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentmem import Runtime
    from agentmem.serving.conversations import Conversation, Conversations
    from agentmem.sessions import RuntimeStats

SECONDS = 1.0
"""Seconds between two moments (records of the server's state)."""
MOMENTS = 300
"""Number of moments that are kept: the newest ones."""
COMPACTIONS = 60
"""Maximum number of compactions that the dashboard shows: the newest ones."""
CONVERSATIONS = 24
"""Maximum number of conversations that the dashboard shows: those used last."""
PAUSE = 0.5
"""Seconds for which :meth:`Watch.state` returns an owner's previous data instead of new data."""
_KINDS = ("running_bytes", "running_room_bytes", "idle_bytes", "idle_room_bytes")
_QUEUE = ("active", "waiting")


@dataclass(frozen=True, slots=True)
class _Given:
    at: float
    state: bytes


class Watch:
    """Collector of the dashboard's data: counts, sizes and times, but no text of conversations.

    Call the methods on the event loop's thread.
    """

    def __init__(self, models: Sequence[str], runtime: Runtime, conversations: Conversations, requests: Sized) -> None:
        """Begin without records; ``requests`` is the live collection of turns that run or wait."""
        self._models, self._runtime = list(models), runtime
        self._conversations, self._requests = conversations, requests
        self._moments: deque[dict[str, float]] = deque(maxlen=MOMENTS)
        self._before: tuple[float, int] | None = None
        self._given: dict[str, _Given] = {}

    async def run(self) -> None:
        """Record the runtime's state each second until the task is cancelled."""
        while True:
            self.note()
            await asyncio.sleep(SECONDS)

    def note(self) -> None:
        """Record the runtime's present state once: bytes, turns, and tokens per second."""
        stats, now = self._runtime.stats, time.monotonic()
        before, self._before = self._before, (now, stats.fed_tokens)
        rate = 0.0 if before is None or now <= before[0] else (stats.fed_tokens - before[1]) / (now - before[0])
        moment = {name: getattr(stats, name) for name in (*_KINDS, *_QUEUE)}
        self._moments.append({"at": round(time.time(), 2), "tokens_per_second": round(rate, 2), **moment})

    def state(self, owner: str) -> bytes:
        """Return the data that ``owner`` may see, as JSON.

        The data is computed at most once in :data:`PAUSE` seconds; meanwhile the previous data is returned.
        """
        given, now = self._given.get(owner), time.monotonic()
        if given is None or now - given.at >= PAUSE:
            made = json.dumps(self._state(owner), separators=(",", ":")).encode()
            given = self._given[owner] = _Given(now, made)
        return given.state

    def _state(self, owner: str) -> dict[str, Any]:
        mine = [each for each in self._conversations if each.owner == owner]
        shown = set(heapq.nlargest(CONVERSATIONS, mine, key=lambda each: (each.busy, each.used)))
        for each in shown:
            each.life.look(each.session)
        if not self._moments:
            self.note()
        moments = list(self._moments)
        return {
            "at": round(time.time(), 2),
            "models": self._models,
            "runtime": _runtime(self._runtime.stats) | {"requests": len(self._requests)},
            "moments": {name: [each[name] for each in moments] for name in moments[0]} if moments else {},
            "conversations": [
                _conversation(each) for each in reversed(mine) if each in shown
            ],  # they keep their places
            "hidden": len(mine) - len(shown),
            "compactions": _compactions(mine),
        }


def _runtime(stats: RuntimeStats) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in stats.model_dump().items()}


def _conversation(each: Conversation) -> dict[str, Any]:
    life = each.life
    return {
        "id": each.id,
        "state": life.state,
        "policy": life.policy,
        "tokens": life.tokens,
        "slots": round(life.slots, 1),
        "capacity": life.capacity,
        "bytes": each.bytes,
        "idle_seconds": 0.0 if each.busy else round(max(0.0, time.time() - each.used), 1),
        "compactions": life.total,
        "saw_tooth": life.saw_tooth(),
    }


def _compactions(mine: Sequence[Conversation]) -> list[dict[str, Any]]:
    """Return the newest compactions of the given conversations, oldest first."""
    found = [each | {"conversation": one.id} for one in mine for each in list(one.life.compactions)]
    return sorted(found, key=lambda each: float(each["at"]))[-COMPACTIONS:]
