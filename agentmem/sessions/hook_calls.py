"""The hooks of one session: what is called before a compaction, and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.compaction.request import USUAL, Request
from agentmem.errors import SettingsRefused
from agentmem.sessions.hooks import POSTPONE, PROCEED, VETO, AfterCompact, BeforeCompact, CompactionContext

if TYPE_CHECKING:
    from agentmem.memory.sequence import Row
    from agentmem.reporting.report import CompactionReport
    from agentmem.sessions.session import Session


class HookCalls:
    """The hooks of one session, and what they answered last."""

    def __init__(self, before: BeforeCompact | None, after: AfterCompact | None, soft: float) -> None:
        """``soft`` is the part of the capacity below which ``before`` is asked early."""
        self.before, self.after, self.soft = before, after, soft
        self._not_before = 0
        self._vetoed = False

    def early(self, session: Session, row: Row) -> bool:
        """Whether a compaction is due soon, and is to be asked for now."""
        if self.before is None or self._vetoed or row.seen < self._not_before:
            return False
        return row.room <= self.soft * session.memory.plan.capacity

    def before_compaction(self, session: Session, *, full: bool) -> Request | None:
        """What is to be done; ``None`` to leave it for now.

        Raises:
            SettingsRefused: the hook answered with something else than it may.

        """
        if self.before is None:
            return USUAL
        memory, row = session.memory, session.memory.rows[0]
        names = tuple(policy.name for policy in (memory.policy, *memory.extra_policies))
        answer = self.before(
            CompactionContext(session.name, full, row.seen, row.held, row.room, memory.policy.name, names)
        )
        if answer == PROCEED:
            return USUAL
        if answer == POSTPONE:
            self.postpone(session)
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

    def postpone(self, session: Session) -> None:
        """Ask again when another part of the room is used up."""
        memory = session.memory
        self._not_before = memory.rows[0].seen + max(1, memory.settings.min_reclaim)

    def compacted(self, report: CompactionReport) -> None:
        """A compaction is over: nothing is vetoed or postponed any more."""
        self._vetoed, self._not_before = False, 0
        if self.after is not None:
            self.after(report)
