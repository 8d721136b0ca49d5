"""Calls to the hooks of one session, before and after its compactions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.compaction.request import USUAL, Request
from agentmem.errors import SettingsRefused
from agentmem.sessions.hooks import POSTPONE, PROCEED, VETO, AfterCompact, BeforeCompact, CompactionContext

if TYPE_CHECKING:
    from agentmem.memory.memory import Memory
    from agentmem.reporting.report import CompactionReport


class HookCalls:
    """The hooks of one session, and whether ``before_compact`` may be asked again after its last answer."""

    def __init__(self, before: BeforeCompact | None, after: AfterCompact | None, soft: float) -> None:
        """Store the two hooks.

        The hook ``before`` is called before a compaction, and ``after`` afterwards. When at most the fraction ``soft``
        of the memory's capacity is free, ``before`` is called although the memory is not full yet.
        """
        self.before, self.after, self.soft = before, after, soft
        self._not_before = 0
        self._vetoed = False

    def early(self, memory: Memory) -> bool:
        """Return True if the memory is nearly full and ``before_compact`` must be asked now whether to compact.

        The memory is nearly full if at most the fraction ``soft`` of its capacity is free. After the hook's answer
        ``veto``, the result is False until a compaction has run. After the answer ``postpone``, the result is False
        until the memory has consumed ``min_reclaim`` (a setting) more tokens. The same wait follows a compaction that
        had nothing to reclaim.
        """
        sequence = memory.sequences[0]
        if self.before is None or self._vetoed or sequence.seen < self._not_before:
            return False
        return sequence.room <= self.soft * memory.plan.capacity

    def before_compaction(self, session: str, memory: Memory, *, full: bool) -> Request | None:
        """Ask the hook ``before`` and return the compaction to run, or ``None`` to run none for now.

        ``session`` is the session's name, and ``full`` is true if the memory cannot take another token.

        Raises:
            SettingsRefused: the hook's answer is not allowed.

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
        """Let :meth:`early` return False until the memory has consumed ``min_reclaim`` (a setting) more tokens."""
        self._not_before = memory.sequences[0].seen + max(1, memory.settings.min_reclaim)

    def compacted(self, report: CompactionReport) -> None:
        """After a compaction, forget earlier answers of the hook ``before``, and call ``after`` with the report."""
        self._vetoed, self._not_before = False, 0
        if self.after is not None:
            self.after(report)
