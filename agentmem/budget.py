"""Bytes ↔ slots: the plan of one memory. Integers only, no tensors.

R is what the storages of all rows hold when they are full; T the most that agentmem allocates besides at any moment;
``R + T ≤ cap``. A, stated but outside the cap, is what the model's own modules allocate in one forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentmem import attention
from agentmem.contracts import SegmentShape
from agentmem.errors import CapTooSmall, SettingsRefused
from agentmem.settings import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentmem.contracts import Policy
    from agentmem.settings import Settings
    from agentmem.shape import LayerShape, ModelShape

MIN_BUDGET = 1
"""Fewest segment slots per head that a plan accepts."""
MAX_PROBE = 1024
HELD_OUT = 8
"""One reference token in this many is held out from the fit."""
UNBOUNDED = 1 << 40
"""Capacity of a model whose layers all slide: fixed windows never fill up."""
LIVE_SHARE = 10
"""Live queries may take one part in this many of the cap, unless the policy names a count."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a cap comes to. ``capacity`` and ``target`` are slots per KV head and row, prefix and recent included."""

    policy: str
    cap_bytes: int
    rows: int
    capacity: int
    target: int
    prefix: int
    recent: int
    chunk: int
    probe_tokens: int
    live_tokens: int
    resident_bytes: int
    live_bytes: int
    fit_bytes: int
    check_bytes: int
    forward_bytes: int
    move_bytes: int
    activation_bytes: int

    @property
    def workspace_bytes(self) -> int:
        """T: the phases do not overlap, but a commit's new store exists beside the fit's result."""
        return max(self.fit_bytes + self.check_bytes + self.move_bytes, self.forward_bytes)

    def _slots_text(self) -> str:
        if self.capacity == UNBOUNDED:
            return f"sliding windows only, {self.rows} row(s): never compacted"
        return f"{self.capacity} per head, {self.target} after a compaction, {self.rows} row(s)"

    def table(self) -> list[tuple[str, int | None, str]]:
        """Rows (name, bytes, meaning) for people."""
        return [
            ("cap", self.cap_bytes, "hard limit over R + T"),
            ("R: slots", self.resident_bytes - self.live_bytes, self._slots_text()),
            ("R: live queries", self.live_bytes, f"{self.live_tokens} stored per row"),
            ("T: fit", self.fit_bytes, f"the policy's workspace, {self.probe_tokens} probe tokens"),
            ("T: held-out check", self.check_bytes, "errors for the report"),
            ("T: moving a layer", self.move_bytes, "a new store beside the old one"),
            ("T: attention", self.forward_bytes, "merging and scratch of one forward (not beside the others)"),
            ("R + T", self.resident_bytes + self.workspace_bytes, "at most, at every moment"),
            ("A (outside the cap)", self.activation_bytes, f"estimate: the model's own forward of {self.chunk} tokens"),
        ]


def make_plan(shape: ModelShape, settings: Settings, policy: Policy, rows: int = 1) -> Plan:
    """The plan with the largest capacity that keeps R + T under the cap.

    Raises:
        CapTooSmall: prefix, recent, the smallest budget and the workspace do not fit; names the cap that would do.
        SettingsRefused: settings contradict each other whatever the cap.

    """
    at = _Planner(shape, settings, policy, rows).at
    least = _least_capacity(settings, at) if shape.compactable else UNBOUNDED
    if shape.compactable:
        _check_max_slots(least, settings)
    smallest = at(least)
    needed = smallest.resident_bytes + smallest.workspace_bytes
    if needed > settings.cap:
        raise CapTooSmall(
            f"a cap of {format_bytes(settings.cap)} ({settings.cap} bytes) is too small: {rows} row(s) of {least} "
            f"slots per head (prefix {settings.keep_first} + recent {settings.keep_recent} + budget, target "
            f"{settings.target}) and the workspace of {policy.name!r} need {needed} bytes ({format_bytes(needed)}); "
            "raise cap, or lower keep_first, keep_recent, min_reclaim, chunk or the number of rows"
            + ("" if len(shape.compactable) == len(shape.layers) else "; its sliding windows are held whole")
        )
    return at(_largest(least, settings, at) if shape.compactable else UNBOUNDED)


def _check_max_slots(least: int, settings: Settings) -> None:
    if settings.max_slots is not None and settings.max_slots < least:
        raise SettingsRefused(
            f"max_slots: {settings.max_slots} is below {least}, what keep_first={settings.keep_first}, "
            f"keep_recent={settings.keep_recent}, target={settings.target} and min_reclaim={settings.min_reclaim} need"
        )


def _largest(least: int, settings: Settings, at: Callable[[int], Plan]) -> int:
    """The largest capacity that fits, by bisection: R + T never falls with the capacity."""
    low, high = least, settings.max_slots or max(least, settings.cap)
    while low < high:
        middle = (low + high + 1) // 2
        plan = at(middle)
        if plan.resident_bytes + plan.workspace_bytes <= settings.cap:
            low = middle
        else:
            high = middle - 1
    return low


def _least_capacity(settings: Settings, at: Callable[[int], Plan]) -> int:
    """The smallest capacity at which a compaction leaves room for a budget and frees ``min_reclaim``."""
    pinned = settings.keep_first + settings.keep_recent + MIN_BUDGET
    if isinstance(settings.target, float) and not 0 < settings.target < 1:
        raise SettingsRefused(f"target: {settings.target} is no fraction between 0 and 1; write 0.5 for halving")
    if isinstance(settings.target, int) and settings.target < pinned:
        raise SettingsRefused(
            f"target: {settings.target} slots cannot hold keep_first={settings.keep_first} + "
            f"keep_recent={settings.keep_recent} + {MIN_BUDGET}; give at least {pinned}"
        )
    low, high = 1, UNBOUNDED
    while low < high:
        middle = (low + high) // 2
        plan = at(middle)
        if plan.target >= pinned and plan.capacity - plan.target >= settings.min_reclaim:
            high = middle
        else:
            low = middle + 1
    if low == UNBOUNDED:
        raise SettingsRefused(f"target: {settings.target!r} leaves no room for keep_first + keep_recent + {MIN_BUDGET}")
    return low


class _Planner:
    """Prices a capacity."""

    def __init__(self, shape: ModelShape, settings: Settings, policy: Policy, rows: int) -> None:
        self.shape, self.settings, self.policy, self.rows = shape, settings, policy, rows

    def at(self, capacity: int) -> Plan:
        """The plan at one capacity, whether it fits or not."""
        settings, policy = self.settings, self.policy
        target = self._target(capacity)
        probe = self._probe_tokens(capacity)
        live = self._live_tokens()
        live_bytes = self.rows * live * self._query_bytes()
        references = probe or live
        return Plan(
            policy=policy.name,
            cap_bytes=settings.cap,
            rows=self.rows,
            capacity=capacity,
            target=target,
            prefix=settings.keep_first,
            recent=settings.keep_recent,
            chunk=settings.chunk,
            probe_tokens=probe,
            live_tokens=live,
            resident_bytes=live_bytes
            + self.rows * sum(self._store_bytes(layer, capacity) for layer in self.shape.layers),
            live_bytes=live_bytes,
            fit_bytes=self._most(lambda layer: self._fit(layer, capacity, target, references)),
            check_bytes=self._most(lambda layer: self._check(layer, capacity, target, references)),
            forward_bytes=max(self._forward(layer, capacity) for layer in self.shape.layers),
            move_bytes=max(self._store_bytes(layer, capacity) for layer in self.shape.layers),
            activation_bytes=self.shape.activation_bytes(max(settings.chunk, probe)),
        )

    def slots(self, layer: LayerShape, capacity: int) -> int:
        """Slots per head of one layer's store when it is full."""
        return capacity if layer.window is None else window_slots(layer.window, self.settings.chunk)

    def _target(self, capacity: int) -> int:
        target = self.settings.target
        if self.policy.compactor is None:
            return capacity - self.settings.min_reclaim
        if isinstance(target, float):
            return int(capacity * target)
        if isinstance(target, int):
            return target
        per_slot = self.rows * sum(
            layer.kv_heads * self._slot_bytes(layer) for layer in self.shape.layers if layer.window is None
        )
        return parse_bytes(target) // max(1, per_slot)

    def _probe_tokens(self, capacity: int) -> int:
        if not self.policy.queries.probes:
            return 0
        wanted = self.policy.queries.tokens or min(2 * capacity, MAX_PROBE)
        return min(wanted, self.settings.chunk)

    def _live_tokens(self) -> int:
        if self.policy.queries.source != "live":
            return 0
        fitting = self.settings.cap // LIVE_SHARE // (self.rows * self._query_bytes())
        return self.policy.queries.tokens or max(HELD_OUT, min(512, fitting))

    def _query_bytes(self) -> int:
        layers = [layer for layer in self.shape.layers if layer.window is None]
        return sum(layer.query_heads * layer.key_dim for layer in layers) * self.shape.itemsize

    def _slot_bytes(self, layer: LayerShape) -> int:
        return self.shape.slot_bytes(layer, scores=self.policy.scores)

    def _store_bytes(self, layer: LayerShape, capacity: int) -> int:
        return layer.kv_heads * self.slots(layer, capacity) * self._slot_bytes(layer)

    def _most(self, price: Callable[[LayerShape], int]) -> int:
        compactable = [layer for layer in self.shape.layers if layer.window is None]
        if self.policy.compactor is None or not compactable:
            return 0
        return max(price(layer) for layer in compactable)

    def _segment(self, layer: LayerShape, capacity: int, target: int, references: int) -> SegmentShape:
        pinned = self.settings.keep_first + self.settings.keep_recent
        return SegmentShape(
            heads=layer.kv_heads,
            group=layer.group,
            slots=max(1, capacity - pinned),
            budget=max(1, target - pinned),
            queries=references - references // HELD_OUT,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            itemsize=self.shape.itemsize,
        )

    def _fit(self, layer: LayerShape, capacity: int, target: int, references: int) -> int:
        assert self.policy.compactor is not None  # noqa: S101  # _most has asked
        return self.policy.compactor.workspace(self._segment(layer, capacity, target, references))

    def _check(self, layer: LayerShape, capacity: int, target: int, references: int) -> int:
        queries, fused = references // HELD_OUT, self._fused(layer)
        return attention.local_bytes(layer, queries, capacity, target, self.shape.itemsize, fused=fused)

    def _fused(self, layer: LayerShape) -> bool:
        return self.shape.fused and layer.key_dim == layer.value_dim

    def _forward(self, layer: LayerShape, capacity: int) -> int:
        slots, chunk = self.slots(layer, capacity), self.settings.chunk
        fused = attention.fused_bytes(layer, chunk, slots, self.shape.itemsize)
        explicit = self.policy.scores or layer.window is not None or not self._fused(layer)
        return max(fused, attention.explicit_bytes(layer, chunk, slots, self.shape.itemsize)) if explicit else fused


def window_slots(window: int, chunk: int) -> int:
    """Slots per head of a sliding layer: what a query can see, and slack so that it slides once in a while."""
    return window - 1 + max(1, min(chunk, window))


def grown(needed: int, limit: int) -> int:
    """The capacity to allocate for ``needed`` slots on the way to ``limit``: the limit halved as often as possible.

    Halving from the top keeps the store that is replaced at half of the new one at most, which T has room for.
    """
    capacity = limit
    while capacity > 1 and -(-capacity // 2) >= needed:
        capacity = -(-capacity // 2)
    return capacity
