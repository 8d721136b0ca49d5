"""One compaction: every state between two commits is valid, whatever fails or interrupts it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from agentmem import api
from agentmem.contracts import BudgetRequest, Budgets, Compaction, HeadCompaction, Policy, Survey
from agentmem.errors import CompactionFailed, PolicyContractBroken
from agentmem.hf import CappedCache
from agentmem.hf.cache import TransientCache
from agentmem.memory.forwards import Transient, _roomy
from agentmem.memory.memory import Memory
from agentmem.memory.sequence import Consumed
from agentmem.testing import peak_allocated
from support import tiny

LAYERS = 3
STATES = pytest.mark.parametrize("layer", range(LAYERS))
KINDS = pytest.mark.parametrize("kind", ["window", "heavy-hitters", "replay", "live"])
FULL = tiny.SLOTS
MODEL = tiny.llama(LAYERS)


def made(kind: str) -> Policy:
    """The policy of that kind."""
    return tiny.KINDS[kind]


def faulty(kind: str, layer: int, errors: Sequence[BaseException]) -> Policy:
    """The policy of that kind, raising these errors one after another at that layer."""
    policy = made(kind)
    assert policy.compactor is not None
    return replace(policy, name="faulty", compactor=tiny.Faulty(policy.compactor, layer, list(errors)))


def faults(count: int) -> list[BaseException]:
    """So many faults."""
    return [RuntimeError(f"fault {index}") for index in range(count)]


def snapshot(memory: Memory) -> list[tuple[torch.Tensor, ...]]:
    """Copies of all slots of row 0, head after head: keys, values, β."""
    runs = [run for store in memory.sequences[0].stores if store is not None for run in store.runs()]
    blank = [torch.zeros(run.keys.shape[:2]) if run.bias is None else run.bias for run in runs]
    return [(run.keys.clone(), run.values.clone(), bias.clone()) for run, bias in zip(runs, blank, strict=True)]


def same(left: list[tuple[torch.Tensor, ...]], right: list[tuple[torch.Tensor, ...]]) -> bool:
    """Whether two snapshots are equal to the bit."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def decoded(memory: CappedCache) -> torch.Tensor:
    """The hidden states of three tokens that the memory is asked about and does not keep."""
    row = memory.memory.sequences[0]
    windows = [None] * LAYERS
    step = Transient(memory.memory, row, lambda *_: None)
    with torch.no_grad():
        result: Any = MODEL.get_decoder()(
            input_ids=torch.tensor([[9, 8, 7]]),
            position_ids=torch.arange(row.next_position, row.next_position + 3)[None],
            past_key_values=TransientCache(step, windows),
            use_cache=True,
        )
    return result.last_hidden_state


def feed(memory: CappedCache, tokens: torch.Tensor, pieces: int = 1 << 20) -> torch.Tensor:
    """Feed the shared model."""
    return tiny.feed(memory, tokens, pieces, model=MODEL)


def undisturbed(policy: Policy, tokens: torch.Tensor) -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor, list[int]]:
    """Slots after the tokens, their logits and the next 30 greedy tokens when nothing goes wrong."""
    with tiny.capped_by(policy, MODEL) as memory:
        logits = feed(memory, tokens)
        slots = snapshot(memory.memory)
        return slots, logits, tiny.greedy(memory, int(logits.argmax()), 30, model=MODEL)


# ---- state k


@KINDS
@STATES
def test_every_state_between_two_commits_decodes(kind: str, layer: int) -> None:
    """Failing at layer k leaves the memory that has its layers before k compacted, and no other."""
    tokens = tiny.ids(FULL)
    with tiny.capped_by(faulty(kind, layer, faults(2)), MODEL, on_failure="raise") as memory:
        feed(memory, tokens)
        said = rf"'faulty' failed 2 times at layer {layer} \(RuntimeError: fault 1"
        with pytest.raises(CompactionFailed, match=said):
            memory.compact()
        tiny.audit(memory.memory)
        slots, states, job = snapshot(memory.memory), decoded(memory), memory.memory.sequences[0].job
        assert memory.transcript() == tokens[0].tolist()
    with tiny.capped_by(made(kind), MODEL) as memory:
        feed(memory, tokens)
        assert job is not None
        changed = tuple(allocated if index < layer else (FULL,) * 2 for index, allocated in enumerate(job.budgets))
        core = memory.memory
        core.sequences[0].change(job=replace(job, policy=core.policy, plan=core.plan, budgets=changed))
        memory.compact()
        lengths = [store.lengths[0] for store in memory.memory.sequences[0].stores if store is not None]
        assert lengths == [24] * layer + [48] * (LAYERS - layer)
        assert same(slots, snapshot(memory.memory))
        assert torch.equal(states, decoded(memory))


@KINDS
@STATES
def test_a_raised_failure_is_made_good_by_the_next_forward(kind: str, layer: int) -> None:
    """The compaction goes on where it was; afterwards nothing differs from a memory that never failed."""
    slots, logits, tokens = undisturbed(made(kind), tiny.ids(FULL + 1))
    with tiny.capped_by(faulty(kind, layer, faults(2)), MODEL, on_failure="raise") as memory:
        feed(memory, tiny.ids(FULL))
        with pytest.raises(CompactionFailed):
            feed(memory, tiny.ids(FULL + 1)[:, FULL:])
        assert torch.equal(feed(memory, tiny.ids(FULL + 1)[:, FULL:]), logits)
        assert same(snapshot(memory.memory), slots)
        assert tiny.greedy(memory, int(logits.argmax()), 30, model=MODEL) == tokens
        assert memory.report().num_compactions == 2


@KINDS
@STATES
def test_one_fault_is_retried(kind: str, layer: int) -> None:
    """The remaining layers are tried again at once, nothing is lost, and the report says so."""
    slots, *_ = undisturbed(made(kind), tiny.ids(FULL + 1))
    with tiny.capped_by(faulty(kind, layer, faults(1)), MODEL) as memory:
        feed(memory, tiny.ids(FULL + 1))
        (report,) = memory.compactions
        assert same(snapshot(memory.memory), slots)
    outcomes = ["compacted"] * layer + ["retried"] * (LAYERS - layer)
    assert [each.outcome for each in report.layers] == outcomes
    assert report.faults == (f"layer {layer}: RuntimeError: fault 0 (tried again)",)


@KINDS
@STATES
def test_two_faults_evict_the_remaining_layers(kind: str, layer: int) -> None:
    """They keep their newest slots, within the budgets; the report says so and generation goes on."""
    with tiny.capped_by(faulty(kind, layer, faults(2)), MODEL, on_failure="evict") as memory:
        feed(memory, tiny.ids(FULL))
        before = snapshot(memory.memory)
        (report,) = memory.compact()
        assert [each.outcome for each in report.layers] == ["compacted"] * layer + ["evicted"] * (LAYERS - layer)
        assert [each.slots_after for each in report.layers] == [48] * LAYERS
        assert [fault.rsplit("(", 1)[1] for fault in report.faults] == ["tried again)", "evicted to budget)"]
        for index in range(layer, LAYERS):
            keys, _, bias = snapshot(memory.memory)[index]
            assert torch.equal(keys, before[index][0][:, [*range(4), *range(28, 48)]])
            assert not bias.any()
        assert len(tiny.greedy(memory, 5, 60, model=MODEL)) == 60
        assert memory.report().num_compactions == 3


def test_stop_ends_generation_with_the_tokens_so_far() -> None:
    """``on_failure="stop"`` returns what was generated; the report has the reason."""
    policy = faulty("replay", 1, faults(2))
    with api.wrap(MODEL, cap=1 << 24, policy=policy, on_failure="stop", **tiny.SETTINGS) as model:
        result = model.generate(tiny.ids(40), max_new_tokens=30, do_sample=False)
        assert "failed 2 times at layer 1" in str(model.report().stopped)
        assert result.shape == (1, FULL)
        tiny.audit(model.memory.memory)
    with api.wrap(MODEL, cap=1 << 24, policy="am-halving", **tiny.SETTINGS) as model:
        whole = model.generate(tiny.ids(40), max_new_tokens=30, do_sample=False)
        assert torch.equal(whole[:, :FULL], result)


@pytest.mark.parametrize("kind", ["replay", "repeat"])
@STATES
def test_a_probe_that_fails_is_a_fault_like_any_other(kind: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises in the transient forward, between two layers, is retried."""
    slots, *_ = undisturbed(made(kind), tiny.ids(FULL + 1))
    errors, attend = faults(1), Transient.attend

    def failing(self: Transient, at: int, *args: Any) -> torch.Tensor:
        output = attend(self, at, *args)
        if at == layer and errors:
            raise errors.pop()
        return output

    monkeypatch.setattr(Transient, "attend", failing)
    with tiny.capped_by(made(kind), MODEL) as memory:
        feed(memory, tiny.ids(FULL + 1))
        (report,) = memory.compactions
        outcomes = [each.outcome for each in report.layers]
        assert outcomes == ["compacted"] * (layer + 1) + ["retried"] * (LAYERS - layer - 1)
        remedy = "tried again" if layer + 1 < LAYERS else "every layer was done"
        assert report.faults == (f"layer {min(layer + 1, LAYERS - 1)}: RuntimeError: fault 0 ({remedy})",)
        assert same(snapshot(memory.memory), slots)


def test_a_fault_keeps_no_old_slots_alive() -> None:
    """The error's traceback holds no views: the peak stays within the cap although nothing is garbage-collected."""
    cap = tiny.need("window", MODEL)
    policy = faulty("window", 1, faults(2))

    def run() -> None:
        with tiny.capped_by(policy, MODEL, cap=cap) as memory:
            row = bound(memory.memory)
            for store in row.stores:
                assert store is not None
                store.append(torch.zeros(1).expand(2, FULL, 16), torch.zeros(1).expand(2, FULL, 16))
            gc.disable()
            memory.engine.compact(row)

    def bound(memory: Memory) -> Any:
        memory.bind(1)
        row = memory.sequences[0]
        for layer in range(LAYERS):
            _roomy(memory, row, layer, torch.zeros(1), FULL)
        row.write(range(FULL), range(FULL))
        memory.progress.consumed = Consumed((FULL,), (FULL,))
        row.change(full_at=FULL)
        return row

    try:
        assert peak_allocated(run) <= FULL * 2 * 136 * (LAYERS + 1) + 2 * 24 * 8 + 64
    finally:
        gc.enable()


# ---- interrupts


@KINDS
@STATES
def test_an_interrupt_in_mid_compaction_costs_nothing(kind: str, layer: int) -> None:
    """KeyboardInterrupt passes through; the same forward again gives what an undisturbed memory gives."""
    slots, logits, tokens = undisturbed(made(kind), tiny.ids(FULL + 1))
    with tiny.capped_by(faulty(kind, layer, [KeyboardInterrupt()]), MODEL) as memory:
        with pytest.raises(KeyboardInterrupt):
            feed(memory, tiny.ids(FULL + 1))
        tiny.audit(memory.memory)
        assert memory.transcript() == tiny.ids(FULL + 1)[0, :FULL].tolist()
        assert torch.equal(feed(memory, tiny.ids(FULL + 1)[:, FULL:]), logits)
        assert same(snapshot(memory.memory), slots)
        assert tiny.greedy(memory, int(logits.argmax()), 30, model=MODEL) == tokens


def interrupting(layer: int) -> Callable[[], None]:
    """Let the next forward end with KeyboardInterrupt right after that layer's attention."""

    def interrupt(*_: object) -> None:
        handle.remove()
        raise KeyboardInterrupt

    handle = MODEL.model.layers[layer].self_attn.register_forward_hook(interrupt)
    return handle.remove


@pytest.mark.parametrize("kind", ["window", "replay", "live"])
@pytest.mark.parametrize("fed", [1, 5])
@STATES
def test_an_interrupt_in_mid_forward_costs_nothing(kind: str, fed: int, layer: int) -> None:
    """What some layers had appended is taken back; the same tokens again give what they would have given."""
    start = 30
    _, logits, tokens = undisturbed(made(kind), tiny.ids(start + fed))
    with tiny.capped_by(made(kind), MODEL) as memory:
        feed(memory, tiny.ids(start + fed)[:, :start])
        interrupting(layer)
        with pytest.raises(KeyboardInterrupt):
            feed(memory, tiny.ids(start + fed)[:, start:])
        assert memory.transcript() == tiny.ids(start + fed)[0, :start].tolist()
        again = feed(memory, tiny.ids(start + fed)[:, start:])
        assert torch.allclose(again, logits, atol=1e-4)
        assert tiny.greedy(memory, int(again.argmax()), 30, model=MODEL) == tokens


@pytest.mark.parametrize("kind", ["window", "replay"])
def test_compacting_by_hand_after_an_interrupt(kind: str) -> None:
    """The unfinished forward is taken back first, so that every layer compacts the same tokens."""
    slots = []
    for broken in (False, True):
        with tiny.capped_by(made(kind), MODEL) as memory:
            feed(memory, tiny.ids(40))
            if broken:
                interrupting(1)
                with pytest.raises(KeyboardInterrupt):
                    feed(memory, tiny.ids(1))
            memory.compact()
            slots.append(snapshot(memory.memory))
            stores = [store for store in memory.memory.sequences[0].stores if store is not None]
            assert [store.segment(0, 0, 0).positions[-8:].tolist() for store in stores] == [list(range(32, 40))] * 3
    assert same(*slots)


def test_an_error_in_mid_forward_is_taken_back_at_once() -> None:
    """A fault of the model's own code leaves every layer with the tokens that were consumed, and no more."""
    with tiny.capped_by(made("window"), MODEL) as memory:
        feed(memory, tiny.ids(30))
        handle = MODEL.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            feed(memory, tiny.ids(3))
        handle.remove()
        assert [store.seen for store in memory.memory.sequences[0].stores if store is not None] == [30] * LAYERS
        assert memory.usage().total_slots == 30 * 2 * LAYERS


# ---- policies that break their contract


@pytest.mark.parametrize("layer", [0, 2])
def test_a_broken_contract_is_raised_and_nothing_of_that_layer_committed(layer: int) -> None:
    """It names policy, layer, head and invariant; a mended policy goes on from there."""
    policy = faulty("window", layer, [])
    assert isinstance(policy.compactor, tiny.Faulty)
    compactor, inner = policy.compactor, policy.compactor.inner

    def too_few(segment: Any, slots: Sequence[int]) -> Compaction:
        if segment.layer == layer:
            return Compaction(tuple(HeadCompaction(torch.arange(count - 1)) for count in slots))
        return inner.compact(segment, slots)

    compactor.compact = too_few  # type: ignore[method-assign]
    with tiny.capped_by(policy, MODEL) as memory:
        feed(memory, tiny.ids(FULL))
        said = rf"'faulty', layer {layer}, head 0: .*exactly 12 slots.*got \[11\]"
        with pytest.raises(PolicyContractBroken, match=said):
            memory.compact()
        lengths = [store.lengths for store in memory.memory.sequences[0].stores if store is not None]
        assert lengths == [[24, 24]] * layer + [[48, 48]] * (LAYERS - layer)
        tiny.audit(memory.memory)
        compactor.compact = inner.compact  # type: ignore[method-assign]
        feed(memory, tiny.ids(1))
        assert memory.report().num_compactions == 1


class Ragged(Budgets):
    """Allocates more to the first head of every layer, up to what it holds; says what it was asked."""

    needs_survey = False
    head_ceiling = 1.5

    def __init__(self, wrong: int = 0) -> None:
        self.wrong = wrong
        self.requests: list[BudgetRequest] = []

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Three quarters and a quarter of what a layer's heads would get alike."""
        self.requests.append(request)
        each = request.total // len(request.held)
        first = tuple(min(held[0], each * 3 // 4) for held in request.held)
        return tuple((count, each - count + self.wrong) for count in first)


def test_unequal_budgets_cost_unequal_bytes() -> None:
    """Heads hold what they were allocated; headroom is alike for all; the bytes are those of equal budgets."""
    budgets = Ragged()
    with tiny.capped_by(replace(made("replay"), budgets=budgets), MODEL) as memory:
        feed(memory, tiny.ids(FULL))
        for _ in range(3):
            (report,) = memory.compact()
            stores = [store for store in memory.memory.sequences[0].stores if store is not None]
            assert [store.lengths for store in stores] == [[12 + 18, 12 + 6]] * LAYERS
            assert [store.capacities for store in stores] == [(54, 42)] * LAYERS
            assert report.bytes_after == FULL * 2 * LAYERS * 136 == memory.memory.ledger.resident
            feed(memory, tiny.ids(24))
    ceilings = {"ceiling": 18, "layer_ceiling": 24, "limit": 12 * 6}
    assert budgets.requests[0] == BudgetRequest(((36, 36),) * 3, 12 * 6, 1, **ceilings)
    assert budgets.requests[1].held == ((42, 30),) * 3


@pytest.mark.parametrize(
    ("wrong", "invariant"), [(1, "exceed its ceiling 24"), (-1, "sum to 69 slots"), (100, "outside")]
)
def test_budgets_that_break_their_laws_are_refused(wrong: int, invariant: str) -> None:
    """Their sum and their bounds are checked before any layer is touched."""
    with tiny.capped_by(replace(made("window"), budgets=Ragged(wrong), name="greedy"), MODEL) as memory:
        feed(memory, tiny.ids(FULL))
        before = snapshot(memory.memory)
        with pytest.raises(PolicyContractBroken, match=f"'greedy'.*{invariant}"):
            memory.compact()
        assert same(snapshot(memory.memory), before)
        assert memory.memory.sequences[0].job is None


class Surveying(Ragged):
    """Uniform budgets that want to see scores."""

    needs_survey = True


def test_a_survey_pass_comes_before_the_fits() -> None:
    """Budgets that need scores get one survey a layer, in order, of every segment slot."""
    budgets = Surveying()
    with tiny.capped_by(replace(made("replay"), budgets=budgets), MODEL) as memory:
        feed(memory, tiny.ids(FULL + 1))
    (request,) = budgets.requests
    assert [survey.layer for survey in request.surveys] == [0, 1, 2]
    assert all(isinstance(survey, Survey) and [len(s) for s in survey.scores] == [36, 36] for survey in request.surveys)
