"""Self-study: what a model writes about its memory in slots that the plan keeps free, and that nothing of it stays."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch

from agentmem import api, plugins
from agentmem.compaction import references
from agentmem.compaction.writing import write
from agentmem.contracts import BudgetRequest, Budgets, Part, Policy, Queries
from agentmem.errors import CompactionFailed, SettingsRefused, UnsupportedModel
from agentmem.hf import CappedCache
from agentmem.memory.forwards import Scratch
from agentmem.memory.memory import Memory
from agentmem.memory.sequence import TokenSequence
from agentmem.planning.pricing import STUDY_SHARE
from agentmem.queries import MAX_INSTRUCTION, WORDED
from agentmem.testing import peak_allocated
from support import tiny, variants

STUDY = plugins.policy("am-halving", probe="self-study+replay")
SIZE = 112
SCRATCH = MAX_INSTRUCTION + 8
"""Of a probe of 16 tokens half is self-study's."""
FIRST = SIZE - SCRATCH
"""Tokens at the first compaction; each later one comes 16 later, for it leaves 56."""
KINDS: dict[str, Policy] = {
    "am-halving": STUDY,
    "carried scores": plugins.policy("am-halving", probe="self-study+replay", carry=0.9),
    "received scores, stored samples": replace(
        tiny.KINDS["heavy-hitters"], queries=Queries.of("self-study+live+context+random", 32)
    ),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def exact(policy: Policy = STUDY, model: Any | None = None, **settings: Any) -> AbstractContextManager[CappedCache]:
    """The smallest cap that 112 slots per head need; a refusal by the ledger is an error."""
    settings = {"on_failure": "raise", "max_slots": SIZE} | settings
    cap = tiny.need(policy, model or tiny.llama(), **settings)
    return tiny.capped_by(policy, model, cap=cap, **settings)


def filled(memory: CappedCache) -> list[Any]:
    """Everything of row 0 that a forward could change: filled slots, score columns, samples, counts, randomness."""
    core, row = memory.memory, memory.memory.sequences[0]
    found: list[Any] = [core.ledger.resident, core.ledger.transient, memory.columns, row.generator.get_state().tolist()]
    found += [list(row.ids), list(row.tail), row.next_position, row.room, row.job, row.held]
    for store in (each for each in row.stores if each is not None):
        found += [list(store.lengths), list(store.settled), store.seen, store.capacities]
        found += [None if store.scores is None else store.scores.tolist()]
        for head in range(len(store.lengths)):
            slots = store.segment(head, 0, 0)
            found += [each.numpy().tobytes() for each in (slots.keys, slots.values, slots.bias)]
            found += [slots.positions[: store.settled[head]].tolist()]
    for sample in (each for layer in row.samples for each in layer):
        found += [sample.queries[:, : sample.filled].numpy().tobytes(), sample.filled, sample.stride]
    return found


Told = list[tuple[tuple[int, ...], tuple[int, ...]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Every instruction that a memory wrote after, and what it wrote, the instruction included."""
    calls: Told = []
    original = references.write

    def watched(
        self: Memory, forwards: Any, row: TokenSequence, instruction: Sequence[int], most: int
    ) -> tuple[int, ...]:
        result = original(self, forwards, row, instruction, most)
        calls.append((tuple(instruction), result))
        return result

    monkeypatch.setattr(references, "write", watched)
    return calls


# ---- the plan


@pytest.mark.parametrize(
    ("probe", "tokens", "scratch"),
    [
        ("replay", None, 0),
        ("self-study", None, MAX_INSTRUCTION + SIZE // STUDY_SHARE),
        ("self-study+replay", None, MAX_INSTRUCTION + 8),
        ("self-study:3+replay", None, MAX_INSTRUCTION + 12),
        ("self-study+live", 24, MAX_INSTRUCTION + 12),
        ("self-study+replay+spread", 10, MAX_INSTRUCTION + 4),
    ],
)
def test_the_plan_keeps_slots_free_for_an_instruction_and_an_answer(
    probe: str, tokens: int | None, scratch: int
) -> None:
    """Room for the longest instruction and self-study's share of the probe, an eighth of the capacity at most."""
    policy = plugins.policy("am-halving", probe=probe, probe_tokens=tokens)
    with tiny.capped_by(policy, max_slots=SIZE) as memory:
        assert memory.plan.scratch == scratch
        assert memory.room() == SIZE - scratch
        tiny.feed(memory, tiny.ids(5))
        assert memory.room() == SIZE - scratch - 5


@EVERY
def test_a_row_is_full_when_only_scratch_is_left(kind: str) -> None:
    """Compactions come at 72 tokens, then every 16: tokens that stay leave 40 slots alone and keep their positions."""
    with exact(KINDS[kind]) as memory:
        tiny.feed(memory, tiny.ids(FIRST + 40))
        assert [report.tokens_seen for report in memory.compactions] == [FIRST, FIRST + 16, FIRST + 32]
        assert memory.room() == 8
        for store in (each for each in memory.memory.sequences[0].stores if each is not None):
            positions = store.segment(1, 0, 8).positions.tolist()
            assert positions[:4] + positions[-8:] == [0, 1, 2, 3, *range(FIRST + 24, FIRST + 32)]
            assert positions == sorted(set(positions))
        for report in memory.compactions:
            assert report.slots_before == FIRST * 4
            assert (report.faults, report.queries) == ((), str(KINDS[kind].queries))
            assert report.bytes_after == memory.plan.resident_bytes


def test_the_least_capacity_has_room_for_scratch() -> None:
    """Half of it, scratch and ``min_reclaim`` fit beside each other; a slot less is refused."""
    least = next(count for count in itertools.count(1) if count - SCRATCH - count // 2 >= 4)
    with pytest.raises(SettingsRefused, match=f"max_slots: {least - 1} is below {least}"):
        api.plan(tiny.llama(), cap=1 << 24, policy=STUDY, **(tiny.SETTINGS | {"max_slots": least - 1}))
    with exact(max_slots=least) as memory:
        tiny.feed(memory, tiny.ids(56))
        assert len(memory.compactions) == 3


# ---- what is written


def test_the_model_writes_what_it_would_say_next(told: Told) -> None:
    """Before the first compaction: the greedy continuation of the transcript and the instruction, as stock gives it."""
    tokens = tiny.ids(FIRST + 1)
    with exact() as memory:
        tiny.feed(memory, tokens)
    ((instruction, written),) = told
    asked = torch.cat((tokens[:, :FIRST], torch.tensor([instruction])), 1)
    stock = tiny.llama().generate(asked, max_new_tokens=SCRATCH - len(instruction), do_sample=False)

    assert len(written) == SCRATCH
    assert written == tuple(stock[0, FIRST:].tolist())


def test_writing_goes_on_at_the_following_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward starts where the one before ended, the first at the row's next position, after compactions too."""
    seen: list[tuple[int, int, int]] = []
    with exact() as memory:
        core, forwards = memory.memory, memory.engine.forwards
        scratch = forwards.next_logits

        def watched(ids: Sequence[int], start: int, step: Scratch) -> torch.Tensor:
            seen.append((core.sequences[0].seen, start, len(ids)))
            return scratch(ids, start, step)

        monkeypatch.setattr(forwards, "next_logits", watched)
        tiny.feed(memory, tiny.ids(FIRST + 17))
        assert core.sequences[0].next_position == FIRST + 17
    for moment in (FIRST, FIRST + 16):
        forwards = [(start, count) for tokens, start, count in seen if tokens == moment]
        ends = itertools.accumulate((count for _, count in forwards), initial=moment)
        assert [start for start, _ in forwards] + [moment + SCRATCH - 1] == list(ends), "the last one is not fed"


def test_instructions_take_turns(told: Told) -> None:
    """The source's own texts come one after the other; a text that was given comes every time."""
    texts = [tuple(tiny.tokenizer(each, add_special_tokens=False)["input_ids"]) for each in WORDED["self-study"]]
    with exact() as memory:
        tiny.feed(memory, tiny.ids(FIRST + 65))
    assert [instruction for instruction, _ in told] == [*dict.fromkeys(texts), texts[0]]
    for instruction, written in told:
        assert written[: len(instruction)] == instruction
    told.clear()
    with exact(tiny.mixture(Part("self-study", text="who owns the red door"), Part("replay"))) as memory:
        tiny.feed(memory, tiny.ids(FIRST + 33))
    assert [instruction for instruction, _ in told] == [(6, 7, 6, 6, 7)] * 3


def test_an_answer_ends_at_an_end_token(told: Told) -> None:
    """With that token, at its first time, whatever the settings call it; the instruction itself never ends it."""
    with exact() as memory:
        tiny.feed(memory, tiny.ids(FIRST + 1))
    ((instruction, whole),) = told
    last, own = whole[len(instruction) + 5], instruction[-1]
    for ends, all_of_them in ((last, {last}), ([own, last], {own, last}), (own, {own})):
        told.clear()
        model = copy.deepcopy(tiny.llama())
        model.generation_config.eos_token_id = ends
        with exact(model=model) as memory:
            tiny.feed(memory, tiny.ids(FIRST + 1), model=model)
            assert memory.compactions[0].probe_tokens == 16, "what an answer leaves goes to the replay"
        said = [index for index in range(len(instruction), SCRATCH) if whole[index] in all_of_them]
        assert told == [(instruction, whole[: said[0] + 1 if said else SCRATCH])]


def test_no_forward_is_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """T is planned for a chunk's tokens: a long instruction comes in pieces, and leaves slots for an answer."""
    lengths, settings, attend = list[int](), tiny.SETTINGS | {"max_slots": SIZE}, Scratch.attend

    def watched(self: Scratch, layer: int, queries: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths.append(queries.shape[2])
        return attend(self, layer, queries, *rest)

    monkeypatch.setattr(Scratch, "attend", watched)
    for words, ends, fed in ((20, (), SCRATCH - 1), (60, (), SCRATCH - 1), (60, range(128), MAX_INSTRUCTION)):
        lengths.clear()
        tokenizer = lambda text, *, add_special_tokens, words=words: {"input_ids": [5] * words}  # noqa: E731 - a fake
        with api.capped(tiny.llama(), cap=1 << 24, policy=STUDY, tokenizer=tokenizer, **settings) as memory:
            assert memory.memory.language is not None
            memory.memory.language = replace(memory.memory.language, ends=tuple(ends))
            tiny.feed(memory, tiny.ids(FIRST + 1))
        assert max(lengths) <= tiny.SETTINGS["chunk"]
        assert sum(lengths) == 2 * fed


# ---- what is left


@EVERY
def test_nothing_of_it_is_left_between_compactions(kind: str) -> None:
    """Writing leaves every bit of the row as it was: slots, scores, samples, ids, room, bytes, randomness."""
    with exact(KINDS[kind]) as memory:
        tiny.feed(memory, tiny.ids(FIRST + 10))
        core, before = memory.memory, filled(memory)
        first = write(core, memory.engine.forwards, core.sequences[0], (5, 6, 7), SCRATCH)

        assert filled(memory) == before
        assert write(core, memory.engine.forwards, core.sequences[0], (5, 6, 7), SCRATCH) == first
        assert len(first) == SCRATCH


@EVERY
def test_a_memory_that_wrote_is_one_that_was_told_what_to_write(
    kind: str, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four compactions and tokens after them, twice: to the bit the memory whose probe texts came from elsewhere."""
    outcomes: list[Any] = []
    for writes in (True, True, False):
        if not writes:
            texts = iter([written for _, written in told[:4]])
            monkeypatch.setattr(references, "write", lambda *_, texts=texts: next(texts))
            monkeypatch.setattr(Scratch, "__init__", lambda *_: pytest.fail("nothing was to be written"))
        with exact(KINDS[kind]) as memory:
            logits = tiny.feed(memory, tiny.ids(FIRST + 53))
            outcomes.append([filled(memory), tiny.greedy(memory, int(logits.argmax()), 8), filled(memory)])
            assert len(memory.compactions) == 4
    assert outcomes[0] == outcomes[1] == outcomes[2]


@EVERY
def test_a_row_in_a_batch_is_the_row_alone(kind: str) -> None:
    """Each row writes about itself, however long the others are."""
    settings = {"max_new_tokens": 30, "do_sample": False}
    (batch, mask), model = variants.left_padded((90, 66)), tiny.llama()
    with tiny.capped_by(KINDS[kind], max_slots=SIZE) as memory:
        together = model.generate(batch, attention_mask=mask, past_key_values=memory, **settings)
        assert len(memory.compactions) >= 5
    for index, length in enumerate((90, 66)):
        with tiny.capped_by(KINDS[kind], max_slots=SIZE) as memory:
            alone = model.generate(batch[index : index + 1, 90 - length :], past_key_values=memory, **settings)
        assert together[index, 90:].tolist() == alone[0, length:].tolist()


def test_the_peak_is_within_the_cap() -> None:
    """Four compactions: the profiler's peak, less that of the model's forward of one chunk, stays under the cap."""
    with torch.no_grad():
        forward = peak_allocated(lambda: tiny.llama()(tiny.ids(tiny.SETTINGS["chunk"]), use_cache=False))

    def run() -> None:
        with exact() as memory:
            tiny.feed(memory, tiny.ids(FIRST + 49))
            assert len(memory.compactions) == 4

    peak = peak_allocated(run)
    assert peak - forward <= tiny.need(STUDY, tiny.llama(), max_slots=SIZE)


# ---- what goes wrong


def breaking(patch: pytest.MonkeyPatch, call: int, errors: list[BaseException]) -> Callable[[], None]:
    """Let the ``call``-th attention call of a writing raise the next error, behind its layer's append."""
    attend, calls = Scratch.attend, [0]

    def broken(self: Scratch, *given: Any) -> torch.Tensor:
        output = attend(self, *given)
        calls[0] += 1
        if errors and calls[0] >= call:
            calls[0] = 0
            raise errors.pop(0)
        return output

    patch.setattr(Scratch, "attend", broken)
    return errors.clear


def undisturbed() -> list[Any]:
    """The memory after its first compaction when nothing goes wrong."""
    with exact() as memory:
        tiny.feed(memory, tiny.ids(FIRST + 1))
        return filled(memory)


@pytest.mark.parametrize("call", [1, 2, 7, 60])
def test_an_interrupt_in_mid_writing_costs_nothing(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes through, what was written is taken back, and the same forward again gives the undisturbed memory."""
    expected = undisturbed()
    breaking(monkeypatch, call, [KeyboardInterrupt()])
    with exact() as memory:
        with pytest.raises(KeyboardInterrupt):
            tiny.feed(memory, tiny.ids(FIRST + 1))
        tiny.audit(memory.memory)
        assert memory.usage().total_slots == FIRST * 4
        assert memory.transcript() == tiny.ids(FIRST + 1)[0, :FIRST].tolist()
        tiny.feed(memory, tiny.ids(FIRST + 1)[:, FIRST:])
        assert filled(memory) == expected


@pytest.mark.parametrize("call", [1, 2, 7, 60])
def test_one_fault_in_mid_writing_is_retried(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is written again, nothing is lost, and the report says so."""
    expected = undisturbed()
    breaking(monkeypatch, call, [RuntimeError("ink")])
    with exact() as memory:
        tiny.feed(memory, tiny.ids(FIRST + 1))
        assert filled(memory) == expected
        assert [fault.count("RuntimeError: ink") for fault in memory.compactions[0].faults] == [1]


@pytest.mark.parametrize("call", [2, 60])
def test_writing_that_always_fails_is_a_failed_compaction(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``raise`` raises CompactionFailed, and the next forward makes it good; ``evict`` goes on and says so."""
    expected = undisturbed()
    mend = breaking(monkeypatch, call, [RuntimeError("ink")] * 50)
    with exact() as memory:
        with pytest.raises(CompactionFailed, match="RuntimeError: ink"):
            tiny.feed(memory, tiny.ids(FIRST + 1))
        tiny.audit(memory.memory)
        assert memory.usage().total_slots == FIRST * 4
        mend()
        tiny.feed(memory, tiny.ids(FIRST + 1)[:, FIRST:])
        assert filled(memory) == expected
    breaking(monkeypatch, call, [RuntimeError("ink")] * 50)
    with exact(on_failure="evict") as memory:
        assert len(tiny.greedy(memory, int(tiny.feed(memory, tiny.ids(FIRST)).argmax()), 20)) == 20
        assert [report.tokens_seen for report in memory.compactions] == [FIRST, FIRST + 16]
        assert "RuntimeError: ink" in memory.compactions[0].faults[0]


class Lopsided(Budgets):
    """Gives the first head of the first layer nearly all that it may have; the rest is shared."""

    head_ceiling = layer_ceiling = 1.9

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """The first head, then the others alike."""
        first = min(request.held[0][0], request.ceiling, request.total * 2 // 5)
        each, left = divmod(request.total - first, 3)
        return (first, each + left), (each, each)


def test_a_compaction_that_goes_on_writes_nothing() -> None:
    """State k, whose heads are unequal and have no room, is left to the bit as it is by a second start that fails."""
    tokens, errors = tiny.ids(FIRST + 17), list[BaseException]()
    assert STUDY.compactor is not None
    policy = replace(STUDY, budgets=Lopsided(), compactor=tiny.Faulty(STUDY.compactor, 1, errors))
    with exact(policy) as memory:
        tiny.feed(memory, tokens[:, : FIRST + 16])
        states = []
        for _ in range(2):
            errors += [RuntimeError("one"), RuntimeError("two")]
            with pytest.raises(CompactionFailed):
                tiny.feed(memory, tokens[:, FIRST + 16 :])
            states.append(filled(memory))
        assert states[0] == states[1]
        assert [store.room for store in memory.memory.sequences[0].stores if store] == [0, 40]
        tiny.feed(memory, tokens[:, FIRST + 16 :])
        assert [report.faults for report in memory.compactions] == [(), ()]
        assert memory.compactions[1].slots_after == 56 * 4


def test_sliding_layers_and_a_missing_tokenizer_are_refused() -> None:
    """What slid out of a window cannot be taken back, and instructions are texts; both with policy and remedy."""
    said = ("sliding-window", "'self-study'", "'am-halving'", "replay+spread")
    for variant in ("gemma3_text", "qwen2, half sliding", "mistral, sliding"):
        with variants.refused(variants.model(variant), UnsupportedModel, *said):
            api.wrap(variants.model(variant), tiny.tokenizer, cap=1 << 24, policy=STUDY, **tiny.SETTINGS)
    with pytest.raises(SettingsRefused, match=r"'am-halving' with 'self-study'.*needs a tokenizer.*'replay'"):
        api.wrap(tiny.llama(), cap=1 << 24, policy=STUDY, **tiny.SETTINGS)
