"""Peeking: what a model would say to more tokens, without a trace in the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import agentmem
from agentmem import plugins
from agentmem.errors import MemoryCapExceeded, MemoryClosed, SettingsRefused
from agentmem.hf import CappedCache
from agentmem.testing import tiny_model
from support import tiny, variants

TOLERANCE = 5e-5
"""Absolute, on float32 logits of magnitude 1 to 10."""


def traces(memory: CappedCache) -> list[Any]:
    """Everything that a forward could change, bit for bit; the peak is a record, not a state."""
    core = memory.memory
    found: list[Any] = [memory.columns, core.usage()._replace(peak_bytes=0), core.ledger.transient, core.compactions]
    found += [torch.get_rng_state().tolist()]
    for row in core.sequences:
        found += [list(row.ids), list(row.tail), row.next_position, row.room, row.job, row.held]
        found += [row.generator.get_state().tolist()]
        for store in (each for each in row.stores if each is not None):
            tensors = (store.keys, store.values, store.bias, store.positions, store.scores)
            found += [None if each is None else each.numpy().tobytes() for each in tensors]
            found += [list(store.lengths), list(store.settled), store.seen, store.capacities]
        for sample in (each for layer in row.samples for each in layer):
            found += [sample.queries.numpy().tobytes(), sample.filled]
    return found


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_peek_says_what_a_forward_would_say_and_leaves_no_trace(kind: str) -> None:
    """After three compactions: the logits of the same ids fed for good, and no bit of the memory has changed."""
    with tiny.capped(kind) as memory:
        tiny.feed(memory, tiny.ids(110), pieces=7)
        assert len(memory.compactions) == 3
        question = tiny.ids(5, seed=1)
        before = traces(memory)
        found = memory.peek(question[0].tolist())

        assert traces(memory) == before
        assert torch.equal(memory.peek(question[0].tolist()), found)
        fed = tiny.llama()(input_ids=question, past_key_values=memory).logits[0]
        assert found.shape == (5, 128)
        assert torch.allclose(found, fed, atol=TOLERANCE)
        assert not torch.allclose(found[:1], found[1:2], atol=1e-2)


def test_generation_goes_on_as_if_nobody_had_peeked() -> None:
    """Greedy tokens over two more compactions are the same with a peek before each."""
    results = []
    for peeks in (False, True):
        with tiny.capped("heavy-hitters") as memory:
            token = int(tiny.feed(memory, tiny.ids(60), pieces=16).argmax())
            answer = []
            for _ in range(60):
                if peeks:
                    memory.peek([5, 6, 7])
                answer += (step := tiny.greedy(memory, token, 1))
                token = step[0]
            results.append((answer, len(memory.compactions), memory.report().num_new_tokens))

    assert results[0] == results[1]
    assert results[0][1] >= 3


@pytest.mark.parametrize("variant", sorted(variants.VARIANTS))
def test_a_peek_into_an_untouched_memory_is_the_stock_model(variant: str) -> None:
    """Every family, sliding windows included: the logits of one stock forward over prompt and question."""
    model = variants.model(variant)
    prompt, question = tiny.ids(50), tiny.ids(9, seed=1)
    expected = model(input_ids=torch.cat((prompt, question), 1), use_cache=False).logits[0, -9:]

    with agentmem.capped(model, policy="window", **variants.ROOMY) as memory:
        tiny.feed(memory, prompt, pieces=16, model=model)
        found = memory.peek(question[0].tolist())

    assert torch.allclose(found, expected, atol=TOLERANCE)


def test_the_logits_are_the_models_own() -> None:
    """What a model does to its logits (here soft-capping to ±2) happens to peeked ones too."""
    model = tiny_model("gemma3_text", final_logit_softcapping=2.0)

    with agentmem.capped(model, policy="window", **variants.ROOMY) as memory:
        tiny.feed(memory, tiny.ids(20), pieces=16, model=model)
        found = memory.peek([5, 6, 7])
        fed = model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=memory).logits[0]

    assert torch.allclose(found, fed, atol=TOLERANCE)
    assert 1.0 < float(found.abs().max()) <= 2.0


def test_each_row_of_a_batch_is_peeked_at_its_own_place() -> None:
    """A row beside others, left-padded and compacted twice, answers as the same sequence alone."""
    lengths, question = (100, 77), [5, 6, 7, 8]
    alone = []
    for row, length in enumerate(lengths):
        with tiny.capped("replay") as memory:
            tiny.feed(memory, tiny.ids(length, seed=row))
            alone.append(memory.peek(question))
    padded = torch.zeros(2, max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, length in enumerate(lengths):
        padded[row, -length:], mask[row, -length:] = tiny.ids(length, seed=row)[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    with tiny.capped("replay", cap=1 << 24) as memory:
        tiny.llama()(
            input_ids=padded,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=memory,
            logits_to_keep=1,
        )
        before = traces(memory)
        found = [memory.peek(question, row) for row in range(2)]
        assert traces(memory) == before

    for row in range(2):
        assert torch.allclose(found[row], alone[row], atol=TOLERANCE)


def test_a_forward_that_was_interrupted_is_not_seen() -> None:
    """What layer 0 had appended when Ctrl-C came is taken back before a peek, as before a forward."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(20))
        expected = memory.peek([5, 6])
        handle = tiny.llama().model.layers[0].self_attn.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny.feed(memory, tiny.ids(9, seed=1))
        handle.remove()

        assert torch.equal(memory.peek([5, 6]), expected)


def test_a_peek_counts_its_scratch() -> None:
    """The ledger's peak covers attention's scratch of a peek, and the cap of exactly 48 slots is not crossed."""
    with tiny.capped("heavy-hitters") as memory:
        tiny.feed(memory, tiny.ids(48), pieces=1)
        memory.memory.ledger.peak = memory.memory.ledger.resident
        memory.peek(list(range(3, 19)))

        assert memory.usage().peak_bytes == memory.usage().resident_bytes + memory.plan.forward_bytes
        tiny.audit(memory.memory)


def test_a_peek_that_cannot_work_is_refused() -> None:
    """Nothing read, no such row, no ids, more ids than a chunk, a closed memory: each with its own words."""
    with tiny.capped("window") as memory:
        with pytest.raises(SettingsRefused, match="row 0 of 0 has read nothing"):
            memory.peek([5])
        tiny.feed(memory, tiny.ids(10))
        with pytest.raises(SettingsRefused, match="row 1 of 1 has read nothing"):
            memory.peek([5], row=1)
        with pytest.raises(SettingsRefused, match="no ids"):
            memory.peek([])
        with pytest.raises(MemoryCapExceeded, match="17 ids in one forward, but scratch is planned for 16"):
            memory.peek([5] * 17)
        assert memory.peek([5] * 16).shape == (16, 128)
    with pytest.raises(MemoryClosed):
        memory.peek([5])


@pytest.mark.parametrize("ids", [[10**6], [3, -1]])
def test_ids_that_the_model_does_not_know_are_refused(ids: list[int]) -> None:
    """A peek and a focus of unknown ids are refused by name, and the memory stays as it is."""
    with tiny.capped_by(plugins.policy("am-halving"), max_slots=64) as memory:
        tiny.feed(memory, tiny.ids(60))
        held = memory.memory.sequences[0].held
        for call in (lambda: memory.peek(ids), lambda: memory.compact(focus=ids)):
            with pytest.raises(SettingsRefused, match=r"are no ids of this model, which knows 0\.\.\d+"):
                call()
        assert memory.memory.sequences[0].held == held
        assert not memory.report().compactions
