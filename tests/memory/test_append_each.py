"""One token for each of many rows: as if each were appended alone, and valid wherever it is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from agentmem import plugins
from agentmem.attention import decode
from agentmem.contracts import Policy
from agentmem.errors import MemoryCapExceeded
from agentmem.memory.forwards import append_each, append_one
from agentmem.memory.memory import Memory
from agentmem.memory.sequence import Consumed, TokenSequence
from agentmem.memory.slot_spec import SlotSpec
from agentmem.memory.store import LayerStore
from agentmem.planning.model_shape import LayerShape, ModelShape
from agentmem.settings import Settings
from agentmem.testing import peak_allocated
from oracles import attention as reference

pytest.importorskip("agentmem.attention._decode", reason="installed without a C compiler")

Parts = Sequence[tuple[Memory, TokenSequence]]
FULL = LayerShape(kv_heads=2, query_heads=6, key_dim=16, value_dim=32)
SLIDING = replace(FULL, window=24)
LAYERS = (FULL, SLIDING)
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""How far apart two answers of one dtype may be."""
COUNTS = {"one": (40,), "two": (1, 300), "five": (7, 130, 64, 500, 3), "sixteen": tuple(range(20, 36))}
SCALE = 0.25


def opened(
    policy: str | Policy = "window",
    dtype: torch.dtype = torch.float32,
    rows: int = 1,
    layers: tuple[LayerShape, ...] = LAYERS,
) -> Memory:
    """A memory of two layers without a model, one of them sliding, with chunks of 16 tokens."""
    shape = ModelShape("two", layers, dtype.itemsize, hidden=32, intermediate=32, vocabulary=64)
    chosen = plugins.policy(policy) if isinstance(policy, str) else policy
    settings = Settings(cap=1 << 28, keep_first=2, keep_recent=4, min_reclaim=2, chunk=16, max_slots=600)
    memory = Memory(shape, settings, chosen)
    memory.bind(rows)
    return memory


def fill(parts: Parts, counts: Sequence[int], dtype: torch.dtype = torch.float32, *, room: int = 2) -> None:
    """Give each row random slots: unequal heads, every other row with β, and windows that are nearly full."""
    draw = torch.Generator().manual_seed(sum(counts))
    for index, ((memory, row), count) in enumerate(zip(parts, counts, strict=True)):
        for layer, shape in enumerate(memory.shape.layers):
            lengths = [count + 5 * head for head in range(2)] if shape.window is None else [min(count, 23)] * 2
            store = LayerStore(
                SlotSpec(shape, dtype, torch.device("cpu"), scores=memory.scored and shape.window is None),
                [length + room for length in lengths],
                memory.ledger,
            )
            store.keys.copy_(torch.randn(store.keys.shape, generator=draw))
            store.values.copy_(torch.randn(store.values.shape, generator=draw))
            for start, length in zip(store.starts, lengths, strict=True):
                store.bias[start : start + length].copy_(torch.randn(length, generator=draw))
            store.fill(lengths, lengths, seen=count, promoted=0, moves=0)
            store.biased = index % 2 == 0 and shape.window is None
            row.replace(layer, store)
        tokens = tuple(count if each is row else each.seen for each in memory.sequences)
        memory.progress.consumed = memory.progress.consumed._replace(tokens=tokens)


def made(
    counts: Sequence[int], dtype: torch.dtype = torch.float32, policy: str | Policy = "window", **settings: Any
) -> list[tuple[Memory, TokenSequence]]:
    """A row of a memory of its own for each count of slots."""
    memories = [opened(policy, dtype) for _ in counts]
    parts = [(memory, memory.sequences[0]) for memory in memories]
    fill(parts, counts, dtype, **settings)
    return parts


def tokens(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of one token for each of ``count`` rows."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((count, 6, 16), (count, 2, 16), (count, 2, 32))
    return tuple(torch.randn(*shape, generator=draw).to(dtype) for shape in shapes)


def row_by_row(parts: Parts, layer: int, given: Sequence[torch.Tensor]) -> torch.Tensor:
    """What :func:`append_each` is to give, by a call a row."""
    outputs = [
        append_one(memory, row, layer, *(each[index][:, None] for each in given), SCALE)[:, 0]
        for index, (memory, row) in enumerate(parts)
    ]
    return torch.stack(outputs)


def contents(store: LayerStore | None) -> list[tuple[torch.Tensor, ...]]:
    """Keys, values and β of the slots of each head, and how many tokens were seen."""
    assert store is not None
    heads = zip(store.starts, store.lengths, strict=True)
    columns = (store.keys, store.values, store.bias)
    return [tuple(column[start : start + length].clone() for column in columns) for start, length in heads]


def same(parts: Parts, others: Parts) -> bool:
    """Whether two lists of rows hold the same slots, bit for bit."""
    for (_, row), (_, other) in zip(parts, others, strict=True):
        for store, twin in zip(row.stores, other.stores, strict=True):
            assert store is not None
            assert twin is not None
            if store.extent != twin.extent:
                return False
            pairs = zip(contents(store), contents(twin), strict=True)
            if not all(torch.equal(a, b) for head, own in pairs for a, b in zip(head, own, strict=True)):
                return False
    return True


@pytest.mark.parametrize("layer", range(2), ids=["full", "sliding"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_are_each_row_alone(dtype: torch.dtype, counts: tuple[int, ...], layer: int) -> None:
    """The same slots as by a call a row, and the same answers; unequal heads and lengths, β, windows that slide."""
    parts, others = made(counts, dtype), made(counts, dtype)
    for seed in range(4):  # the third token needs more room
        given = tokens(len(counts), dtype, seed)
        output, expected = append_each(parts, layer, *given, SCALE), row_by_row(others, layer, given)
        assert output.dtype == dtype
        assert torch.allclose(output, expected, atol=DTYPES[dtype], rtol=DTYPES[dtype])
        assert same(parts, others)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_answer_is_the_oracle_s(counts: tuple[int, ...]) -> None:
    """Of all slots of a row, its new one included, and of none of the others' rows."""
    parts, (queries, keys, values) = made(counts), tokens(len(counts))
    output = append_each(parts, 0, queries, keys, values, SCALE)
    for index, (_, row) in enumerate(parts):
        heads = [reference.Slots(*columns) for columns in contents(row.stores[0])]
        store = row.stores[0]
        assert store is not None
        if not store.biased:
            heads = [reference.Slots(head.keys, head.values) for head in heads]
        truth = reference.attention(queries[index][:, None], heads, None, SCALE).output[:, 0]
        assert torch.equal(torch.stack([head.keys[-1] for head in heads]), keys[index])
        assert torch.allclose(output[index].double(), truth, atol=1e-5)


def test_rows_grow_from_nothing() -> None:
    """Stores are made and replaced in the middle of it, for some rows earlier than for others."""
    parts, others = ([(memory, memory.sequences[0]) for memory in (opened(), opened(), opened())] for _ in range(2))
    fill(parts[1:], (3, 41))
    fill(others[1:], (3, 41))
    for seed in range(60):
        given = tokens(3, seed=seed)
        for layer in range(2):
            output, expected = append_each(parts, layer, *given, SCALE), row_by_row(others, layer, given)
            assert torch.allclose(output, expected, atol=1e-5)
    assert same(parts, others)


def test_rows_of_one_memory() -> None:
    """A batch, whose rows hold unequal numbers of slots."""
    memory, other = opened(rows=3), opened(rows=3)
    parts, others = ([(each, row) for row in each.sequences] for each in (memory, other))
    fill(parts, (70, 5, 300))
    fill(others, (70, 5, 300))
    given = tokens(3)
    assert torch.allclose(append_each(parts, 0, *given, SCALE), row_by_row(others, 0, given), atol=1e-5)
    assert same(parts, others)


# ---- what is not for the compiled code


def test_rows_that_must_be_served_alone_go_beside_the_others() -> None:
    """Scores that are summed up, and slots of another dtype than the tokens', which they are cast to."""
    kinds = ("window", "heavy-hitters", "window")
    groups = []
    for _ in range(2):
        parts = [(memory, memory.sequences[0]) for memory in map(opened, kinds)]
        fill(parts[:2], (70, 40))
        fill(parts[2:], (30,), torch.bfloat16)
        groups.append(parts)
    given = tokens(3)
    for layer in range(2):
        output, expected = append_each(groups[0], layer, *given, SCALE), row_by_row(groups[1], layer, given)
        assert torch.allclose(output, expected, atol=1e-2)
        assert torch.allclose(output[:2], expected[:2], atol=1e-5)
    assert same(*groups)
    scored, other = (parts[1][1].stores[0] for parts in groups)
    assert scored is not None
    assert other is not None
    assert scored.scores is not None
    assert other.scores is not None
    assert scored.scores.any()
    assert torch.equal(scored.scores, other.scores)


def test_scratch_slots_are_not_scored() -> None:
    """They are taken back, and so would their scores have to be."""
    parts = made((40,), policy="heavy-hitters")
    append_each(parts, 0, *tokens(1), SCALE, scratch=True)
    store = parts[0][1].stores[0]
    assert store is not None
    assert store.scores is not None
    assert not store.scores.any()
    assert store.seen == 41


def test_sinks_are_heard_in_every_row() -> None:
    """One more logit in the denominators, so that the outputs shrink."""
    parts, others, given = made((40, 9)), made((40, 9)), tokens(2)
    plain = append_each(parts, 0, *given, SCALE)
    shrunk = append_each(others, 0, *given, SCALE, sinks=torch.full((6,), 3.0))
    assert bool((shrunk.abs().sum(-1) < plain.abs().sum(-1)).all())
    assert same(parts, others)


def test_without_the_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without a compiler appends and attends just so."""
    parts, given = made((40, 9, 300)), tokens(3)
    output = append_each(parts, 0, *given, SCALE)
    monkeypatch.setattr(decode, "COMPILED", False)
    others = made((40, 9, 300))
    assert torch.allclose(append_each(others, 0, *given, SCALE), output, atol=1e-5)
    assert same(parts, others)


def test_a_store_that_was_freed_has_no_layout() -> None:
    """Compiled code would write into memory that is somebody else's."""
    ((_, row),) = made((40,))
    store = row.stores[0]
    assert store is not None
    assert store.layout is not None
    store.free()
    assert store.layout is None


# ---- what a memory keeps of a token


@pytest.mark.parametrize("policy", ["live", "context"])
def test_stored_queries_are_those_of_every_token(policy: str) -> None:
    """Each row's sample is offered the row's own queries, in full layers only."""
    chosen = plugins.policy("am-halving", probe=policy, probe_tokens=8)
    parts, others = ([(memory, memory.sequences[0]) for memory in (opened(chosen), opened(chosen))] for _ in range(2))
    for seen in range(12):
        given = tuple(each.requires_grad_() for each in tokens(2, seed=seen))  # as outside no_grad
        for layer in range(2):
            append_each(parts, layer, *given, SCALE)
            row_by_row(others, layer, given)
        for memory, _ in (*parts, *others):
            memory.progress.consumed = Consumed((seen + 1,), (seen + 1,))
    for (_, row), (_, other) in zip(parts, others, strict=True):
        assert not row.samples[1]
        pairs = list(zip(row.samples[0], other.samples[0], strict=True))
        assert pairs
        for sample, twin in pairs:
            assert sample.filled >= 6
            assert torch.equal(sample.kept, twin.kept)
            assert not sample.queries.requires_grad


def test_every_memory_notes_the_scale_and_the_scratch() -> None:
    """Each in its own account, under its own cap."""
    parts = made((40, 300))
    append_each(parts, 0, *tokens(2), SCALE)
    for memory, _ in parts:
        assert memory.scales == [SCALE, 1.0]
        assert memory.ledger.peak >= memory.ledger.resident + memory.plan.forward_bytes
        assert memory.ledger.transient == 0


# ---- bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_its_allocations_are_what_the_memories_promised(threads: int, dtype: torch.dtype) -> None:
    """Together, the output aside: each counts its own share, and a batch counts for all of its rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, 16):
            batch = opened(dtype=dtype, rows=count)
            for parts in (made((70,) * count, dtype), [(batch, row) for row in batch.sequences]):
                if parts[0][0] is batch:
                    fill(parts, (70,) * count, dtype)
                given = tuple(torch.stack((each, each), -1)[..., 0] for each in tokens(count, dtype))
                promised = sum(memory.plan.forward_bytes for memory in {id(each): each for each, _ in parts}.values())
                output = count * 6 * 32 * dtype.itemsize
                for layer in range(2):
                    step: Callable[[], Any] = lambda layer=layer, parts=parts, given=given: append_each(  # noqa: E731
                        parts, layer, *given, SCALE
                    )
                    assert peak_allocated(step) - output <= promised
    finally:
        torch.set_num_threads(before)


def test_a_batch_plans_for_all_rows_of_a_step() -> None:
    """Where chunks are small, a step of many rows is what needs the most."""
    layer = replace(FULL, value_dim=16)  # unequal dims would make the plan count larger things
    few, many = opened(rows=1, layers=(layer,)), opened(rows=256, layers=(layer,))
    needed = decode.step_bytes(layer, 256, 4)
    assert few.plan.forward_bytes < needed <= many.plan.forward_bytes


def test_a_store_that_cannot_grow_stops_the_step_before_anything_is_written() -> None:
    """The rows before it keep what they had, and the next step serves those that fit."""
    parts = made((40, 40), room=0)
    before = [contents(row.stores[0]) for _, row in parts]
    parts[1][0].ledger.cap = parts[1][0].ledger.resident
    with pytest.raises(MemoryCapExceeded):
        append_each(parts, 0, *tokens(2), SCALE)
    for (_, row), old in zip(parts, before, strict=True):
        store = row.stores[0]
        assert store is not None
        assert store.seen == 40
        assert all(
            torch.equal(a, b)
            for one, two in zip(contents(store), old, strict=True)
            for a, b in zip(one, two, strict=True)
        )


# ---- interrupts


class Stop(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own."""


def test_an_interrupt_between_writing_and_counting_leaves_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots that were written are beyond what counts, and the token can be appended again."""
    parts, others, given = made((40, 300, 9)), made((40, 300, 9)), tokens(3)
    served = decode.attend_each

    def interrupted(*args: Any) -> None:
        served(*args)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(decode, "attend_each", interrupted)
        with pytest.raises(Stop):
            append_each(parts, 0, *given, SCALE)
    assert [row.stores[0].seen for _, row in parts if row.stores[0]] == [40, 300, 9]
    assert torch.allclose(append_each(parts, 0, *given, SCALE), row_by_row(others, 0, given), atol=1e-5)
    row_by_row(others, 1, given)
    append_each(parts, 1, *given, SCALE)
    assert same(parts, others)


@pytest.mark.parametrize("after", range(4))
def test_an_interrupt_while_rows_are_counted_is_taken_back(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows have the token then and some do not; what was never committed goes."""
    parts, others, given = made((40, 300, 9)), made((40, 300, 9)), tokens(3)
    appended, left = LayerStore.appended, [after]

    def interrupted(store: LayerStore, count: int) -> None:
        if not left[0]:
            raise Stop
        left[0] -= 1
        appended(store, count)

    with monkeypatch.context() as patch:
        patch.setattr(LayerStore, "appended", interrupted)
        if after < 3:
            with pytest.raises(Stop):
                append_each(parts, 0, *given, SCALE)
        else:
            append_each(parts, 0, *given, SCALE)
    for memory, _ in parts:
        memory.take_back()
    assert same(parts, others)
    for layer in range(2):
        output, expected = append_each(parts, layer, *given, SCALE), row_by_row(others, layer, given)
        assert torch.allclose(output, expected, atol=1e-5)
    assert same(parts, others)
