"""Accounting of one cap for many sessions: counting the bytes charged to each, and choosing idle memories to preempt.

The bytes charged to a session are those that the runtime reserves for its memory under the cap. To preempt a memory
means to take bytes from it while its sessions are idle. This module works with integers only, not with tensors.

Fairness: leases are granted in the order in which they were asked for. While a turn waits for its lease, no later turn
gets a lease before it, and a call that cannot wait is refused (:mod:`agentmem.sessions.leasing.queue`). A session keeps
its lease until its turn is over; an elastic lease becomes smaller if another turn waits for bytes
(:func:`agentmem.sessions.leasing.swapping.part`). Idle memories are preempted only when another session needs the
bytes, the longest idle first. Turns that run at the same time share forwards, or are fed one after another
(:mod:`agentmem.engine.scheduler`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.errors import RuntimeBusy
from agentmem.settings import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agentmem.sessions.leasing.holding import Holding, Stage


class Leases:
    """Account of the bytes of one cap, which are charged to holdings (each is one memory with its sessions)."""

    def __init__(self, cap: int, pressure: Sequence[Stage]) -> None:
        """Begin without holdings; a holding is one memory with the sessions that use it.

        ``pressure`` lists the stages in which idle holdings give back bytes, in order; :meth:`free` explains them all.
        """
        self.cap, self.pressure = cap, tuple(pressure)
        self.holdings: list[Holding] = []
        self.faults: list[str] = []
        """Reasons why bytes of idle memories could not be freed at the last call of :meth:`free`."""

    @property
    def charged(self) -> int:
        """Number of bytes of the cap that are reserved now for the memories of all sessions together.

        A memory's whole lease is reserved until bytes are taken from the memory while it is idle. From then on, only
        the bytes that the memory still holds are reserved.
        """
        return sum(holding.charged for holding in list(self.holdings))

    @property
    def left(self) -> int:
        """Number of bytes of the cap that are not reserved for the memory of any session."""
        return self.cap - self.charged

    def by_kind(self, running: set[int]) -> dict[str, int]:
        """Return the charged bytes by kind, under the field names of :class:`agentmem.sessions.RuntimeStats`.

        A memory is running if one of its sessions is in a turn, and idle otherwise. There are two kinds of bytes for
        running memories: the bytes that they hold, and the other bytes charged for them (their free room). There are
        the same two kinds for idle memories. The sum of all four is returned, too. ``running`` has the Python ids
        (``id()``) of the :class:`Holding` objects of the running memories.
        """
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
        """Preempt idle holdings until ``needed`` bytes of the cap are free; return whether this succeeded.

        A holding is one memory with its sessions. To preempt a holding means to take bytes from this memory, in stages:
        ``trim`` gives back its free slots, ``compact`` compacts it further, and ``disk`` moves it to disk.
        :attr:`pressure` lists the stages to use. All idle holdings go through one stage, the longest idle first, before
        any of them goes through the next. If the bytes of all idle holdings together would not suffice, no holding is
        preempted.

        Args:
            needed: number of bytes that must be free.
            may_yield: function that returns True for a holding that may be preempted.
            preempt: function that preempts a given holding by a given stage.

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
        """Return the error for a session that cannot get its lease.

        Args:
            name: name of the session.
            needed: bytes of the lease.
            active: number of sessions in a turn.
            waiting: number of turns that already wait for a lease.

        """
        why = (
            f"{waiting} turn(s) wait for it already and come first"
            if waiting
            else f"{active} session(s) are in mid-turn and idle ones cannot be preempted further"
        )
        return RuntimeBusy(
            f"session {name!r} needs {format_bytes(needed)} ({needed} bytes), and {self.charged} of the runtime's cap "
            f"of {self.cap} are charged: {why}{'' if waiting else self.stuck}; end the turn (astream, and calls of "
            "other threads, wait by themselves), give sessions smaller shares, or raise cap"
        )

    @property
    def stuck(self) -> str:
        """The first reason why bytes of an idle memory could not be freed at the last call of :meth:`free`.

        The text is in brackets, for error messages. It is empty if there was no such reason.
        """
        return f" ({self.faults[0]})" if self.faults else ""
