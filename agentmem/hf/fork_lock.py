"""Locks that are free in a forked process."""

from __future__ import annotations

import os
import threading


def fork_lock() -> threading.Lock:
    """Return a lock that ``os.fork`` takes first and that both processes release.

    In a forked process the thread that held it would be missing, and what it guards would be half changed.
    """
    lock = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
