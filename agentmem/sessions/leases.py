"""One cap for many sessions: who holds what, who gives way, who waits. Integers only, no tensors.

Fairness. Leases are granted in the order in which they were asked for: while somebody waits, nobody who asks later is
served first. A session keeps its lease until its turn is over; then, and only when somebody needs the bytes, idle
memories give way, the longest idle first. Turns that run at once take forwards in turns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.errors import RuntimeBusy
from agentmem.settings import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from agentmem.sessions.holding import Holding, Stage


class Leases:
    """The bytes of one cap, charged to holdings."""

    def __init__(self, cap: int, pressure: Sequence[Stage]) -> None:
        """``pressure`` are the stages by which idle holdings give way, in order."""
        self.cap, self.pressure = cap, tuple(pressure)
        self.holdings: list[Holding] = []

    @property
    def charged(self) -> int:
        """Bytes that are charged now."""
        return sum(holding.charged for holding in self.holdings)

    def free(
        self,
        needed: int,
        protected: Collection[Holding],
        active: Callable[[Holding], bool],
        give_way: Callable[[Holding, Stage], None],
    ) -> bool:
        """Have idle holdings give way until ``needed`` bytes are free; whether they are then."""
        for stage in (None, *self.pressure):
            for holding in sorted(self.holdings, key=lambda each: each.used):
                if self.cap - self.charged >= needed:
                    return True
                if stage is not None and holding.charged and holding not in protected and not active(holding):
                    give_way(holding, stage)
        return self.cap - self.charged >= needed

    def refusal(self, name: str, needed: int, active: int) -> RuntimeBusy:
        """Why a session cannot have its lease."""
        return RuntimeBusy(
            f"session {name!r} needs {format_bytes(needed)} ({needed} bytes), and {self.charged} of the runtime's cap "
            f"of {self.cap} are charged: {active} session(s) are in mid-turn and idle ones cannot give way further; "
            "wait for a turn to end (stream waits by itself), give sessions smaller shares, or raise cap"
        )
