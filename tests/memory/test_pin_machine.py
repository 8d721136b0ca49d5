"""Whatever is pinned and unpinned between compactions: pins keep their slots, and the rest stays in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentmem.errors import CapTooSmall, SettingsRefused
from agentmem.memory.forwards import Append, Arriving, Transient
from agentmem.memory.memory import Memory
from agentmem.memory.pinning import pin, promote, settle, unpin
from agentmem.memory.state import copy
from agentmem.memory.store import LayerStore
from agentmem.planning.capacity import make_plan
from agentmem.planning.model_shape import LayerShape, ModelShape
from agentmem.settings import Settings
from support import tiny
from support.no_model import engine

LAYER = LayerShape(kv_heads=2, query_heads=4, key_dim=8, value_dim=8)
SHAPE = ModelShape("two layers", (LAYER, LAYER), 4, hidden=32, intermediate=32, vocabulary=64)
WISH = {"keep_first": 2, "keep_recent": 4, "min_reclaim": 2, "chunk": 8, "max_slots": 32}


class PinMachine(RuleBasedStateMachine):
    """One row of 32 slots per head, whose keys tell their token; some rearrangements are interrupted."""

    @initialize(kind=st.sampled_from(["window", "heavy-hitters", "replay"]))
    def open(self, kind: str) -> None:
        """The smallest cap that holds it."""
        policy = tiny.KINDS[kind]
        plan = make_plan(SHAPE, Settings.of(cap=1 << 30, **WISH), policy)
        cap = plan.resident_bytes + plan.workspace_bytes
        self.use(Memory(SHAPE, Settings.of(cap=cap, **WISH), policy))
        self.memory.bind(1)
        self.generator = torch.Generator().manual_seed(0)
        self.patch, self.left = pytest.MonkeyPatch(), -1
        self.patch.setattr(LayerStore, "reordered", self.interrupted(LayerStore.reordered))
        for _ in range(3):
            self.append(8)

    def use(self, memory: Memory) -> None:
        """Go on with this memory."""
        self.memory, self.engine = memory, engine(memory, self.transient)

    def interrupted(self, real: Callable[..., LayerStore]) -> Callable[..., LayerStore]:
        """The same method, which raises once when :attr:`left` has come to 0."""

        def reordered(store: LayerStore, *given: Any) -> LayerStore:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return real(store, *given)

        return reordered

    def transient(self, ids: Sequence[int], _: int, step: Transient) -> None:
        """A probe without a model."""
        for layer in range(2):
            self.attend(step, layer, [0] * len(ids))

    def attend(self, step: Append | Transient, layer: int, tokens: Sequence[int]) -> None:
        """One layer of a forward; the first number of a key and of a value is the token's."""
        queries, keys, values = (torch.randn(1, n, len(tokens), 8, generator=self.generator) for n in (4, 2, 2))
        keys[..., 0] = values[..., 0] = torch.tensor(tokens, dtype=torch.float32)
        step.attend(layer, queries, keys, values, 0.35)

    @rule(count=st.sampled_from([1, 5, 8]))
    def append(self, count: int) -> None:
        """Tokens that stay."""
        row = self.memory.sequences[0]
        with suppress(KeyboardInterrupt):
            arriving = Arriving([7] * count, range(row.seen, row.seen + count), slice(None))
            step = self.engine.begin([arriving])
            for layer in range(2):
                self.attend(step, layer, range(row.seen, row.seen + count))
            self.engine.commit()

    @rule(back=st.integers(1, 12), length=st.integers(1, 3))
    def pin(self, back: int, length: int) -> None:
        """Some of the newer tokens, if they are there, still whole and not too many."""
        row = self.memory.sequences[0]
        start = max(0, row.seen - back)
        with suppress(SettingsRefused, CapTooSmall):
            pin(self.memory, row, start, min(row.seen, start + length))

    @precondition(lambda self: self.memory.sequences[0].pins.spans)
    @rule(which=st.integers(0, 4), skip=st.integers(0, 1), length=st.integers(1, 6))
    def unpin(self, which: int, skip: int, length: int) -> None:
        """Tokens of a pin, and some behind it."""
        row = self.memory.sequences[0]
        start = row.pins.spans[which % len(row.pins.spans)][0] + skip
        with suppress(SettingsRefused):
            unpin(row, start, min(row.seen, start + length))

    @rule()
    def compact(self) -> None:
        """By hand, whenever."""
        with suppress(KeyboardInterrupt):
            self.engine.compact(self.memory.sequences[0])

    @rule()
    def rearrange(self) -> None:
        """Without a compaction."""
        with suppress(KeyboardInterrupt):
            promote(self.memory, self.memory.sequences[0])

    @rule(at=st.integers(1, 2))
    def arm(self, at: int) -> None:
        """Have a rearrangement interrupted before its first or its second store."""
        self.left = at

    @rule()
    def fork(self) -> None:
        """Go on with a copy."""
        with suppress(KeyboardInterrupt):
            self.engine.finish(self.memory.sequences[0])
            old, made = self.memory, copy(self.memory)
            self.use(made)
            old.close()

    @invariant()
    def account(self) -> None:
        """Ledger = Σ storages, R + T ≤ cap, nothing borrowed."""
        if hasattr(self, "memory"):
            tiny.audit(self.memory)
            assert self.memory.ledger.transient == 0

    @invariant()
    def slots(self) -> None:
        """Every pin has its slots; the front has what it says; behind it positions ascend; keys go with positions."""
        if not hasattr(self, "memory"):
            return
        row = self.memory.sequences[0]
        pinned = {at for low, high in row.pins.all for at in range(low, high)}
        for _, store in row.full():
            settle(row, store)
            front = [0, 1, *(at for low, high in store.promoted for at in range(low, high))]
            for head in range(2):
                held = store.segment(head, 0, 0)
                places = held.positions.tolist()
                assert places[: len(front)] == front[: len(places)]
                assert places[len(front) :] == sorted(set(places[len(front) :]) - set(front))
                assert pinned <= set(places)
                assert torch.equal(held.keys[:, 0], held.positions.float())
                whole = [at for at, place in enumerate(places) if place in pinned]
                assert torch.equal(held.values[whole, 0], held.positions[whole].float())
                assert not held.bias[whole].any()

    def teardown(self) -> None:
        """Closing frees every byte."""
        if hasattr(self, "memory"):
            self.patch.undo()
            self.memory.close()
            assert self.memory.ledger.resident == self.memory.ledger.transient == 0


TestPinMachine = PinMachine.TestCase
TestPinMachine.settings = settings(
    max_examples=20,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # how fast a machine is must not decide
)
