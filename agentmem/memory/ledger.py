"""The ledger of a memory, which checks before every allocation that resident plus temporary bytes fit under the cap."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from agentmem.errors import MemoryCapExceeded
from agentmem.settings import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Ledger:
    """The counts of resident bytes (R) and temporary bytes (T) under one cap. The ledger holds no tensors.

    A *holder* is an object that holds resident bytes, such as the store of a layer. Each holder has one entry, and R is
    the sum of all entries. One dict operation adds or removes an entry, so an interrupt never leaves a partial entry.
    After an interrupt, the ledger may still count temporary bytes that are no longer in use, or a holder that no longer
    exists. :meth:`recover` removes such counts.
    """

    def __init__(self, cap: int) -> None:
        """Create an empty ledger with a cap of ``cap`` bytes."""
        self.cap = cap
        self.transient = 0
        self.peak = 0
        self._mark = 0
        self._outside = False
        self._held: dict[int, int] = {}
        """Resident bytes of each holder, by ``id(holder)``."""

    @property
    def resident(self) -> int:
        """The resident bytes (R) of all holders together."""
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
        """Remove counts that an interrupt left: all temporary bytes, and the entries of all but the given holders.

        Call this method before a forward or compaction begins, when no temporary bytes are in use.
        """
        self.transient, self._outside = 0, False
        if len(self._held) != len(kept := set(map(id, holders))):
            self._held = {holder: count for holder, count in self._held.items() if holder in kept}

    def touch(self, count: int, what: str) -> None:
        """Check that ``count`` temporary bytes fit, and include them in the peak, but do not keep them counted.

        Use this for bytes that are freed before anything else is allocated; otherwise use :meth:`borrow`.

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
        """Ignore temporary bytes inside the ``with`` block; resident bytes still count.

        This is for policies that get their reference queries from an oracle. The cap does not bound the memory of the
        oracle.
        """
        self._outside = True
        try:
            yield
        finally:
            self._outside = False

    @contextmanager
    def watch(self) -> Iterator[list[int]]:
        """Measure the peak of resident plus temporary bytes (R + T) in the ``with`` block.

        The block receives an empty list, to which the peak in bytes is appended when the block ends.
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
                f"{what} needs {exact_bytes(count)} on top of {exact_bytes(self.resident + self.transient)}, which "
                f"makes {exact_bytes(after)} of a cap of {exact_bytes(self.cap)}; raise the cap, lower chunk, or "
                "choose a policy that compacts"
            )
        return after
