"""Figures of a memory that another thread moves to disk while they are read."""

from __future__ import annotations

from typing import Any

import pytest

from agentmem.serving.dashboard.life import Life
from agentmem.sessions.leasing.holding import Holding
from support import tiny_chat


class Leaving(Holding):
    """A holding whose memory is there for so many more reads, and then on disk."""

    reads = 0

    @property
    def memory(self) -> Any:
        """Count the read."""
        Leaving.reads -= 1
        return self.__dict__["memory"] if Leaving.reads >= 0 else None


@pytest.mark.parametrize("reads", range(16))
def test_figures_can_be_read_while_the_memory_moves_to_disk(reads: int) -> None:
    """Wherever it leaves: a session's and a runtime's figures are given, old or new ones."""
    with tiny_chat.runtime(1) as made:
        session, life = tiny_chat.filled(made, 20), Life()
        session.holding.__class__ = Leaving
        for look in (lambda: session.stats, lambda: made.stats, lambda: life.look(session)):
            Leaving.reads = reads
            assert look() is None or look().model_dump()
        session.holding.__class__ = Holding
