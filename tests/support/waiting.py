"""Waiting for what must come. The limit only ends a test that would hang: no machine is as slow as that."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

LIMIT = 120.0
"""Seconds; less than pytest's ``faulthandler_timeout``."""


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, and let the event loop run meanwhile."""
    async with asyncio.timeout(LIMIT):
        while not holds():  # noqa: ASYNC110  # what is looked at knows no loop
            await asyncio.sleep(0.001)


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that another thread or process brings about."""
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def join(*threads: threading.Thread) -> None:
    """Wait until threads have ended."""
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), thread
