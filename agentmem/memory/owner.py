"""Ownership of a memory: only one thread at a time may run it."""

from __future__ import annotations

import threading
from weakref import ref

from agentmem.errors import UnsupportedGeneration


class Hold:
    """A thread's ownership of a memory, which ends when no reference to this object is left."""

    def __init__(self) -> None:
        """Make the current thread the owner."""
        self.thread = threading.current_thread()


class Owner:
    """The record of which thread may run a memory now.

    Ownership ends when the owner's :class:`Hold` is garbage-collected, so an interrupt cannot leave a memory owned.
    """

    def __init__(self) -> None:
        """Create a record without an owner."""
        self._guard = threading.RLock()
        self._hold: ref[Hold] | None = None

    def take(self) -> Hold:
        """Make the current thread the owner, for as long as it keeps the returned object.

        The owner may call this method again and gets the same object.

        Raises:
            UnsupportedGeneration: another thread owns the memory.

        """
        with self._guard:
            hold = None if self._hold is None else self._hold()
            if hold is None or not hold.thread.is_alive():
                hold = Hold()
                self._hold = ref(hold)
            elif hold.thread is not threading.current_thread():
                raise UnsupportedGeneration(
                    f"this memory is in use by thread {hold.thread.name!r}, and one thread at a time may run it; wait "
                    "for that generate or forward to end, or open a memory for each thread (agentmem.capped)"
                )
            return hold
