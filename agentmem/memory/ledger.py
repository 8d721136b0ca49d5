"""The running account of a memory: R + T ≤ cap, checked before every allocation, never after."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from agentmem.errors import MemoryCapExceeded
from agentmem.settings import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Ledger:
    """Bytes held (R) and borrowed (T) under one cap. Integers only; the tensors live elsewhere.

    R is the sum over holders, each entered and struck out by one store: an interrupt finds an entry made or not made.
    What an interrupt leaves (a loan without an end, an entry of a holder that nobody uses) :meth:`recover` takes back.
    """

    def __init__(self, cap: int) -> None:
        """Open an account of ``cap`` bytes."""
        self.cap = cap
        self.transient = 0
        self.peak = 0
        self._mark = 0
        self._outside = False
        self._held: dict[int, int] = {}
        """Bytes by the identity of who holds them."""

    @property
    def resident(self) -> int:
        """R: bytes that are held."""
        return sum(self._held.values())

    def hold(self, holder: object, count: int, what: str) -> None:
        """Add ``count`` bytes to R, held by ``holder``. Call it before the allocation.

        Raises:
            MemoryCapExceeded: R + T would cross the cap; nothing was added.

        """
        self._note(self._checked(count, what))
        self._held[id(holder)] = count

    def release(self, holder: object) -> None:
        """Take what ``holder`` holds off R, after the tensors were dropped; doing so twice does nothing."""
        self._held.pop(id(holder), None)

    def recover(self, holders: Iterable[object]) -> None:
        """Nothing is borrowed, and nobody but ``holders`` holds anything: true before each forward or compaction."""
        self.transient, self._outside = 0, False
        if len(self._held) != len(kept := set(map(id, holders))):
            self._held = {holder: count for holder, count in self._held.items() if holder in kept}

    def touch(self, count: int, what: str) -> None:
        """Count ``count`` bytes in T for an instant: for scratch that is gone before anything else is allocated.

        Raises:
            MemoryCapExceeded: R + T would cross the cap.

        """
        if self._outside:
            return
        self._note(self._checked(count, what))

    @contextmanager
    def borrow(self, count: int, what: str) -> Iterator[None]:
        """Count ``count`` bytes in T while the block runs.

        Raises:
            MemoryCapExceeded: R + T would cross the cap.

        """
        count = 0 if self._outside else count
        self._note(self._checked(count, what))
        before = self.transient
        try:
            self.transient = before + count
            yield
        finally:
            self.transient = before

    @contextmanager
    def outside(self) -> Iterator[None]:
        """What is borrowed or touched in the block is outside the cap (an oracle's work); what is held is not."""
        self._outside = True
        try:
            yield
        finally:
            self._outside = False

    @contextmanager
    def watch(self) -> Iterator[list[int]]:
        """Collect the peak of R + T inside the block; the list holds it when the block ends."""
        outer, self._mark = self._mark, self.resident + self.transient
        result: list[int] = []
        try:
            yield result
        finally:
            result.append(self._mark)
            self._mark = max(outer, self._mark)

    def _note(self, now: int) -> None:
        self.peak = max(self.peak, now)
        self._mark = max(self._mark, now)

    def _checked(self, count: int, what: str) -> int:
        """R + T with ``count`` bytes more, which fit under the cap."""
        after = self.resident + self.transient + count
        if after > self.cap:
            raise MemoryCapExceeded(
                f"{what} needs {format_bytes(count)} ({count} bytes) on top of {self.resident + self.transient}, which "
                f"makes {after} of a cap of {self.cap} bytes; raise the cap, lower chunk, or choose a policy "
                "that compacts"
            )
        return after
