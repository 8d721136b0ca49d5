"""Forwards without a model, for engines whose memory is fed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from agentmem.engine import Engine
from agentmem.memory.forwards import Adopt, Packed, Scratch, Transient
from agentmem.memory.memory import Memory

Run = Callable[[Sequence[int], int, Adopt | Transient], None]


class Forwards:
    """What is run is a function of the test's; without one, and for logits, a forward fails."""

    def __init__(self, run: Run | None = None) -> None:
        """Use ``run`` for the decoder's forwards."""
        self._run = run

    def check(self) -> None:
        """It can always be run."""

    def run(self, ids: Sequence[int], start: int, step: Adopt | Transient) -> None:
        """The decoder's forward."""
        assert self._run is not None
        self._run(ids, start, step)

    def next_logits(self, ids: Sequence[int], start: int, step: Scratch) -> torch.Tensor:
        """There are none."""
        raise NotImplementedError

    def logits(self, ids: Sequence[int], start: int, step: Transient) -> torch.Tensor:
        """There are none."""
        raise NotImplementedError

    def packed(self, ids: Sequence[int], positions: Sequence[int], ends: Sequence[int], step: Packed) -> torch.Tensor:
        """There are none."""
        raise NotImplementedError


def engine(memory: Memory, run: Run | None = None) -> Engine:
    """An engine that runs a memory without a model."""
    return Engine(memory, Forwards(run))
