"""The scheduler of one model: it decides which turns are fed next, several of them in one forward.

A turn is one use of a session, whose memory reads a prompt and may generate a reply. The scheduler has no thread of its
own: every waiting turn checks whether it is time for a forward. The first turn to find that it is time takes the
model's lock and runs a forward for all chosen turns (:func:`agentmem.engine.feeding.feed`). The other turns then find
their outcomes.

Turns are ordered by these rules; each rule decides only between turns that are equal by the rules before it. Turns
that were passed over :data:`PATIENCE` times come first. Higher priority comes first. Single tokens (replies) come
before longer texts. Earlier requests come first.

A forward takes tokens in this order. Each waiting turn limits how many tokens the whole forward may have
(``Want.most``), and the smallest of these limits applies. If only one turn waits, or if the first turn must be fed
alone, no limit applies: the forward takes all tokens of that turn.

A forward first waits for the turns that the last forward fed and for turns that have just begun, so that turns of equal
speed stay together. The wait ends when no turn has come for a certain time: :data:`LINGER` seconds, or the fraction
:data:`SHARE` of the last forward's time if that is longer.
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
"""The least number of seconds for which a forward waits for expected turns after the last turn has come."""
SHARE = 0.1
"""The fraction of the last forward's time for which a forward waits, if this is longer than :data:`LINGER`."""
PATIENCE = 4
"""How many forwards may pass a turn over before the turn comes first."""


class Forward(NamedTuple):
    """The duration of one forward, and how many sequences and tokens it fed."""

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
    """The scheduler of one model, which keeps the waiting turns and feeds several of them in one forward.

    A turn submits its request to feed tokens as a :class:`Want`. Hold ``lock`` while you run the model or change
    memories.
    """

    def __init__(self) -> None:
        """Create a scheduler without waiting turns."""
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
        """Note that a turn has begun and will soon submit tokens, so that the next forward waits briefly for it."""
        with self._changed:
            self._expected.add(turn)
            self._came = time.monotonic()

    def submit(self, want: Want) -> None:
        """Add ``want`` to the waiting requests; the caller must then wait for its outcome, or withdraw it."""
        with self._changed:
            self._waiting.append(want)
            self._arrived(want.turn)

    def withdraw(self, want: Want) -> None:
        """Wait until no forward runs, then remove ``want`` from the waiting requests, so that it is not fed."""
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
        """Submit a request to feed tokens, and return when its outcome is set.

        Until then, the thread waits. When the next forward is due, any waiting thread may run it. The forward feeds all
        turns that the scheduler chooses by the rules of this module, so this thread may also feed other turns.
        """
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
        """Return how many more seconds the next forward should wait for expected turns; 0 if the forward is due."""
        with self._changed:
            if not self._expected:
                return 0.0
            linger = max([LINGER, *(SHARE * each.seconds for each in list(self.recent)[-1:])])
            return max(0.0, self._came + linger - time.monotonic())

    def step(self, want: Want) -> None:
        """Run one forward in the calling thread if it is due; the forward feeds tokens of the waiting turns.

        A forward is not due while the scheduler waits for turns that will soon submit tokens; see :meth:`pause`. The
        thread first waits for the lock, which other threads hold while they run forwards. If one of these forwards has
        served the request ``want``, this thread runs nothing.
        """
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
        """Record for the statistics that a compaction made all turns wait for ``seconds``."""
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
        """Choose the requests that the next forward feeds, and how many tokens it feeds of each.

        A request to feed tokens is a :class:`Want`. Returns pairs of a request and a number of tokens: the forward
        feeds that many of the request's first tokens. Only requests with the same thread settings as ``own`` are
        chosen; see :func:`agentmem.engine.feeding.ambient`.
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
        """Record a finished forward; from now on, only requests without an outcome still wait.

        ``shares`` has the requests that the forward was to feed, each with its number of tokens. ``began`` is the time
        at which the forward began. The turns that were fed will probably submit more tokens soon. They are noted as
        expected turns, so that the next forward waits briefly for them. For each request that still waits,
        ``Want.passed`` increases by 1.
        """
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
        """Drop all waiting turns; called in a forked child process, because the turns belong to the parent process."""
        self._changed = threading.Condition()
        self._waiting, self._expected = [], set()


def _place(want: Want) -> tuple[Any, ...]:
    return (want.passed < PATIENCE, -want.priority, len(want.ids) > 1)


def _wake(wants: Iterable[Want]) -> None:
    for want in wants:
        want.wake()
