"""Define the request for a compaction, and make the compaction's job from it.

A job states the policy, the slots to compact and the number of slots to leave. Requests and jobs hold no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentmem.memory.jobs import Job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.contracts import Policy
    from agentmem.memory.sequence import TokenSequence
    from agentmem.planning.pricing import Plan


@dataclass(frozen=True, slots=True)
class Request:
    """The options of one compaction; the defaults ask for the usual compaction.

    The usual compaction reduces everything between the prefix and the recent window to the plan's target.

    Attributes:
        slots: the average number of segment slots per head to leave; ``None`` means the plan's target.
        start: the first token of the segment; tokens of the prefix and compacted tokens are skipped. ``None`` means
            everything after the prefix.
        focus: the token ids of a text that must stay recallable.
        policy: the policy to compact with, one that the memory was opened with; ``None`` means the memory's own policy.
        text: if a summary has replaced the segment, the token ids of the summary and the recent window; else empty.

    """

    slots: int | None = None
    start: int | None = None
    focus: tuple[int, ...] = ()
    policy: Policy | None = None
    text: tuple[int, ...] = ()


USUAL = Request()


def make_job(sequence: TokenSequence, request: Request, policy: Policy, plan: Plan, layers: Sequence[int]) -> Job:
    """Return the job for a request to compact ``layers``.

    Call :func:`agentmem.memory.pinning.promote` first; it moves the slots of pinned tokens in front of the segment.
    """
    front = sequence.front(plan.prefix)
    recent = min(plan.recent, sequence.seen - min(plan.prefix, sequence.seen))
    usual = request.start is None
    start = sequence.compactable(request.start or 0, plan.prefix)
    tail = 0 if usual else sequence.behind(start)
    begins: list[tuple[int, ...]] = [()] * len(sequence.stores)
    for layer in layers:
        store = sequence.stores[layer]
        assert store is not None  # noqa: S101  # the caller lists layers that hold something
        begins[layer] = tuple(min(front, length) if usual else length - tail for length in store.lengths)
    each = max(0, plan.target - front - recent) if request.slots is None else request.slots
    most = max(0, plan.limit - front - recent) if request.slots is None else request.slots
    if not usual and policy.budgets is not None and policy.budgets.adaptive:
        most = max(0, tail - recent)  # adaptive budgets may keep all of a span
    first = min(plan.prefix, sequence.seen) if usual else start
    return Job(policy, plan, tuple(begins), recent, each, most, first, request.focus, request.text, usual)
