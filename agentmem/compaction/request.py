"""What one compaction is to do: which slots of a sequence, by which policy, down to how many. Integers only."""

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
    """How a compaction differs from the usual one, which takes all between prefix and recent down to the target.

    ``slots``: what to leave of the segment, per head on average. ``start``: the first token of the segment, which
    leaves out what of it is the prefix's or has been compacted. ``focus``: ids of a text that must stay recallable.
    ``policy``: which of the memory's policies. ``text``: what the segment holds now, if that is not the transcript.
    """

    slots: int | None = None
    start: int | None = None
    focus: tuple[int, ...] = ()
    policy: Policy | None = None
    text: tuple[int, ...] = ()


USUAL = Request()


def make_job(sequence: TokenSequence, request: Request, policy: Policy, plan: Plan, layers: Sequence[int]) -> Job:
    """The job of a sequence whose compactable layers are ``layers``; pins must have been promoted."""
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
        most = max(0, tail - recent)  # errors say how much of a span stays, up to all of it
    first = min(plan.prefix, sequence.seen) if usual else start
    return Job(policy, plan, tuple(begins), recent, each, most, first, request.focus, request.text, usual)
