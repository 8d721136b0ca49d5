"""One answer of a task under a cap, scored, with what it took."""

from __future__ import annotations

from agentmem.evaluation.terms import Frozen


class Attempt(Frozen):
    """One sample in one epoch."""

    sample: str
    epoch: int
    score: float
    """1 for right, 0 for wrong, or a share."""
    fresh: bool
    """Whether its memory was made for it; later questions behind a shared context are asked of the first one's."""
    compactions: int
    """Of its memory so far."""
    bytes: int
    """The most that R + T came to in its memory."""
    seconds: float
    compact_seconds: float
    """Spent for this attempt alone."""
    tokens_read: int
    tokens_generated: int
    forced: bool
