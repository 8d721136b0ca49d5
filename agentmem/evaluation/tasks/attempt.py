"""Define the record of one scored answer in a task, with the bytes, seconds and tokens that the answer took."""

from __future__ import annotations

from agentmem.evaluation.terms import Frozen


class Attempt(Frozen):
    """The score of one sample in one epoch, with the bytes, seconds and tokens that the answer took."""

    sample: str
    epoch: int
    score: float
    """1 for right, 0 for wrong, or a number between them for partly right."""
    fresh: bool
    """True if a memory was opened for this sample; False if it used the open memory of a shared context."""
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
