"""Whatever order of appends, compactions, faults and interrupts: the account is right and the memory is valid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentmem.errors import CompactionFailed
from agentmem.memory.forwards import Append, Arriving, Transient
from agentmem.memory.memory import Memory
from agentmem.planning.capacity import make_plan
from agentmem.planning.model_shape import LayerShape, ModelShape
from agentmem.planning.pricing import window_slots
from agentmem.settings import Settings
from support import matrices, tiny
from support.no_model import engine

LAYER = LayerShape(kv_heads=2, query_heads=4, key_dim=8, value_dim=8)
LAYERS = (LAYER, replace(LAYER, window=6), LAYER)
SHAPE = ModelShape("three layers", LAYERS, 4, hidden=32, intermediate=32, vocabulary=64)
SLOTS, ROWS = 24, 2
COUNTS = st.tuples(*[st.integers(0, 5)] * ROWS).filter(any)
ERRORS = st.lists(st.sampled_from([RuntimeError, KeyboardInterrupt]), max_size=3)
WHERE = st.integers(0, len(LAYERS) - 1)


class MemoryMachine(RuleBasedStateMachine):
    """Two rows of 24 slots per head under the smallest cap that holds them; one layer of three slides."""

    @initialize(kind=st.sampled_from(sorted(tiny.KINDS)), on_failure=st.sampled_from(["evict", "raise", "stop"]))
    def open(self, kind: str, on_failure: str) -> None:
        """A policy that can be made to fail."""
        policy = tiny.KINDS[kind]
        assert policy.compactor is not None
        self.errors: list[BaseException] = []
        self.faulty = tiny.Faulty(policy.compactor, 0, self.errors)
        policy = replace(policy, compactor=self.faulty)
        wish = {"keep_first": 2, "keep_recent": 4, "min_reclaim": 2, "chunk": 8, "max_slots": SLOTS}
        plan = make_plan(SHAPE, Settings.of(cap=1 << 30, **wish), policy, ROWS)
        cap = plan.resident_bytes + plan.workspace_bytes
        self.memory = Memory(SHAPE, Settings.of(cap=cap, on_failure=on_failure, **wish), policy)
        self.memory.bind(ROWS)
        self.engine = engine(self.memory, self.transient)
        self.generator = torch.Generator().manual_seed(0)
        self.ids: list[list[int]] = [[] for _ in range(ROWS)]
        self.clean = True
        """Whether no forward was cut off."""

    def draw(self, *size: int) -> torch.Tensor:
        """Random numbers."""
        return torch.randn(*size, generator=self.generator)

    def transient(self, ids: Sequence[int], _: int, step: Transient) -> None:
        """A probe without a model."""
        for layer in range(len(LAYERS)):
            self.attend(step, layer, 1, len(ids))

    def attend(self, step: Append | Transient, layer: int, rows: int, columns: int) -> None:
        """One layer of a forward."""
        keys, values = self.draw(rows, 2, columns, 8), self.draw(rows, 2, columns, 8)
        output = step.attend(layer, self.draw(rows, 4, columns, 8), keys, values, 0.35)
        assert output.shape == (rows, columns, 4, 8)
        assert torch.isfinite(output).all()

    def forward(self, counts: tuple[int, ...], layers: int) -> tuple[Append, list[Arriving]] | None:
        """A left-padded forward through so many layers, or ``None`` when making room failed."""
        longest = max(counts)
        arriving = [
            Arriving([7] * n, range(row.next_position, row.next_position + n), torch.arange(longest - n, longest))
            for n, row in zip(counts, self.memory.sequences, strict=True)
        ]
        try:
            step = self.engine.begin(arriving)
        except (CompactionFailed, KeyboardInterrupt):
            self.clean = True
            return None
        self.clean = False
        for layer in range(layers):
            self.attend(step, layer, ROWS, longest)
        return step, arriving

    @rule(counts=COUNTS)
    def append(self, counts: tuple[int, ...]) -> None:
        """Tokens that stay."""
        begun = self.forward(counts, len(LAYERS))
        if begun is not None:
            self.engine.commit()
            self.clean = True
            for ids, each in zip(self.ids, begun[1], strict=True):
                ids.extend(each.ids)

    @rule(counts=COUNTS, layers=WHERE)
    def fail(self, counts: tuple[int, ...], layers: int) -> None:
        """A forward that raises behind some layers."""
        begun = self.forward(counts, layers)
        if begun is not None:
            self.engine.abandon()
            self.clean = True

    @rule(counts=COUNTS, layers=WHERE)
    def interrupt(self, counts: tuple[int, ...], layers: int) -> None:
        """A forward that is cut off behind some layers, and nobody says so."""
        self.forward(counts, layers)

    @rule(row=st.integers(0, ROWS - 1))
    def compact(self, row: int) -> None:
        """By hand, whenever."""
        try:
            self.engine.compact(self.memory.sequences[row])
        except (CompactionFailed, KeyboardInterrupt):
            pass
        else:
            assert self.memory.sequences[row].job is None
        self.clean = True

    @precondition(lambda self: not self.errors)
    @rule(layer=st.sampled_from([0, 2]), errors=ERRORS)
    def arm(self, layer: int, errors: list[type[BaseException]]) -> None:
        """Let the next compactions fail or be interrupted at that layer."""
        self.faulty.at = layer
        self.errors.extend(error("armed") for error in errors)

    @invariant()
    def account(self) -> None:
        """Ledger = Σ storages, R + T ≤ cap, nothing borrowed."""
        tiny.audit(self.memory)
        assert self.memory.ledger.transient == 0

    @invariant()
    def rows(self) -> None:
        """Each row holds its tokens: in the transcript, in the stores, within capacity, as positions in order."""
        for row, ids in zip(self.memory.sequences, self.ids, strict=True):
            assert list(row.ids) == ids
            assert row.next_position == len(ids)
            for layer, store in zip(LAYERS, row.stores, strict=True):
                if store is None:
                    continue
                assert all(held <= most for held, most in zip(store.lengths, store.capacities, strict=True))
                if self.clean:
                    assert store.seen == len(ids)
                    if layer.window:
                        assert store.lengths[0] >= min(len(ids), layer.window - 1)
                        assert store.lengths[0] <= window_slots(layer.window, 8)
                    elif row.job is None:
                        assert 0 <= row.room <= SLOTS - store.lengths[0]
            self.positions_ascend(row.index)

    def positions_ascend(self, index: int) -> None:
        """What is settled is the prefix, then anything in order."""
        for store in self.memory.sequences[index].stores:
            if store is None or store.spec.shape.window:
                continue
            for head, (start, count) in enumerate(zip(store.starts, store.settled, strict=True)):
                places = store.positions[start : start + min(count, store.lengths[head])].tolist()
                assert places == sorted(set(places))
                assert places[:2] == list(range(len(places)))[:2]

    def teardown(self) -> None:
        """Closing frees every byte in every state."""
        if hasattr(self, "memory"):
            self.memory.close()
            assert self.memory.ledger.resident == self.memory.ledger.transient == 0


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(
    max_examples=60 if matrices.whole else 30,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # how fast a machine is must not decide
)
