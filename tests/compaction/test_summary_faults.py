"""Summaries that cannot be used, fail or are interrupted: matching takes their place, and the memory goes on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from agentmem import plugins
from agentmem.errors import SettingsRefused
from agentmem.memory.forwards import Adopt, Scratch, Transient
from agentmem.memory.pinning import pin
from agentmem.policies.summary_am import summary_am
from support import dictation, tiny
from support.dictation import EACH, END, FIRST, FULL, LAYERS, LEAD, POLICIES, RECENT, SCRIPT, SIZE

MATCHED = FIRST + EACH + RECENT
ADOPTED = FIRST + len(LEAD) + len(SCRIPT) + RECENT
STATES = pytest.mark.parametrize("layer", range(LAYERS))


@functools.cache
def matched() -> list[Any]:
    """What Attention Matching alone makes of the first tokens, in a memory that knows nothing of summaries."""
    settings = dictation.SETTINGS
    with tiny.capped_by(plugins.policy("am-halving"), tiny.llama(LAYERS), **settings) as memory:
        dictation.feed(memory, FULL)
        memory.compact()
        return dictation.heads(memory)


REFUSALS: dict[str, tuple[Sequence[int], str]] = {
    "ends at once": ((END,), "it is empty: 1 tokens were written, 0 can be used"),
    "seven tokens": ((*SCRIPT[:7], END), "it is empty: 8 tokens were written, 7 can be used"),
    "never ends a sentence": (tuple(each for each in range(31, 80) if each % 10), "29 tokens were written, 0 can be"),
    "ends a sentence too early": ((31, 32, 40, *(each for each in range(41, 90) if each % 10)), "3 can be used"),
    "goes round in circles": (
        [31 + int(each) for each in "0121022010012202110201120010"] + [40],
        "goes round in circles: 4 different tokens of 29",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_summary_that_says_nothing_is_left_to_matching(name: str) -> None:
    """To the bit what matching alone gives, with the reason in the report; nothing that was written is left."""
    script, said = REFUSALS[name]
    with dictation.telling() as memory:
        dictation.dictate(memory, script)
        dictation.feed(memory, FULL)
        (report,) = memory.compact()
        assert dictation.same(dictation.heads(memory), matched())
        assert report.summary is None
        assert [said in fault and fault.endswith("(matching instead)") for fault in report.faults] == [True]
        assert memory.memory.sequences[0].next_position == FULL
        tiny.audit(memory.memory)
        assert len(tiny.greedy(memory, 5, 16, model=tiny.llama(LAYERS))) == 16
        assert [each.slots_after for each in memory.compactions] == [MATCHED * 2 * LAYERS] * 2


def test_a_request_that_is_too_long_is_left_to_matching() -> None:
    """Scratch is planned for 96 tokens of it: count, limit and remedy are in the report, and nothing is written."""

    class Wordy(dictation.Tokenizer):
        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [3 + len(word) for word in text.split()]}

    for words, fails in ((96, False), (97, True)):
        policy = summary_am(instruction="word " * words)
        with dictation.telling(policy, tokenizer=Wordy()) as memory:
            calls = dictation.dictate(memory, (1, *SCRIPT, END))
            dictation.feed(memory, FULL)
            (report,) = memory.compact()
            assert (report.summary is None, calls == []) == (fails, fails)
            assert not fails or "its instruction has 97 tokens, 96 at most; shorten it" in report.faults[0]
            tiny.audit(memory.memory)


def test_a_summary_without_a_place_is_left_to_matching() -> None:
    """Pins all over the segment leave no run of positions as long as it."""
    with dictation.telling() as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        dictation.feed(memory, FULL)
        for at in range(10, 45, 7):
            pin(memory.memory, memory.memory.sequences[0], at, at + 1)
        (report,) = memory.compact()
        assert "no 17 free positions in a row" in report.faults[0]
        assert dictation.lengths(memory) == [[MATCHED] * 2] * LAYERS
        dictation.feed(memory, 30)


def test_a_summary_that_is_no_shorter_is_left_to_matching() -> None:
    """By hand, on a segment of few slots: it would make the memory larger."""
    with dictation.telling() as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        dictation.feed(memory, FIRST + RECENT + 17)
        resident = memory.memory.ledger.resident
        (report,) = memory.compact(slots=6)
        assert "its 17 tokens are no fewer than the 17 slots per head" in report.faults[0]
        assert dictation.lengths(memory) == [[FIRST + 6 + RECENT] * 2] * LAYERS
        assert memory.memory.ledger.peak <= memory.plan.cap_bytes
        assert resident > 0


# ---- faults


def breaking(patch: pytest.MonkeyPatch, step: Any, layer: int, error: BaseException, *, behind: bool = False) -> None:
    """Let the first attention call of that step at that layer raise; ``behind`` its work or before it."""
    attend, errors = step.attend, [error]

    def broken(self: Any, at: int, *given: Any) -> torch.Tensor:
        if at == layer and errors and not behind:
            raise errors.pop()
        output: torch.Tensor = attend(self, at, *given)
        if at == layer and errors:
            raise errors.pop()
        return output

    patch.setattr(step, "attend", broken)


@STATES
def test_a_fault_in_writing_is_left_to_matching(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What some layers had appended is taken back: to the bit what matching alone gives."""
    breaking(monkeypatch, Scratch, layer, RuntimeError("ink"), behind=True)
    with dictation.telling() as memory:
        dictation.feed(memory, FULL)
        (report,) = memory.compact()
        assert dictation.same(dictation.heads(memory), matched())
        assert [fault.count("RuntimeError: ink (matching instead)") for fault in report.faults] == [1]
        tiny.audit(memory.memory)


@pytest.mark.parametrize("behind", [False, True])
@STATES
def test_a_fault_in_adopting_is_left_to_matching(layer: int, behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers before it have the summary, the others what matching leaves; it goes on, and the report says so."""
    with dictation.telling() as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        dictation.feed(memory, FULL)
        with monkeypatch.context() as patch:
            breaking(patch, Adopt, layer, RuntimeError("glue"), behind=behind)
            (report,) = memory.compact()
        adopted = layer + behind
        assert dictation.lengths(memory) == [[ADOPTED] * 2] * adopted + [[MATCHED] * 2] * (LAYERS - adopted)
        assert report.summary is None
        assert [fault.count("RuntimeError: glue (matching instead)") for fault in report.faults] == [1]
        tiny.audit(memory.memory)
        dictation.feed(memory, 60, seed=1)
        assert [each.faults for each in memory.compactions[1:]] == [()] * (len(memory.compactions) - 1)
        assert memory.compactions[-1].summary is not None


# ---- interrupts


@functools.cache
def undisturbed() -> tuple[list[Any], list[float]]:
    """The memory after a forward that had it summarised, and the forward's logits."""
    with dictation.telling() as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        logits = dictation.feed(memory, FULL + 1)
        return dictation.heads(memory), logits.tolist()


@pytest.mark.parametrize("where", ["writing", "adopting"])
def test_an_interrupt_before_anything_is_replaced_costs_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next forward writes and adopts again, and gives the undisturbed bits."""
    with dictation.telling() as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        with monkeypatch.context() as patch:
            step = Scratch if where == "writing" else Adopt
            breaking(patch, step, 1 if where == "writing" else 0, KeyboardInterrupt(), behind=where == "writing")
            with pytest.raises(KeyboardInterrupt):
                dictation.feed(memory, FULL + 1)
        assert dictation.lengths(memory) == [[FULL] * 2] * LAYERS
        assert memory.memory.sequences[0].job is None
        logits = tiny.feed(memory, tiny.ids(FULL + 1)[:, FULL:], model=tiny.llama(LAYERS))
        assert dictation.same(dictation.heads(memory), undisturbed()[0])
        assert logits.tolist() == undisturbed()[1]


@pytest.mark.parametrize("adopted", range(1, LAYERS + 1))
def test_an_interrupt_between_layers_leaves_a_memory_that_decodes(
    adopted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next forward goes on: layers that had no summary yet are matched, and all have room as after a compaction."""
    with dictation.telling() as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        with monkeypatch.context() as patch:
            breaking(patch, Adopt, adopted - 1, KeyboardInterrupt(), behind=True)
            with pytest.raises(KeyboardInterrupt):
                dictation.feed(memory, FULL + 1)
        tiny.audit(memory.memory)
        assert dictation.lengths(memory) == [[ADOPTED] * 2] * adopted + [[FULL] * 2] * (LAYERS - adopted)
        assert torch.isfinite(memory.peek([9, 8, 7])).all()
        with pytest.raises(SettingsRefused, match=f"tokens before {FULL - RECENT} have been compacted"):
            pin(memory.memory, memory.memory.sequences[0], 20, 22)
        tiny.feed(memory, tiny.ids(FULL + 1)[:, FULL:], model=tiny.llama(LAYERS))
        ends = [[ADOPTED + 1] * 2] * adopted + [[MATCHED + 1] * 2] * (LAYERS - adopted)
        assert dictation.lengths(memory) == ends
        assert memory.transcript() == tiny.ids(FULL + 1)[0].tolist()
        assert memory.room() > 0
        dictation.feed(memory, 60, seed=1)
        assert memory.compactions[-1].summary is not None
        for store in dictation.stores(memory):
            positions = store.segment(0, 0, RECENT).positions.tolist()
            assert positions == sorted(set(positions))


@pytest.mark.parametrize("layer", [None, *range(LAYERS)])
def test_an_interrupt_behind_the_adoption_leaves_a_row_that_goes_on(
    layer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its probe's text is chosen, and at every layer of the probe: the next forward finds or makes room."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with dictation.telling(cap=1 << 24, extra_policies=("window",)) as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        with monkeypatch.context() as patch:
            if layer is None:
                patch.setattr("agentmem.compaction.references.make_probe", interrupt)
            else:
                breaking(patch, Transient, layer, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                dictation.feed(memory, FULL + 1)
        tiny.audit(memory.memory)
        logits = tiny.feed(memory, tiny.ids(FULL + 1)[:, FULL:], model=tiny.llama(LAYERS))
        assert torch.isfinite(logits).all()
        if layer is None:  # nothing was begun behind the summary
            memory.compact(policy="window", slots=10)
        told = memory.compactions[0].summary
        assert told is not None
        assert (told.slots_after, memory.memory.sequences[0].state.summary) == (2 * LAYERS * ADOPTED, None)
        dictation.feed(memory, 90, seed=1)
        assert memory.compactions[-1].summary is not None
        assert memory.memory.ledger.peak <= memory.plan.cap_bytes


# ---- compactions that are asked for


def test_a_compaction_by_another_policy_keeps_scratch_free() -> None:
    """What the memory's own policy will write in stays free, whoever compacts."""
    policy = POLICIES["summary"]
    with dictation.telling(policy, cap=1 << 24, extra_policies=("window",)) as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        dictation.feed(memory, FULL - 4)
        memory.compact(policy="window")
        assert memory.room() == SIZE - 40 - memory.plan.scratch
        dictation.feed(memory, 50, seed=1)
        assert [(each.policy, each.faults) for each in memory.compactions[1:]] == [("summary", ())] * 2


def test_a_request_holds_whatever_becomes_of_the_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that were asked for are left where adopting fails; a focus is among the queries where it does not."""
    with dictation.telling() as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        dictation.feed(memory, FULL)
        with monkeypatch.context() as patch:
            breaking(patch, Adopt, 0, RuntimeError("glue"))
            memory.compact(slots=6)
        assert dictation.lengths(memory) == [[FIRST + 6 + RECENT] * 2] * LAYERS
        dictation.feed(memory, memory.room(), seed=1)
        (report,) = memory.compact(focus=(5, 6, 7))
        assert report.summary is not None
        assert report.queries == "focus+replay"
