"""The options for reading a message or a text, which are checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from agentmem.errors import SettingsRefused
from agentmem.sessions.arguments import check_flag, check_seconds, check_target, check_text

TARGET = 0.25
"""Default for ``target``: the fraction that is left of a text that is compacted right after it was read."""


@dataclass(frozen=True, slots=True)
class How:
    """The options of :meth:`agentmem.sessions.session.Session.append`, which documents each of them.

    Raises:
        SettingsRefused: two options contradict one another, or a value cannot work; the message names the option.

    """

    pin: bool = False
    compact: str | None = None
    target: float | None = None
    focus: str = ""
    policy: str | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        """Check the options as far as this is possible without a session.

        Raises:
            SettingsRefused: two options contradict one another, or a value cannot work.

        """
        check_flag("pin", self.pin)
        check_text("focus", self.focus)
        if self.policy is not None:
            check_text("policy", self.policy)
        if self.deadline is not None:
            check_seconds("deadline", self.deadline)
        if self.target is not None:
            check_target(self.target)
        if self.compact is None:
            if self.focus or (self.policy, self.target) != (None, None):
                raise SettingsRefused("target, focus and policy steer a compaction; ask for one with compact='after'")
            return
        if self.compact != "after":
            raise SettingsRefused(f"compact={self.compact!r} is unknown; write 'after', or leave it out")
        if self.pin:
            raise SettingsRefused(
                "pin=True is never compacted, and compact='after' compacts at once; choose one of them"
            )
