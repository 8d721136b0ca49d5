"""Define the record of one scored answer of a task, with the bytes, seconds and tokens that it took."""

from __future__ import annotations

from agentmem.evaluation.terms import Frozen


class Attempt(Frozen):
    """Hold the score of one sample in one epoch, and the bytes, seconds and tokens of its answer."""

    sample: str
    epoch: int
    score: float
    """1 for right, 0 for wrong, or a number between them for partly right."""
    fresh: bool
    """True if a memory was opened for this sample; later questions about a shared context use the open memory."""
    compactions: int
    """Compactions of the sample's memory so far."""
    bytes: int
    """Peak of resident and temporary bytes of the sample's memory so far."""
    seconds: float
    compact_seconds: float
    """Seconds spent compacting; like ``seconds``, counted for this attempt alone."""
    tokens_read: int
    tokens_generated: int
    forced: bool
    """True if an answer was forced because reasoning had not ended."""
