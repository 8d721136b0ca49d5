"""The ledger of a memory, which checks before every allocation that resident plus temporary bytes fit under the cap."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from agentmem.errors import MemoryCapExceeded
from agentmem.settings import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Ledger:
    """Counts of resident bytes (R) and temporary bytes (T) under one cap. The ledger holds no tensors.

    A *holder* is an object, such as the store of a layer, that holds resident bytes under an entry of its own; R is the
    sum of all entries. One dict operation adds or removes an entry, so that after an interrupt an entry is present or
    absent, never partial. An interrupt can leave temporary bytes counted that are no longer in use, or the entry of a
    holder that is no longer in use; :meth:`recover` removes both.
    """

    def __init__(self, cap: int) -> None:
        """Open an empty ledger with a cap of ``cap`` bytes."""
        self.cap = cap
        self.transient = 0
        self.peak = 0
        self._mark = 0
        self._outside = False
        self._held: dict[int, int] = {}
        """Resident bytes of each holder, by ``id(holder)``."""

    @property
    def resident(self) -> int:
        """Resident bytes (R): the sum over all holders."""
        return sum(self._held.values())

    def hold(self, holder: object, count: int, what: str) -> None:
        """Add ``count`` resident bytes, held by ``holder``. Call this method before the bytes are allocated.

        Raises:
            MemoryCapExceeded: resident plus temporary bytes would exceed the cap; nothing was added.

        """
        self._note(self._checked(count, what))
        self._held[id(holder)] = count

    def release(self, holder: object) -> None:
        """Remove the bytes of ``holder`` after its tensors were dropped; a second call does nothing."""
        self._held.pop(id(holder), None)

    def recover(self, holders: Iterable[object]) -> None:
        """Set temporary bytes to 0 and remove all entries but those of ``holders``, in case an interrupt left others.

        Call this method before a forward or compaction begins, when no temporary bytes are in use.
        """
        self.transient, self._outside = 0, False
        if len(self._held) != len(kept := set(map(id, holders))):
            self._held = {holder: count for holder, count in self._held.items() if holder in kept}

    def touch(self, count: int, what: str) -> None:
        """Count ``count`` temporary bytes that are freed before anything else is allocated.

        Raises:
            MemoryCapExceeded: resident plus temporary bytes would exceed the cap.

        """
        if self._outside:
            return
        self._note(self._checked(count, what))

    @contextmanager
    def borrow(self, count: int, what: str) -> Iterator[None]:
        """Count ``count`` temporary bytes while the ``with`` block runs.

        Raises:
            MemoryCapExceeded: resident plus temporary bytes would exceed the cap.

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
        """Do not count temporary bytes inside the ``with`` block (for an oracle); resident bytes still count."""
        self._outside = True
        try:
            yield
        finally:
            self._outside = False

    @contextmanager
    def watch(self) -> Iterator[list[int]]:
        """Measure the peak of resident plus temporary bytes in the ``with`` block.

        The peak is appended to the yielded list when the block ends.
        """
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
        """Return resident plus temporary bytes with ``count`` bytes added; raise if they exceed the cap."""
        after = self.resident + self.transient + count
        if after > self.cap:
            raise MemoryCapExceeded(
                f"{what} needs {format_bytes(count)} ({count} bytes) on top of {self.resident + self.transient}, which "
                f"makes {after} of a cap of {self.cap} bytes; raise the cap, lower chunk, or choose a policy "
                "that compacts"
            )
        return after
