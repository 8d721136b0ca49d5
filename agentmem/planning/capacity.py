"""Find the largest capacity in slots that fits under a cap in bytes. Integers only, no tensors."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from agentmem.contracts import ModelIdentity
from agentmem.errors import CapTooSmall, SettingsRefused
from agentmem.planning.model_shape import spare_positions
from agentmem.planning.pricing import MIN_BUDGET, UNBOUNDED, Plan, Planner
from agentmem.settings import exact_bytes, format_bytes, sufficient_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agentmem.contracts import Policy
    from agentmem.planning.model_shape import ModelShape
    from agentmem.settings import Settings


def make_plan(shape: ModelShape, settings: Settings, policy: Policy, rows: int = 1) -> Plan:
    """Return the plan of a memory with one policy and the largest capacity under the cap; see :func:`make_plans`."""
    return make_plans(shape, settings, (policy,), rows)[0]


def make_plans(shape: ModelShape, settings: Settings, policies: Sequence[Policy], rows: int = 1) -> tuple[Plan, ...]:
    """Return one plan for each policy of a memory, all with the same capacity.

    This capacity is the largest at which the resident plus temporary bytes (R + T) of every policy fit under the cap.
    The first policy is the memory's own; single compactions may ask for the others. ``rows`` is the number of
    sequences.

    Raises:
        CapTooSmall: the cap is too small even for the prefix, the recent window, the smallest budget and the temporary
            bytes; the message names a cap that is large enough.
        SettingsRefused: the settings contradict each other at any cap, a policy's budgets were made for another model,
            or a later policy needs data that a memory with the first policy does not keep.

    """
    for policy in policies:
        _check_model(shape, policy)
    at = _pricing(shape, settings, policies, rows)
    reach = _reach(shape, settings, policies[0])
    least = _least_capacity(shape, settings, policies, rows) if shape.compactable else UNBOUNDED
    if shape.compactable:
        _check_max_slots(least, settings)
        _check_reach(reach, settings, at(least))
    if _needed(at(least)) > settings.cap:
        at = _pricing(shape, settings, policies, rows, frugal=True)
    _check_cap(shape, settings, at(least), policies)
    plans = at(_largest(least, settings, reach, at) if shape.compactable else UNBOUNDED)
    for policy, plan in zip(policies[1:], plans[1:], strict=True):
        _check_beside(policies[0], plans[0], policy, plan)
    return plans


def _pricing(
    shape: ModelShape, settings: Settings, policies: Sequence[Policy], rows: int, *, frugal: bool = False
) -> Callable[[int], tuple[Plan, ...]]:
    """Return a function that maps a capacity to the policies' plans, whether or not these fit under the cap.

    With ``frugal`` the plans store as few queries as possible.
    """
    planners = [Planner(shape, settings, policy, rows, frugal=frugal) for policy in policies]
    return cache(lambda capacity: tuple(planner.at(capacity) for planner in planners))


def _needed(plans: Sequence[Plan]) -> int:
    """Return the bytes needed (R + T): resident bytes of the first plan, plus the most temporary bytes of any plan."""
    return plans[0].resident_bytes + max(plan.workspace_bytes for plan in plans)


def _reach(shape: ModelShape, settings: Settings, policy: Policy) -> int:
    """Return the most positions that a full row (sequence) and a probe after it may take together.

    Re-basing moves slots to lower positions, into the gaps that compactions leave between slots. A row must therefore
    become full, and be compacted, before the model's positions are used up. The result is the number of the model's
    positions, less the number that a re-basing keeps free (:func:`spare_positions`). The result is ``UNBOUNDED`` if
    rows are not re-based, if the policy never compacts, or if the model's config states no number of positions.
    """
    if not settings.rebase or policy.compactor is None or shape.positions is None:
        return UNBOUNDED
    return shape.positions - spare_positions(shape.positions)


def _span(plans: Sequence[Plan]) -> int:
    """Return the number of positions that a full sequence and a probe after it take.

    ``plans`` has a plan for each policy. The probe is the longest of all policies' probes.
    """
    return plans[0].capacity + max(plan.probe_tokens for plan in plans)


def _check_beside(first: Policy, plan: Plan, other: Policy, others: Plan) -> None:
    """Check that a memory with the policy ``first`` keeps all data that the policy ``other`` needs.

    ``plan`` and ``others`` are the plans of the two policies.

    Raises:
        SettingsRefused: the memory does not keep scores, stored queries or free slots that ``other`` needs.

    """
    lacks = None
    if other.scores not in ("none", first.scores):
        lacks = f"scores that are {other.scores}"
    elif other.queries.stored and other.queries.stored != first.queries.stored:
        lacks = f"stored queries ({other.queries})"
    elif others.scratch > plan.scratch:
        lacks = f"{others.scratch} free slots to write in"
    if lacks:
        raise SettingsRefused(
            f"policy {other.name!r} needs {lacks}, which a memory under {first.name!r} does not keep; make "
            f"{other.name!r} the memory's own policy, or choose another one beside it"
        )


def _check_model(shape: ModelShape, policy: Policy) -> None:
    if policy.budgets is None:
        return
    heads = tuple(shape.layers[index].kv_heads for index in shape.compactable)
    try:
        policy.budgets.check(ModelIdentity(shape.name, shape.fingerprint, heads))
    except ValueError as error:
        raise SettingsRefused(f"policy {policy.name!r}: {error}") from error


def _check_cap(shape: ModelShape, settings: Settings, least: Sequence[Plan], policies: Sequence[Policy]) -> None:
    needed = _needed(least)
    if needed > settings.cap:
        widest = max(least, key=lambda plan: plan.workspace_bytes)
        raise CapTooSmall(
            f"a cap of {exact_bytes(settings.cap)} is too small: {widest.rows} row(s) of "
            f"{widest.capacity} slots per head (prefix {settings.keep_first} + recent {settings.keep_recent} + budget, "
            f"target {settings.target}) and the workspace of {widest.policy!r} need {needed} bytes "
            f"({format_bytes(needed)}); raise cap to {sufficient_bytes(needed)}, or lower {_lowered(widest, policies)}"
            + ("" if len(shape.compactable) == len(shape.layers) else "; its sliding windows are held whole")
        )


def _lowered(plan: Plan, policies: Sequence[Policy]) -> str:
    """Return the settings and options of the policies that make a plan smaller when they are lowered."""
    names = ["keep_first", "keep_recent", "min_reclaim", "chunk"]
    names += ["the policy's probe_tokens"] if plan.probe_tokens else []
    names += ["its summary_tokens"] if any(policy.rewrite is not None for policy in policies) else []
    return f"{', '.join(names)} or the number of rows"


def _check_reach(reach: int, settings: Settings, least: Sequence[Plan]) -> None:
    probe = _span(least) - least[0].capacity
    if _span(least) > reach:
        raise SettingsRefused(
            f"rebase: {least[0].capacity} slots per head, the fewest that keep_first={settings.keep_first}, "
            f"keep_recent={settings.keep_recent}, target={settings.target} and min_reclaim={settings.min_reclaim} "
            f"allow, and a probe of {probe} tokens need more than {reach} of the model's positions "
            "(one in eight stays free); lower them, chunk, or the policy's probe_tokens"
        )


def _check_max_slots(least: int, settings: Settings) -> None:
    if settings.max_slots is not None and settings.max_slots < least:
        raise SettingsRefused(
            f"max_slots: {settings.max_slots} is below {least}, what keep_first={settings.keep_first}, "
            f"keep_recent={settings.keep_recent}, target={settings.target} and min_reclaim={settings.min_reclaim} "
            "need; give as many, or lower those"
        )


def _largest(least: int, settings: Settings, reach: int, at: Callable[[int], Sequence[Plan]]) -> int:
    """Return the largest capacity, at least ``least``, that the cap, ``reach`` and ``max_slots`` allow.

    ``at`` returns the plans of all policies for a capacity. At an allowed capacity, these plans fit under the cap, and
    a full sequence and a probe take at most ``reach`` positions. The caller has checked that ``least`` is allowed. The
    search is a bisection, because a larger capacity never needs fewer bytes or positions.
    """
    low, high = least, settings.max_slots or max(least, settings.cap)
    while low < high:
        middle = (low + high + 1) // 2
        if _needed(at(middle)) <= settings.cap and _span(at(middle)) <= reach:
            low = middle
        else:
            high = middle - 1
    return low


def _least_capacity(shape: ModelShape, settings: Settings, policies: Sequence[Policy], rows: int) -> int:
    """Return the least capacity, in slots per head, at which a full row can be compacted under every policy.

    A compaction must leave slots for the prefix, the recent window and the smallest budget (:data:`MIN_BUDGET`), and
    must free at least ``min_reclaim`` slots.

    Raises:
        SettingsRefused: no capacity allows this, or ``target`` is not valid.

    """
    pinned = settings.keep_first + settings.keep_recent + MIN_BUDGET
    if isinstance(settings.target, float) and not 0 < settings.target < 1:
        raise SettingsRefused(f"target: {settings.target} is no fraction between 0 and 1; write 0.5 for halving")
    if isinstance(settings.target, int) and settings.target < pinned:
        raise SettingsRefused(
            f"target: {settings.target} slots cannot hold keep_first={settings.keep_first} + "
            f"keep_recent={settings.keep_recent} + {MIN_BUDGET}; give at least {pinned}"
        )
    planners = [Planner(shape, settings, policy, rows) for policy in policies]
    low, high = 1, UNBOUNDED
    while low < high:
        middle = (low + high) // 2
        outcomes = [planner.compacted(middle) for planner in planners]
        if all(left >= pinned and freed >= settings.min_reclaim for left, freed in outcomes):
            high = middle
        else:
            low = middle + 1
    if low == UNBOUNDED:
        raise SettingsRefused(f"target: {settings.target!r} leaves no room for keep_first + keep_recent + {MIN_BUDGET}")
    return low
