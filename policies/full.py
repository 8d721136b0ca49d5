"""Full: a policy that never compacts, so that the memory raises ``MemoryCapExceeded`` when its cap is reached."""

from __future__ import annotations

from agentmem.contracts import Policy


def full() -> Policy:
    """Keep every slot; the memory raises an error when it would exceed its cap."""
    return Policy(name="full", summary="never compacts; the cap is an error", source="-", compactor=None)
