"""The hooks of one session: what is called before a compaction, and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.compaction.request import USUAL, Request
from agentmem.errors import SettingsRefused
from agentmem.sessions.hooks import POSTPONE, PROCEED, VETO, AfterCompact, BeforeCompact, CompactionContext

if TYPE_CHECKING:
    from agentmem.memory.memory import Memory
    from agentmem.reporting.report import CompactionReport


class HookCalls:
    """The hooks of one session, and what they answered last."""

    def __init__(self, before: BeforeCompact | None, after: AfterCompact | None, soft: float) -> None:
        """``soft`` is the part of the capacity below which ``before`` is called early."""
        self.before, self.after, self.soft = before, after, soft
        self._not_before = 0
        self._vetoed = False

    def early(self, memory: Memory) -> bool:
        """Whether a compaction is due soon, so that the hook is called now."""
        sequence = memory.sequences[0]
        if self.before is None or self._vetoed or sequence.seen < self._not_before:
            return False
        return sequence.room <= self.soft * memory.plan.capacity

    def before_compaction(self, session: str, memory: Memory, *, full: bool) -> Request | None:
        """What is to be done with the memory of the session of that name; ``None`` to leave it for now.

        Raises:
            SettingsRefused: the hook answered with something else than it may.

        """
        if self.before is None:
            return USUAL
        sequence = memory.sequences[0]
        names = tuple(policy.name for policy in (memory.policy, *memory.extra_policies))
        answer = self.before(
            CompactionContext(session, full, sequence.seen, sequence.held, sequence.room, memory.policy.name, names)
        )
        if answer == PROCEED:
            return USUAL
        if answer == POSTPONE:
            self.postpone(memory)
            return None
        if answer == VETO:
            self._vetoed = True
            return None
        if answer not in names:
            raise SettingsRefused(
                f"before_compact answered {answer!r}; it may answer {PROCEED!r}, {POSTPONE!r}, {VETO!r}, or a "
                f"policy of the session: {', '.join(map(repr, names))}"
            )
        return Request(policy=memory.named(answer))

    def postpone(self, memory: Memory) -> None:
        """Ask again when another part of the room is used up."""
        self._not_before = memory.sequences[0].seen + max(1, memory.settings.min_reclaim)

    def compacted(self, report: CompactionReport) -> None:
        """A compaction is over: nothing is vetoed or postponed any more."""
        self._vetoed, self._not_before = False, 0
        if self.after is not None:
            self.after(report)
