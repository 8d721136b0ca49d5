"""Whose forwards a memory takes: one thread's at a time."""

from __future__ import annotations

import threading
from weakref import ref

from agentmem.errors import UnsupportedGeneration


class Hold:
    """That a thread owns a memory, for as long as anybody keeps this."""

    def __init__(self) -> None:
        """The current thread."""
        self.thread = threading.current_thread()


class Owner:
    """The thread that runs a memory now. Nothing has to be given back: an interrupt cannot leave it owned."""

    def __init__(self) -> None:
        """Nobody's."""
        self._guard = threading.RLock()
        self._hold: ref[Hold] | None = None

    def take(self) -> Hold:
        """Own the memory while the result is kept; a thread that owns it already may take it again.

        Raises:
            UnsupportedGeneration: another thread owns it.

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
