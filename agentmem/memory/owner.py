"""Ownership of a memory: only one thread at a time may run it."""

from __future__ import annotations

import threading
from weakref import ref

from agentmem.errors import UnsupportedGeneration


class Hold:
    """A thread's ownership of a memory, which ends when no reference to this object is left.

    In ``with owner.take():`` the ``with`` block has the only reference. A variable would be another one, which a stored
    traceback of an error keeps.
    """

    def __init__(self) -> None:
        """Make the current thread the owner."""
        self.thread = threading.current_thread()

    def __enter__(self) -> None:
        """Do nothing: the thread is the owner already."""

    def __exit__(self, *_: object) -> None:
        """Do nothing: the ``with`` block drops its reference."""


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
            if hold.thread is threading.current_thread():
                return hold
            name = hold.thread.name
            del hold  # else the traceback of this refusal would keep the other thread the owner
        raise UnsupportedGeneration(
            f"this memory is in use by thread {name!r}, and one thread at a time may run it; wait for its generate, "
            "forward, compact or peek to end, or open a memory for each thread (agentmem.capped)"
        )
