"""The scheduler decides which turns of one model are fed next, several of them in one forward.

The scheduler has no thread of its own. Every waiting turn checks whether it is time for a forward. The first turn that
finds that it is time takes the model's lock and runs a forward for all chosen turns
(:func:`agentmem.engine.feeding.feed`); the other turns then find their outcomes.

Order: first turns that were passed over :data:`PATIENCE` times, then turns of higher priority, then single tokens
(replies) before longer texts, then the order of requests. A forward takes tokens in this order, up to the smallest
limit (``most``) of the waiting turns. If only one turn waits, or if the first turn must be fed alone, a forward takes
all tokens of that turn.

A forward first waits for the turns that the last forward fed and for turns that have just begun, so that turns of equal
speed stay together. It stops waiting when no turn has come for :data:`LINGER` seconds or for the fraction :data:`SHARE`
of the last forward's time, whichever is longer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from agentmem.engine.feeding import feed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agentmem.engine.feeding import Want

LINGER = 0.004
"""The least number of seconds, counted from the last arrival, for which a forward waits for expected turns."""
SHARE = 0.1
"""The fraction of the last forward's time for which a forward waits, if this is longer than :data:`LINGER`."""
PATIENCE = 4
"""How many forwards may pass a turn over before the turn comes first."""


class Forward(NamedTuple):
    """The figures of one forward: its time, and how many sequences and tokens it fed."""

    seconds: float
    sequences: int
    tokens: int


class Figures(NamedTuple):
    """Statistics of the newest forwards and compactions; zeros if there were none."""

    waiting: int
    """The number of turns that wait to be fed."""
    sequences: float
    """The average number of sequences per forward."""
    tokens_per_second: float
    """Tokens fed per second of forward time; prompts and replies are counted together."""
    pauses: tuple[float, float, float]
    """Seconds for which a compaction made all turns wait: median, 95th percentile, maximum."""
    fed: int
    """The number of tokens fed in all forwards so far."""


class Scheduler:
    """The turns of one model that wait to be fed.

    A thread holds ``lock`` while it runs the model or changes memories.
    """

    def __init__(self) -> None:
        """Begin with no waiting turns."""
        self.lock = threading.RLock()
        self.recent: deque[Forward] = deque(maxlen=64)
        """The newest forwards."""
        self._fed = 0
        self._pauses: deque[float] = deque(maxlen=256)
        """Seconds of the newest compactions."""
        self._changed = threading.Condition()
        self._waiting: list[Want] = []
        self._expected: set[object] = set()
        """Turns that have begun, or were fed by the last forward, and have not submitted their next tokens yet."""
        self._came = 0.0

    def expect(self, turn: object) -> None:
        """Note that a turn has begun and will soon submit tokens: the next forward waits for it for a moment."""
        with self._changed:
            self._expected.add(turn)
            self._came = time.monotonic()

    def submit(self, want: Want) -> None:
        """Add a want to the waiting ones; the caller must then wait for its outcome, or withdraw it."""
        with self._changed:
            self._waiting.append(want)
            self._arrived(want.turn)

    def withdraw(self, want: Want) -> None:
        """Wait until no forward is running, then remove a want, so that its tokens are not fed any more."""
        with self.lock, self._changed, suppress(ValueError):
            self._waiting.remove(want)

    def left(self, turn: object) -> None:
        """Note that a turn has ended or will not submit tokens soon, so that forwards do not wait for it."""
        with self._changed:
            if turn in self._expected:
                self._arrived(turn)
            waiting = list(self._waiting)
        _wake(waiting)

    def serve(self, want: Want) -> None:
        """Submit a want and wait for its outcome; run forwards for all waiting turns whenever it is time."""
        self.submit(want)
        while not want.done:
            pause = self.pause()
            if pause > 0:
                with self._changed:
                    if not want.done:
                        self._changed.wait(pause)
            else:
                self.step(want)

    def pause(self) -> float:
        """Return how many seconds the next forward should wait for expected turns; 0 if it is time to run it."""
        with self._changed:
            if not self._expected:
                return 0.0
            linger = max([LINGER, *(SHARE * each.seconds for each in list(self.recent)[-1:])])
            return max(0.0, self._came + linger - time.monotonic())

    def step(self, want: Want) -> None:
        """Take the lock and run a forward on this thread, unless the want has its outcome or it is not yet time."""
        with self.lock:
            if want.done or self.pause() > 0:
                return
            shares = self._chosen(want)
            began = time.monotonic()
            try:
                feed(shares)
            finally:
                self._ended(shares, began)

    def paused(self, seconds: float) -> None:
        """Note that a compaction made all turns wait for ``seconds``."""
        with self._changed:
            self._pauses.append(seconds)

    def figures(self) -> Figures:
        """Return statistics of the newest forwards and compactions."""
        with self._changed:
            recent, pauses, waiting = list(self.recent), sorted(self._pauses), len(self._waiting)
        seconds = sum(each.seconds for each in recent)
        return Figures(
            waiting,
            sum(each.sequences for each in recent) / max(1, len(recent)),
            sum(each.tokens for each in recent) / seconds if seconds else 0.0,
            tuple(pauses[int(part * (len(pauses) - 1))] if pauses else 0.0 for part in (0.5, 0.95, 1.0)),  # type: ignore[arg-type]  # three
            self._fed,
        )

    # ---- choosing

    def _chosen(self, own: Want) -> list[tuple[Want, int]]:
        """Return the wants that the next forward feeds, and how many tokens of each.

        All of them have the same ambient state (see :func:`agentmem.engine.feeding.ambient`) as ``own``.
        """
        with self._changed:
            self._expected = set()  # turns that have not come by now are not waited for again
            alike = [each for each in self._waiting if each.ambient == own.ambient and not each.done]
        order = sorted(alike, key=_place)  # stable: in the order of their requests
        if order[0].alone or len(order) == 1:
            return [(order[0], len(order[0].ids))]
        chosen: list[tuple[Want, int]] = []
        left = min(each.most for each in order)
        for want in order:
            count = min(len(want.ids), left)
            if count and not want.alone:
                chosen.append((want, count))
                left -= count
        return chosen

    def _ended(self, shares: Iterable[tuple[Want, int]], began: float) -> None:
        """Record a finished forward; the turns that it fed are expected to submit more tokens."""
        fed = [(want, count) for want, count in shares if want.done]
        now = time.monotonic()
        with self._changed:
            if fed:
                self.recent.append(Forward(now - began, len(fed), sum(count for _, count in fed)))
                self._fed += self.recent[-1].tokens
            self._waiting = [each for each in self._waiting if not each.done]  # at once: an interrupt may come
            for want in self._waiting:
                want.passed += 1
            self._expected = self._expected.union(want.turn for want, _ in fed)
            self._came = now
            waiting = list(self._waiting)
            self._changed.notify_all()
        _wake([*(want for want, _ in fed), *waiting])

    def _arrived(self, turn: object) -> None:
        self._expected.discard(turn)
        self._came = time.monotonic()
        self._changed.notify_all()

    # ---- forked processes

    def forget(self) -> None:
        """Drop all waiting turns; called in a forked child process, where they belong to the parent."""
        self._changed = threading.Condition()
        self._waiting, self._expected = [], set()


def _place(want: Want) -> tuple[Any, ...]:
    return (want.passed < PATIENCE, -want.priority, len(want.ids) > 1)


def _wake(wants: Iterable[Want]) -> None:
    for want in wants:
        want.wake()
