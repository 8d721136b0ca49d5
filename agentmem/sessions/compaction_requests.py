"""Compactions that a caller asks for, with a target, a policy and a focus (a text that must stay recallable)."""

from __future__ import annotations

import math

from agentmem.compaction.request import Request
from agentmem.errors import SettingsRefused
from agentmem.memory.pinning import promote
from agentmem.sessions import turn
from agentmem.sessions.chat.vocabulary import tokens
from agentmem.sessions.conversation import Conversation, Interrupted


def compacting(
    session: Conversation, focus: str, target: float | None, policy: str | None, *, force: bool
) -> turn.Steps:
    """Feed the ids that the memory has not consumed yet, then compact.

    A yielded step is an event, or a request to feed ids, which must be done before this generator is resumed.
    :meth:`agentmem.sessions.session.Session.compact` explains the arguments.
    """
    try:
        yield from turn.read(session)
        sequence = session.memory.sequences[0]
        if force or sequence.room <= session.hooks.soft * session.memory.plan.capacity:
            request = request_of(session, focus, policy)
            if target is not None:
                request = Request(_slots_of(session, target), None, request.focus, request.policy)
            yield from turn.compact(session, request, forced=False)
    except Interrupted:
        return


def request_of(session: Conversation, focus: str, policy: str | None) -> Request:
    """Return a request for a compaction with the caller's focus and policy.

    Raises:
        SettingsRefused: the session has no such policy, or a focus is given and the policy has no probe.

    """
    chosen = session.memory.policy if policy is None else session.memory.named(policy)
    if focus and not chosen.queries.probing:
        raise SettingsRefused(
            f"focus: policy {chosen.name!r} runs no probe that a text could be part of; choose one that does, such as "
            "am-halving"
        )
    ids = tuple(tokens(session, "focus", focus)) if focus else ()
    return Request(None, None, ids, None if policy is None else chosen)


def _slots_of(session: Conversation, target: float) -> int:
    """Convert a target to the number of slots per head that a compaction leaves between prefix and recent window.

    An integer target is this number already. Any other target is a fraction of the slots that are now between prefix
    and recent window. Pinned tokens that have left the recent window count as a part of the prefix.
    """
    if isinstance(target, int):
        return target
    memory, sequence = session.memory, session.memory.sequences[0]
    promote(memory, sequence)
    held = sequence.mean_slots() - sequence.front(memory.plan.prefix) - memory.plan.recent
    return max(1, math.ceil(target * max(0, held)))
