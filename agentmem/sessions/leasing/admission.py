"""One cap for many sessions: who holds what, who is preempted, who waits. Integers only, no tensors.

Fairness. Leases are granted in the order in which they were asked for: while somebody waits, nobody who asks later is
served first (a call that cannot wait is refused then). A session keeps its lease until its turn is over; then, and only
when somebody needs the bytes, idle memories are preempted, the longest idle first. Turns that run at once take forwards
in turns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.errors import RuntimeBusy
from agentmem.settings import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agentmem.sessions.leasing.holding import Holding, Stage


class Leases:
    """The bytes of one cap, charged to holdings."""

    def __init__(self, cap: int, pressure: Sequence[Stage]) -> None:
        """``pressure`` are the stages by which idle holdings are preempted, in order."""
        self.cap, self.pressure = cap, tuple(pressure)
        self.holdings: list[Holding] = []
        self.faults: list[str] = []
        """Why idle holdings were not preempted at the last request for bytes."""

    @property
    def charged(self) -> int:
        """Bytes that are charged now."""
        return sum(holding.charged for holding in list(self.holdings))

    @property
    def left(self) -> int:
        """Bytes that are charged to nobody."""
        return self.cap - self.charged

    def by_kind(self, running: set[int]) -> dict[str, int]:
        """What is charged, as :class:`agentmem.sessions.RuntimeStats` has it; ``running`` are ids of holdings."""
        found = dict.fromkeys(("running_bytes", "running_room_bytes", "idle_bytes", "idle_room_bytes"), 0)
        for holding in list(self.holdings):
            charged, kind = holding.charged, "running" if id(holding) in running else "idle"
            held = min(charged, holding.resident)  # another thread may change it in between
            found[f"{kind}_bytes"] += held
            found[f"{kind}_room_bytes"] += charged - held
        return {"charged_bytes": sum(found.values()), **found}

    def free(
        self, needed: int, may_yield: Callable[[Holding], bool], preempt: Callable[[Holding, Stage], None]
    ) -> bool:
        """Have holdings that may be preempted until ``needed`` bytes are free; whether they are then.

        Nobody is preempted for nothing: where all of it would not be enough, all is left as it is.
        """
        self.faults = []
        idle = sorted(filter(may_yield, self.holdings), key=lambda each: each.used)
        if self.left + sum(holding.charged for holding in idle) < needed:
            return False
        for stage in self.pressure:
            for holding in idle:
                if self.left >= needed:
                    return True
                preempt(holding, stage)
        return self.left >= needed

    def refusal(self, name: str, needed: int, active: int, waiting: int) -> RuntimeBusy:
        """Why a session cannot have its lease."""
        why = (
            f"{waiting} turn(s) wait for it already and come first"
            if waiting
            else f"{active} session(s) are in mid-turn and idle ones cannot be preempted further"
        )
        return RuntimeBusy(
            f"session {name!r} needs {format_bytes(needed)} ({needed} bytes), and {self.charged} of the runtime's cap "
            f"of {self.cap} are charged: {why}{'' if waiting else self.stuck}; wait for a turn to end (stream waits by "
            "itself), give sessions smaller shares, or raise cap"
        )

    @property
    def stuck(self) -> str:
        """The first reason why an idle holding was not preempted at the last request for bytes, in brackets."""
        return f" ({self.faults[0]})" if self.faults else ""
