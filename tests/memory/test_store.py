"""Stores of slots against a plain list per head, and their bytes against the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from agentmem.contracts import Compaction, HeadCompaction
from agentmem.errors import MemoryCapExceeded
from agentmem.memory.ledger import Ledger
from agentmem.memory.slot_spec import SlotSpec
from agentmem.memory.store import LayerStore
from agentmem.planning.model_shape import LayerShape

CAP = 1 << 20
SHAPE = LayerShape(kv_heads=3, query_heads=6, key_dim=8, value_dim=4)
SPECS = {
    "float32": SlotSpec(SHAPE, torch.float32, torch.device("cpu"), scores=False),
    "bfloat16 with scores": SlotSpec(SHAPE, torch.bfloat16, torch.device("cpu"), scores=True),
}
SLOT_BYTES = {"float32": (8 + 4) * 4 + 8, "bfloat16 with scores": (8 + 4) * 2 + 12}

Slot = tuple[float, float, float, int, float]
"""Key, value (every channel alike), β, position, score."""


@dataclass
class Model:
    """What a store should hold: one plain list of slots per head, and the positions appended so far."""

    spec: SlotSpec
    heads: list[list[Slot]] = field(default_factory=lambda: [[], [], []])
    tail: list[int] = field(default_factory=list)
    next_position: int = 0

    def append(self, store: LayerStore, count: int) -> None:
        """Append the same ``count`` tokens to both."""
        numbers = torch.arange(self.next_position, self.next_position + count)
        per_head = (numbers + 100 * torch.arange(3)[:, None])[..., None]
        scores = per_head[..., 0] / 2 if self.spec.scores else None
        store.append(
            per_head.expand(-1, -1, 8).to(self.spec.dtype),
            (-per_head).expand(-1, -1, 4).to(self.spec.dtype),
            None if scores is None else scores.float(),
        )
        for head, slots in enumerate(self.heads):
            for number in numbers.tolist():
                name = self.rounded(number + 100 * head)
                slots.append((name, -name, 0.0, number, (number + 100 * head) / 2 if self.spec.scores else 0.0))
        self.tail += numbers.tolist()
        self.next_position += count

    def rounded(self, number: float) -> float:
        """As the store's dtype holds it."""
        return float(torch.tensor(number).to(self.spec.dtype))

    def compact(self, kept: list[list[int]], prefix: int, recent: int, bias: float) -> Compaction:
        """Keep those segment slots with a new β and doubled values; the same for the store, as a Compaction."""
        results = []
        for head, (slots, indices) in enumerate(zip(self.heads, kept, strict=True)):
            segment = slots[prefix : len(slots) - recent]
            values = torch.tensor([2 * segment[i][1] for i in indices])[:, None].expand(-1, 4)
            biases = torch.tensor([segment[i][2] + bias for i in indices])
            results.append(HeadCompaction(torch.tensor(indices, dtype=torch.int64), biases, values))
            middle = [(k, self.rounded(2 * v), b + bias, p, s) for k, v, b, p, s in (segment[i] for i in indices)]
            self.heads[head] = slots[:prefix] + middle + slots[len(slots) - recent :]
        self.tail = []
        return Compaction(tuple(results))


def contents(store: LayerStore) -> list[list[Slot]]:
    """Every filled slot of a store whose positions are settled, read through its runs and segments."""
    result: list[list[Slot]] = []
    for run in store.runs():
        for head in range(run.heads):
            bias = torch.zeros(run.slots) if run.bias is None else run.bias[head]
            scores = torch.zeros(run.slots) if run.scores is None else run.scores[head]
            positions = store.segment(run.first + head, 0, 0).positions
            columns = (run.keys[head, :, 0], run.values[head, :, 0], bias, positions, scores)
            assert torch.equal(run.keys[head], run.keys[head, :, :1].expand(-1, 8))
            assert torch.equal(run.values[head], run.values[head, :, :1].expand(-1, 4))
            rows = zip(*(column.tolist() for column in columns), strict=True)
            result.append([(k, v, b, p, s) for k, v, b, p, s in rows])
    return result


def settle(store: LayerStore, model: Model) -> None:
    """Hand the store the positions that its row has kept."""
    store.settle(torch.tensor(model.tail, dtype=torch.int32))


@pytest.fixture(params=SPECS)
def kind(request: pytest.FixtureRequest) -> str:
    """A row format."""
    return str(request.param)


@pytest.fixture
def ledger() -> Ledger:
    """A roomy one."""
    return Ledger(CAP)


def test_appending_to_equal_and_unequal_heads(kind: str, ledger: Ledger) -> None:
    """Slots follow one another in every head, whether all heads lie alike or not."""
    for capacities in ((12, 12, 12), (12, 9, 20)):
        model, store = Model(SPECS[kind]), LayerStore(SPECS[kind], capacities, ledger)
        for count in (1, 5, 3):
            model.append(store, count)
            settle(store, model)
            assert contents(store) == model.heads
        assert store.room == min(capacities) - 9
        assert store.seen == 9
        assert len(store.runs()) == (1 if len(set(capacities)) == 1 else 3)


def test_ten_compactions_with_changing_ragged_budgets(kind: str, ledger: Ledger) -> None:
    """Contents, positions and carried β are those of plain lists; bytes are Σ budgets + headroom, exactly."""
    spec, generator = SPECS[kind], torch.Generator().manual_seed(1)
    model, store = Model(spec), LayerStore(spec, (30, 30, 30), ledger)
    model.append(store, 30)
    for turn in range(10):
        settle(store, model)
        prefix, recent = turn % 4, 3 + turn % 2
        budgets = torch.randint(0, 15, (3,), generator=generator).tolist()
        held = [len(slots) - prefix - recent for slots in model.heads]
        kept = [
            sorted(torch.randperm(n, generator=generator)[: min(b, n)].tolist())
            for n, b in zip(held, budgets, strict=True)
        ]
        old, before = store, store.allocated_bytes
        store = old.compacted(model.compact(kept, prefix, recent, bias=0.25), [prefix] * 3, recent)
        lengths = [prefix + len(indices) + recent for indices in kept]
        assert old.allocated_bytes == before
        assert store.allocated_bytes == sum(lengths) * SLOT_BYTES[kind] <= before
        old.free()
        assert ledger.resident == store.allocated_bytes
        assert contents(store) == model.heads
        headroom = int(torch.randint(1, 12, (1,), generator=generator))
        old, store = store, store.resized([length + headroom for length in lengths])
        old.free()
        assert store.allocated_bytes == (sum(lengths) + 3 * headroom) * SLOT_BYTES[kind] == ledger.resident
        assert store.used_bytes == sum(lengths) * SLOT_BYTES[kind]
        assert store.room == headroom
        model.append(store, headroom)
    settle(store, model)
    assert contents(store) == model.heads
    store.free()
    assert ledger.resident == 0


def test_a_compaction_leaves_what_it_does_not_replace(kind: str, ledger: Ledger) -> None:
    """Without values and β the kept slots keep theirs; a store that never had a β has none afterwards."""
    model, store = Model(SPECS[kind]), LayerStore(SPECS[kind], (10, 10, 10), ledger)
    model.append(store, 10)
    settle(store, model)
    plain = Compaction(tuple(HeadCompaction(torch.tensor(kept)) for kept in ([0, 3], [1, 2], [4, 5])))
    after = store.compacted(plain, [2] * 3, 2)
    expected = [
        slots[:2] + [slots[2 + index] for index in kept] + slots[8:]
        for slots, kept in zip(model.heads, ([0, 3], [1, 2], [4, 5]), strict=True)
    ]
    assert contents(after) == expected
    assert not after.biased
    assert after.runs()[0].bias is None


def test_replacement_keys_are_written(kind: str, ledger: Ledger) -> None:
    """A compactor may replace keys; their positions stay those of the kept slots."""
    model, store = Model(SPECS[kind]), LayerStore(SPECS[kind], (6, 6, 6), ledger)
    model.append(store, 6)
    settle(store, model)
    head = HeadCompaction(torch.tensor([1, 3]), keys=torch.tensor([[7.0], [9.0]]).expand(-1, 8))
    after = store.compacted(Compaction((head,) * 3), [1] * 3, 1)
    assert [[slot[0] for slot in slots[1:-1]] for slots in contents(after)] == [[7.0, 9.0]] * 3
    assert [[slot[3] for slot in slots] for slots in contents(after)] == [[0, 2, 4, 5]] * 3


def test_resizing_keeps_slots_beta_and_unsettled_positions(kind: str, ledger: Ledger) -> None:
    """A store may grow between two forwards, before its positions were settled."""
    model, store = Model(SPECS[kind]), LayerStore(SPECS[kind], (4, 4, 4), ledger)
    model.append(store, 3)
    old, store = store, store.resized((8, 8, 8))
    old.free()
    model.append(store, 5)
    settle(store, model)
    assert contents(store) == model.heads
    assert store.seen == 8
    assert store.allocated_bytes == 24 * SLOT_BYTES[kind] == ledger.resident


def test_dropping_the_tail_takes_back_what_was_appended(kind: str, ledger: Ledger) -> None:
    """The slots before stay, and later ones take the places with a clean β and score."""
    for capacities in ((9, 9, 9), (9, 12, 10)):
        model, store = Model(SPECS[kind]), LayerStore(SPECS[kind], capacities, ledger)
        model.append(store, 4)
        Model(SPECS[kind], next_position=50).append(store, 5)
        store.drop_tail(5)
        assert store.seen == 4
        store.append(torch.full((3, 1, 8), 7.0), torch.full((3, 1, 4), 7.0))
        expected = [[*slots, (7.0, 7.0, 0.0, 4, 0.0)] for slots in model.heads]
        store.settle(torch.tensor([*model.tail, 4], dtype=torch.int32))
        assert contents(store) == expected


@pytest.mark.parametrize("keep", [0, 1, 3, 5, 8, 9])
def test_sliding_keeps_the_newest_slots(kind: str, ledger: Ledger, keep: int) -> None:
    """Any shift moves the last slots to the front of a new store; nothing is copied twice."""
    model, store = Model(SPECS[kind]), LayerStore(SPECS[kind], (9, 9, 9), ledger)
    model.append(store, 8)
    store = store.slid(keep)
    kept = min(keep, 8)
    run = store.runs()[0]
    assert store.lengths == [kept] * 3
    assert run.keys[..., 0].tolist() == [[slot[0] for slot in slots[8 - kept :]] for slots in model.heads]
    assert run.values[..., 0].tolist() == [[slot[1] for slot in slots[8 - kept :]] for slots in model.heads]
    if run.scores is not None:
        assert run.scores.tolist() == [[slot[4] for slot in slots[8 - kept :]] for slots in model.heads]


def test_runs_can_be_cut_to_the_newest_slots(ledger: Ledger) -> None:
    """A fixed window sees the last slots only; a transient forward is not shown the score accumulators."""
    spec = SPECS["bfloat16 with scores"]
    model, store = Model(spec), LayerStore(spec, (9, 9, 9), ledger)
    model.append(store, 7)
    assert store.runs(3)[0].keys[0, :, 0].tolist() == [4.0, 5.0, 6.0]
    assert store.runs(20)[0].slots == 7
    assert store.runs(scored=False)[0].scores is None


def test_a_segment_lies_between_prefix_and_recent(ledger: Ledger) -> None:
    """Views, not copies; empty where prefix and recent meet or overlap."""
    spec = SPECS["bfloat16 with scores"]
    model, store = Model(spec), LayerStore(spec, (9, 9, 9), ledger)
    model.append(store, 8)
    settle(store, model)
    segment = store.segment(1, 2, 3)
    assert segment.positions.tolist() == [2, 3, 4]
    assert segment.keys.untyped_storage().data_ptr() == store.keys.untyped_storage().data_ptr()
    assert segment.scores is not None
    assert segment.scores.tolist() == [51.0, 51.5, 52.0]
    assert store.segment(0, 5, 3).slots == store.segment(0, 6, 5).slots == store.segment(0, 20, 0).slots == 0


def test_storage_born_under_inference_mode_is_writable_outside_it(kind: str, ledger: Ledger) -> None:
    """Generation often starts under inference_mode and goes on outside it."""
    model = Model(SPECS[kind])
    with torch.inference_mode():
        store = LayerStore(SPECS[kind], (8, 8, 8), ledger)
        model.append(store, 3)
        store = store.resized((9, 9, 9))
    model.append(store, 2)
    settle(store, model)
    with torch.inference_mode():
        store = store.compacted(model.compact([[0, 1]] * 3, 1, 1, bias=0.5), [1] * 3, 1)
        store = store.resized((6, 6, 6))
    model.append(store, 2)
    settle(store, model)
    assert contents(store) == model.heads


def test_the_ledger_is_asked_before_a_store_is_allocated(ledger: Ledger) -> None:
    """A store that does not fit is refused and nothing is held."""
    with pytest.raises(MemoryCapExceeded, match="a layer's slots needs"):
        LayerStore(SPECS["float32"], (CAP // 56, 1, 1), ledger)
    assert ledger.resident == 0


def test_a_failed_copy_leaves_the_old_store_and_its_bytes(kind: str, ledger: Ledger) -> None:
    """A fault while the new store is written frees the new one."""
    model, store = Model(SPECS[kind]), LayerStore(SPECS[kind], (6, 6, 6), ledger)
    model.append(store, 6)
    settle(store, model)
    before = ledger.resident
    broken = Compaction((HeadCompaction(torch.tensor([9])),) * 3)
    with pytest.raises((IndexError, RuntimeError)):
        store.compacted(broken, [1] * 3, 1)
    with pytest.raises(RuntimeError):
        store.resized((6, 6, 3))
    assert ledger.resident == before
    assert contents(store) == model.heads


def test_a_failed_allocation_holds_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the machine itself has no memory left, the ledger does not count what was never there."""

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(RuntimeError, match="can't allocate"):
        LayerStore(SPECS["float32"], (6, 6, 6), ledger)
    assert ledger.resident == 0


def test_the_range_of_beta_leaves_headroom_out() -> None:
    """Empty slots hold zeros; they are no β of the memory."""
    spec = next(iter(SPECS.values()))
    store = LayerStore(spec, (4, 4, 4), Ledger(1 << 20))
    assert store.bias_range() == (0.0, 0.0)
    store.append(
        torch.zeros(3, 2, spec.shape.key_dim, dtype=spec.dtype),
        torch.zeros(3, 2, spec.shape.value_dim, dtype=spec.dtype),
    )
    kept = torch.tensor([0, 1])
    heads = tuple(HeadCompaction(kept, bias=torch.tensor([1.5, 0.5]) + head) for head in range(3))

    replaced = store.compacted(Compaction(heads), begins=[0] * len(heads), recent=0, headroom=2)

    assert replaced.capacities == (4, 4, 4)
    assert replaced.bias_range() == (0.5, 3.5)


def test_a_store_whose_construction_was_interrupted_is_dropped_in_silence() -> None:
    """Before its first line it has no ledger, and holds nothing."""
    LayerStore.__new__(LayerStore).__del__()
