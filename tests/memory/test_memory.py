"""The memory: rows under one cap, compacted at the right moments, counted to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agentmem.engine import Engine
from agentmem.errors import MemoryCapExceeded, MemoryClosed, SettingsRefused, UnsupportedGeneration
from agentmem.hf import describe
from agentmem.memory.forwards import Arriving, Transient
from agentmem.memory.memory import Memory, Usage
from agentmem.planning.capacity import make_plan
from agentmem.reference_queries.probe import make_probe
from agentmem.reporting.report import CompactionReport
from agentmem.settings import Settings
from agentmem.testing import peak_allocated, tiny_model
from oracles import attention as reference
from support import tiny
from support.no_model import Forwards, engine

KINDS = pytest.mark.parametrize("kind", tiny.KINDS)
SOME = pytest.mark.parametrize("kind", ["window", "heavy-hitters", "live+replay", "replay+spread", "random", "context"])
"""Every path of attention and every kind of reference queries, each once."""


# ---- the cap


@KINDS
def test_the_ledger_is_right_after_every_forward(kind: str) -> None:
    """What it holds is what the storages hold, R + T never crosses the cap, and a full memory is full."""
    with tiny.capped(kind) as memory:  # audits after every forward
        tiny.feed(memory, tiny.ids(100))
        tiny.feed(memory, tiny.ids(30), pieces=1)
        report = memory.report()
        assert report.num_compactions >= 3
        assert report.peak_bytes <= report.cap_bytes
        assert report.num_prompt_tokens == 100
        assert report.num_new_tokens == 30
        for each in report.compactions:
            assert each.slots_after == memory.plan.target * 4
            assert each.bytes_peak <= report.cap_bytes


@KINDS
def test_a_whole_compaction_allocates_no_more_than_planned(kind: str) -> None:
    """The profiler's peak of budgets, fits, checks, commits and headroom stays within T, and R + T under the cap."""
    runs, reference_queries = filled(kind)
    memory = runs.memory

    def visit(_: object, __: int, step: Transient) -> None:
        for layer, queries in enumerate(reference_queries):
            step.visit(layer, queries)

    runs.forwards = Forwards(visit)
    row = memory.sequences[0]
    reports: list[CompactionReport | None] = []

    def compact() -> None:
        for layer, store in enumerate(row.stores):  # born again: the profiler sees only frees of what it saw allocated
            assert store is not None
            row.replace(layer, store.resized(store.capacities))
        reports.append(runs.compact(row))

    resident = memory.ledger.resident - memory.plan.stored_bytes
    memory.ledger.cap += memory.plan.capacity * 2 * 148  # for the rebirth alone
    spent = peak_allocated(compact) - resident
    assert reports[0] is not None
    assert reports[0].slots_after < reports[0].slots_before == 1800
    assert 0 < spent <= memory.plan.workspace_bytes
    assert spent <= reports[0].bytes_peak - reports[0].bytes_before
    assert reports[0].bytes_peak <= memory.settings.cap


def filled(kind: str) -> tuple[Engine, list[torch.Tensor]]:
    """The engine of a full memory of 3 layers without a model, and the reference queries of a probe."""
    policy = tiny.KINDS[kind]
    shape = describe(tiny.llama(3).config, itemsize=4)
    settings = {**tiny.SETTINGS, "max_slots": 300, "chunk": 64}
    plan = make_plan(shape, Settings.of(cap=1 << 30, **settings), policy)
    memory = Memory(shape, Settings.of(cap=plan.resident_bytes + plan.workspace_bytes, **settings), policy)
    memory.bind(1)
    runs = engine(memory)
    for start in range(0, 300, 60):
        positions = list(range(start, start + 60))
        step = runs.begin([Arriving(positions, positions, slice(None))])
        for layer in range(3):
            step.attend(layer, torch.randn(1, 4, 60, 16), torch.randn(1, 2, 60, 16), torch.randn(1, 2, 60, 16), 0.25)
        runs.commit()
    return runs, [torch.randn(4, max(1, memory.plan.probe_tokens), 16) for _ in range(3)]


@SOME
def test_a_capped_generate_peaks_no_higher_than_one_chunk_plus_the_cap(kind: str) -> None:
    """A prompt of 4 x the cap and new tokens: the peak, less that of a forward of one chunk, is under the cap."""
    model, prompt = tiny.llama(), tiny.ids(4 * tiny.SLOTS)
    cap = tiny.need(kind, model)
    with torch.no_grad():
        tiny_chunk = prompt[:, : tiny.SETTINGS["chunk"]]
        forward = peak_allocated(lambda: model(tiny_chunk, use_cache=False, logits_to_keep=1))
    seen: list[int] = []

    def run() -> None:
        with tiny.capped(kind, cap=cap) as memory:
            model.generate(prompt, past_key_values=memory, max_new_tokens=12, do_sample=False)
            seen.append(len(memory.compactions))

    peak = peak_allocated(run)
    assert seen[0] >= 5
    assert peak - forward <= cap


def test_closing_frees_every_byte_and_a_closed_memory_refuses_work() -> None:
    """R is 0, the reports stay readable, and forwards and compactions are refused."""
    with tiny.capped("live") as memory:
        tiny.feed(memory, tiny.ids(60))
        memory.memory.close()
        assert memory.memory.ledger.resident == memory.memory.ledger.transient == 0
        assert memory.usage().total_slots == 0
        assert memory.report().num_compactions == 1
        with pytest.raises(MemoryClosed, match="open another"):
            tiny.feed(memory, tiny.ids(1))
        with pytest.raises(MemoryClosed, match="open another"):
            memory.compact()
        memory.memory.close()
        assert memory.memory.ledger.resident == 0


# ---- moments


@SOME
def test_compactions_follow_from_the_tokens_however_they_are_cut(kind: str) -> None:
    """One prompt, pieces of 7 and single tokens give the same compactions and the same logits."""
    tokens, outcomes = tiny.ids(140), []
    for pieces in (1 << 20, 7, 1):
        with tiny.capped(kind) as memory:
            logits = tiny.feed(memory, tokens, pieces)
            moments = [(each.tokens_seen, each.slots_before, each.slots_after) for each in memory.compactions]
            outcomes.append((moments, logits))
    first = outcomes[0][0]
    assert [seen for seen, *_ in first] == [48, 72, 96, 120]
    for moments, logits in outcomes[1:]:
        assert moments == first
        assert torch.allclose(logits, outcomes[0][1], atol=1e-3)


@KINDS
def test_a_row_in_a_batch_is_the_row_alone(kind: str) -> None:
    """Left-padded rows of other lengths give the tokens and the compactions that each gives alone."""
    model, prompts = tiny.llama(), [tiny.ids(70, seed=1), tiny.ids(41, seed=2), tiny.ids(5, seed=3)]
    batch = torch.cat([torch.cat((torch.zeros(1, 70 - p.shape[1], dtype=torch.int64), p), 1) for p in prompts])
    mask = torch.stack([torch.arange(70) >= 70 - p.shape[1] for p in prompts]).long()
    settings = {"max_new_tokens": 30, "do_sample": False}
    with tiny.capped(kind, cap=1 << 24) as memory:
        together = model.generate(batch, attention_mask=mask, past_key_values=memory, **settings)
        moments = [(each.row, each.tokens_seen) for each in memory.compactions]
    for row, prompt in enumerate(prompts):
        with tiny.capped(kind, cap=1 << 24) as memory:
            alone = model.generate(prompt, past_key_values=memory, **settings)
            assert [(row, each.tokens_seen) for each in memory.compactions] == [m for m in moments if m[0] == row]
        assert together[row, 70:].tolist() == alone[0, prompt.shape[1] :].tolist()


def test_pads_neither_see_nor_are_seen() -> None:
    """A left-padded batch attends as the float64 oracle says; pads get zeros, and hold no slots."""
    shape = describe(tiny.llama(1).config, itemsize=4)
    memory = Memory(shape, Settings.of(cap=1 << 20, **tiny.SETTINGS), tiny.KINDS["window"])
    memory.bind(3)
    valid = [[True] * 6, [False, False, True, True, True, True], [False] * 6]
    queries, keys, values = torch.randn(3, 4, 6, 16), torch.randn(3, 2, 6, 16), torch.randn(3, 2, 6, 16)
    arriving = [arrives(row) for row in valid]
    runs = engine(memory)
    step = runs.begin(arriving)
    output = step.attend(0, queries, keys, values, 0.25)
    runs.commit()
    expected = reference.padded(queries, keys, values, valid, 0.25)
    assert torch.allclose(output.double(), expected, atol=1e-5)
    assert [row.held for row in memory.sequences] == [12, 8, 0]
    assert [row.next_position for row in memory.sequences] == [6, 4, 0]


def arrives(valid: list[bool]) -> Arriving:
    """Token 7 in every valid column, at positions from 0."""
    columns = [column for column, present in enumerate(valid) if present]
    return Arriving([7] * len(columns), list(range(len(columns))), torch.tensor(columns, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["window", "replay"])
def test_positions_stay_with_their_slots(kind: str) -> None:
    """After many compactions every head's positions ascend; prefix and recent are the first and the last tokens."""
    with tiny.capped(kind) as memory:
        tiny.feed(memory, tiny.ids(169))
        row = memory.memory.sequences[0]
        assert memory.compactions[-1].tokens_seen == 168
        for store in row.stores:
            assert store is not None
            for head in range(2):
                settled = store.segment(head, 0, 1).positions.tolist()
                assert settled[:4] == [0, 1, 2, 3]
                assert settled[-8:] == list(range(160, 168))
                assert settled == sorted(set(settled))
        assert list(row.tail) == [168]
        assert row.next_position == 169


@SOME
def test_the_global_random_state_is_untouched(kind: str) -> None:
    """Probes, fits and samples draw from the memory's own generator."""
    before = torch.random.get_rng_state()
    with tiny.capped(kind) as memory:
        tiny.feed(memory, tiny.ids(100))
        assert memory.compactions
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_probe_leaves_nothing_behind() -> None:
    """Slots, scores, ids and positions are after a transient forward what they were."""
    with tiny.capped("replay") as memory:
        tiny.feed(memory, tiny.ids(40))
        row = memory.memory.sequences[0]
        stores = [store for store in row.stores if store is not None]
        before = [(store.keys.clone(), store.bias.clone(), list(store.lengths)) for store in stores]
        visited: list[int] = []
        probe = make_probe(row.ids, memory.memory.policy.queries, 16, {}, prefix=4, turn=0)
        step = Transient(memory.memory, row, lambda layer, _: visited.append(layer))
        memory.engine.forwards.run(probe.ids, row.next_position, step)
        assert visited == [0, 1]
        assert (row.seen, row.next_position, row.room) == (40, 40, 8)
        for store, (keys, bias, lengths) in zip(stores, before, strict=True):
            assert torch.equal(store.keys[:40], keys[:40])
            assert torch.equal(store.bias, bias)
            assert store.lengths == lengths
        tiny.audit(memory.memory)


# ---- controls


def test_manual_compacts_on_demand_only() -> None:
    """A full memory refuses the next token by name; after compact() it goes on."""
    with tiny.capped("replay", mode="manual") as memory:
        tiny.feed(memory, tiny.ids(48))
        with pytest.raises(MemoryCapExceeded, match=r"holds 48 of 48 slots.*mode='manual'.*memory\.compact\(\)"):
            tiny.feed(memory, tiny.ids(1))
        assert memory.room() == 0
        (report,) = memory.compact()
        assert report.slots_after == 4 * memory.plan.target
        assert memory.room() == 24
        assert memory.compact() == ()
        tiny.feed(memory, tiny.ids(24))


def test_off_never_compacts() -> None:
    """Neither by itself nor on demand, and the refusals do not advise what would be refused."""
    with tiny.capped("replay", mode="off") as memory:
        tiny.feed(memory, tiny.ids(48))
        with pytest.raises(MemoryCapExceeded, match="mode='off'") as refused:
            tiny.feed(memory, tiny.ids(1))
        assert "memory.compact()" not in str(refused.value)
        with pytest.raises(SettingsRefused, match=r"mode='off'.*mode='manual'"):
            memory.compact()


def test_a_policy_that_never_compacts_ends_at_the_cap() -> None:
    """``full`` fills its slots and refuses the next token; what it holds stays readable."""
    model = tiny.llama()
    cap = 40_000
    with tiny.agentmem.api.capped(model, cap=cap, policy="full", keep_first=0, keep_recent=0, chunk=16) as memory:
        capacity = memory.plan.capacity
        tiny.feed(memory, tiny.ids(capacity))
        with pytest.raises(MemoryCapExceeded, match=rf"holds {capacity} of {capacity} slots.*'full' never compacts"):
            tiny.feed(memory, tiny.ids(1))
        assert memory.compact() == ()
        assert memory.transcript() == tiny.ids(capacity)[0].tolist()
        assert memory.report().peak_bytes <= cap


def test_a_forward_that_wants_all_logits_must_fit() -> None:
    """It cannot be cut, so it is refused with the room there is; nothing was appended."""
    model = tiny.llama()
    with tiny.capped("window", chunk=64) as memory, pytest.raises(MemoryCapExceeded, match=r"49 tokens.*48"):
        model(input_ids=tiny.ids(49), past_key_values=memory)
    with tiny.capped("window") as memory:
        with pytest.raises(MemoryCapExceeded, match=r"17 tokens.*16.*chunk"):
            model(input_ids=tiny.ids(17), past_key_values=memory)
        assert memory.report().total_slots == 0
        assert model(input_ids=tiny.ids(16), past_key_values=memory).logits.shape[1] == 16


def test_a_memory_serves_the_batch_that_it_began_with() -> None:
    """Another number of rows is refused, with both numbers."""
    with tiny.capped("window", cap=1 << 20) as memory:
        tiny.feed(memory, tiny.ids(3))
        with pytest.raises(UnsupportedGeneration, match=r"batch of 2 row\(s\).*memory of 1"):
            tiny.llama()(input_ids=tiny.ids(2).T, past_key_values=memory, logits_to_keep=1)


def test_subscribers_hear_of_every_forward_and_compaction() -> None:
    """A Usage after every forward, a report with every compaction, in order."""
    heard: list[CompactionReport | Usage] = []
    with tiny.capped("window") as memory:
        memory.subscribe(heard.append)
        tiny.feed(memory, tiny.ids(50), pieces=10)
        usages = [each for each in heard if isinstance(each, Usage)]
        reports = [each for each in heard if isinstance(each, CompactionReport)]
        assert [each.tokens_seen for each in usages] == [10, 20, 30, 40, 48, 50]
        assert reports == list(memory.compactions)
        assert isinstance(heard[5], CompactionReport)
        assert usages[-1] == memory.usage()
        assert usages[-1].used_bytes == (24 + 2) * 4 * 136
        assert usages[-1].resident_bytes == 48 * 4 * 136


@pytest.mark.parametrize("kind", ["window", "heavy-hitters", "replay"])
def test_sliding_layers_stay_in_their_window(kind: str) -> None:
    """A model of which half the layers slide: the cap holds, full layers are compacted, sliding ones slide."""
    model = tiny_model("gemma3_text", sliding_window=12)
    with tiny.capped(kind, model) as memory:
        whole = tiny.feed(memory, tiny.ids(100), model=model)
        assert [each.layers[0].layer for each in memory.compactions] == [1] * len(memory.compactions)
        sliding = memory.memory.sequences[0].stores[0]
        assert sliding is not None
        assert sliding.lengths[0] <= 12 - 1 + 12
    with tiny.capped(kind, model) as memory:
        assert torch.allclose(tiny.feed(memory, tiny.ids(100), 1, model=model), whole, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@SOME
def test_half_precision_models_keep_their_dtype(kind: str, dtype: torch.dtype) -> None:
    """Slots are stored in the model's dtype, β in float32, and the logits are finite."""
    model: Any = tiny_model("llama", dtype=dtype)
    with tiny.capped(kind, model) as memory:
        assert torch.isfinite(tiny.feed(memory, tiny.ids(80), model=model)).all()
        store = memory.memory.sequences[0].stores[0]
        assert store is not None
        assert (store.keys.dtype, store.bias.dtype) == (dtype, torch.float32)


def test_old_reports_say_nothing_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory that lives long keeps the newest reports whole and the numbers of all others."""
    monkeypatch.setattr("agentmem.memory.reports.WHOLE_REPORTS", 2)
    with tiny.capped("replay") as memory:
        tiny.feed(memory, tiny.ids(150))
        reports = memory.report().compactions
    assert len(reports) >= 4
    assert [bool(report.layers) for report in reports] == [False] * (len(reports) - 2) + [True] * 2
    assert all(report.slots_after < report.slots_before for report in reports)
