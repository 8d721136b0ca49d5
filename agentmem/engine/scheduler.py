"""Who is fed next: turns of one model ask for forwards, and one of them feeds all that are waiting.

There is no thread of its own. A turn that waits looks by itself whether it is time; the first that finds it is takes
the model's lock, feeds everybody (:func:`agentmem.engine.feeding.feed`), and the others find their outcomes.

Order: turns that were passed over :data:`PATIENCE` times, then higher priorities, then single tokens (replies) before
texts that are read, then in the order of their requests. A forward takes single tokens first and fills up with pieces
of texts, as many tokens as every one of its turns allows (``most``); a turn that is alone is fed whole. A forward waits
for turns that the last one fed and for those that have begun, so that turns of the same speed stay together; but when
none has come for :data:`LINGER` seconds, or :data:`SHARE` of the last forward's, it feeds those that are there.
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
"""Seconds that a forward waits at least for turns of the last one after anybody came."""
SHARE = 0.1
"""What part of the last forward's time it waits for them otherwise."""
PATIENCE = 4
"""Forwards that may pass a turn over before it comes first."""


class Forward(NamedTuple):
    """What a forward fed, and how long it took."""

    seconds: float
    sequences: int
    tokens: int


class Figures(NamedTuple):
    """The newest forwards and compactions in numbers; zeros where there were none."""

    waiting: int
    """Turns that wait to be fed."""
    sequences: float
    """That a forward fed, on average."""
    tokens_per_second: float
    """Fed, read and written ones together, while forwards ran."""
    pauses: tuple[float, float, float]
    """Seconds that a compaction kept everybody waiting: median, 95th percentile, most."""
    fed: int
    """Tokens of all forwards so far."""


class Scheduler:
    """The turns of one model that wait to be fed. ``lock`` is held while the model computes or memories move."""

    def __init__(self) -> None:
        """Nobody waits."""
        self.lock = threading.RLock()
        self.recent: deque[Forward] = deque(maxlen=64)
        """The newest forwards."""
        self._fed = 0
        self._pauses: deque[float] = deque(maxlen=256)
        """Seconds of the newest compactions."""
        self._changed = threading.Condition()
        self._waiting: list[Want] = []
        self._expected: set[object] = set()
        """Turns that have begun, or that the last forward fed, and that have not come (back) yet."""
        self._came = 0.0

    def expect(self, turn: object) -> None:
        """A turn has begun, and will soon have something to be fed: the next forward waits for it for a moment."""
        with self._changed:
            self._expected.add(turn)
            self._came = time.monotonic()

    def submit(self, want: Want) -> None:
        """Have a want wait; whoever does so waits for its outcome, or withdraws it."""
        with self._changed:
            self._waiting.append(want)
            self._arrived(want.turn)

    def withdraw(self, want: Want) -> None:
        """Take a want back; when this returns it is being fed no more, and never will be."""
        with self.lock, self._changed, suppress(ValueError):
            self._waiting.remove(want)

    def left(self, turn: object) -> None:
        """A turn has ended, or will not come back soon: nobody waits for it."""
        with self._changed:
            if turn in self._expected:
                self._arrived(turn)
            waiting = list(self._waiting)
        _wake(waiting)

    def serve(self, want: Want) -> None:
        """Wait for the outcome of a want, and feed everybody whenever it is time."""
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
        """Seconds to wait before the next forward, for turns that the last one fed; 0 when it is time."""
        with self._changed:
            if not self._expected:
                return 0.0
            linger = max([LINGER, *(SHARE * each.seconds for each in list(self.recent)[-1:])])
            return max(0.0, self._came + linger - time.monotonic())

    def step(self, want: Want) -> None:
        """Run a forward on this thread, unless the want has its outcome by then, or it is not yet time."""
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
        """A compaction kept everybody waiting for so long."""
        with self._changed:
            self._pauses.append(seconds)

    def figures(self) -> Figures:
        """The newest forwards and compactions in numbers."""
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
        """Whose tokens the next forward feeds, and how many of each; all agree with ``own`` in torch's state."""
        with self._changed:
            self._expected = set()  # who has not come by now is not waited for again
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
        """Note who was fed; those are expected back."""
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
        """In a forked child: whoever waited is the parent's."""
        self._changed = threading.Condition()
        self._waiting, self._expected = [], set()


def _place(want: Want) -> tuple[Any, ...]:
    return (want.passed < PATIENCE, -want.priority, len(want.ids) > 1)


def _wake(wants: Iterable[Want]) -> None:
    for want in wants:
        want.wake()
