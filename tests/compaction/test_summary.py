"""Summaries that a model writes of its own segment: where their slots stand, what they hold, what they leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from agentmem import api
from agentmem.compaction.writing import repeats, write
from agentmem.contracts import Policy, Rewrite
from agentmem.errors import SettingsRefused, UnsupportedModel
from agentmem.hf import CappedCache
from agentmem.memory.pinning import pin, promote
from agentmem.planning.pricing import MAX_REQUEST
from agentmem.policies.summary import summary
from agentmem.policies.summary_am import summary_am
from agentmem.reporting.report import CompactionReport
from agentmem.testing import CASES, check_policy, peak_allocated, tiny_model
from support import dictation, tiny, variants
from support.dictation import END, FIRST, FULL, LAYERS, LEAD, POLICIES, RECENT, SCRIPT, TARGET

WHOLE = (*LEAD, *SCRIPT)
EVERY = pytest.mark.parametrize("kind", POLICIES)


# ---- the plan


@pytest.mark.parametrize(
    ("tokens", "slots", "written"),
    [(None, 176, 176 // 6), (None, 240, 40), (8, 176, 8), (20, 176, 20), (500, 300, 150)],
)
def test_the_plan_keeps_slots_free_for_a_request_and_a_summary(tokens: int | None, slots: int, written: int) -> None:
    """A sixth of the capacity or what the policy names, half the capacity at most; tokens that stay never take them."""
    with dictation.telling(summary(summary_tokens=tokens), max_slots=slots) as memory:
        assert memory.plan.scratch == MAX_REQUEST + written
        assert memory.room() == slots - MAX_REQUEST - written
        dictation.feed(memory, 5)
        assert memory.room() == slots - MAX_REQUEST - written - 5


@EVERY
def test_bytes_stay_under_the_cap_through_many_summaries(kind: str) -> None:
    """Whatever the model itself writes: no refusal by the smallest cap, and every summary tells its slots and bytes."""
    with dictation.telling(kind) as memory:
        dictation.feed(memory, 90, pieces=7)
        dictated = dictation.dictate(memory, (*SCRIPT, END))
        dictation.feed(memory, 160, seed=1, pieces=7)
        reports = memory.compactions
        assert memory.memory.ledger.peak <= memory.plan.cap_bytes
    told = [report for report in reports if report.summary is not None]
    assert len(told) >= 6
    assert len(dictated) >= 4
    for report in reports:
        assert all("SummaryRefused" in fault for fault in report.faults)
        assert (report.summary is None) == bool(report.faults)
        assert report.slots_before == FULL * 2 * LAYERS
        assert report.bytes_after <= memory.plan.resident_bytes


def test_the_profiler_s_peak_is_within_the_cap() -> None:
    """Summaries written, adopted and matched: the peak, less the model's forward of one chunk, stays under the cap."""
    with torch.no_grad():
        forward = peak_allocated(lambda: tiny.llama(LAYERS)(tiny.ids(64), use_cache=False))

    def run() -> None:
        with torch.no_grad(), dictation.telling() as memory:
            dictation.dictate(memory, (*SCRIPT, END))
            dictation.feed(memory, FULL + 60)
            assert [report.summary is not None for report in memory.compactions] == [True] * 2

    assert peak_allocated(run) - forward <= dictation.cap_of(POLICIES["summary-am"], tiny.llama(LAYERS))


# ---- where it stands


def compacted(memory: CappedCache) -> CompactionReport:
    """The one report of a compaction by hand."""
    (report,) = memory.compact()
    return report


def flat(layers: list[list[Any]]) -> list[Any]:
    """The heads of all layers."""
    return [head for layer in layers for head in layer]


@pytest.mark.parametrize(("kind", "left"), [("summary", len(WHOLE)), ("summary-am", round(len(WHOLE) / 2))])
def test_the_segment_is_the_summary(kind: str, left: int) -> None:
    """Six times: its slots right before the recent window, in order, as many as were to be left; the rest as it was."""
    with dictation.telling(kind) as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        for again in range(6):
            dictation.feed(memory, memory.room() if again else FULL, seed=again)
            before, seen = dictation.heads(memory), memory.memory.sequences[0].seen
            report = compacted(memory)
            place = seen - RECENT - len(WHOLE)
            for old, new in zip(flat(before), flat(dictation.heads(memory)), strict=True):
                positions = new["positions"].tolist()
                assert positions[:FIRST] + positions[-RECENT:] == [*range(FIRST), *range(seen - RECENT, seen)]
                assert set(positions[FIRST:-RECENT]) <= set(range(place, place + len(WHOLE)))
                assert positions == sorted(set(positions))
                assert len(positions) == FIRST + left + RECENT
                for name in ("keys", "values", "bias"):
                    assert torch.equal(new[name][:FIRST], old[name][:FIRST])
                    assert torch.equal(new[name][-RECENT:], old[name][-RECENT:])
            found = report.summary
            assert found is not None
            assert (found.start, found.stop, found.position, found.tokens) == (FIRST, seen - RECENT, place, len(WHOLE))
            assert found.text == " w31 w32 w33 w34. w35 w36 w37 w38 w39 w41."
            assert (found.slots_before, found.slots_after) == (FULL * 6 if again == 0 else report.slots_before, 29 * 6)
            assert report.slots_after == (FIRST + left + RECENT) * 6
            assert report.faults == ()
            assert memory.memory.sequences[0].next_position == seen
        assert memory.report().num_compactions == 6


FAMILIES: dict[str, Any] = {
    "llama": lambda: tiny.llama(LAYERS),
    "qwen3": lambda: tiny_model("qwen3"),
    "phi3": lambda: tiny_model("phi3", partial_rotary_factor=0.5),
}


def stock(model: Any, cache: DynamicCache, ids: Sequence[int], start: int) -> DynamicCache:
    """The model's own cache after so many more tokens at those positions."""
    if ids:
        with torch.no_grad():
            places = torch.arange(start, start + len(ids))[None]
            model(torch.tensor([list(ids)]), position_ids=places, past_key_values=cache)
    return cache


@pytest.mark.parametrize("first", [0, FIRST])
@pytest.mark.parametrize("family", FAMILIES)
def test_its_slots_are_those_of_a_stock_forward(family: str, first: int) -> None:
    """The prefix, then the summary at its positions, through transformers' own cache: the same keys and values."""
    model, target = FAMILIES[family](), TARGET - FIRST + first
    with dictation.telling("summary", model, keep_first=first, target=target) as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        for again in range(3):
            dictation.feed(memory, memory.room() if again else FULL, seed=again, model=model)
            found = compacted(memory).summary
            assert found is not None
            cache = stock(model, DynamicCache(config=model.config), memory.transcript()[:first], 0)
            cache = stock(model, cache, WHOLE, found.position)
            for layer, store in enumerate(dictation.heads(memory)):
                for head, slots in enumerate(store):
                    for name in ("keys", "values"):
                        wanted = getattr(cache.layers[layer], name)[0, head, first:]
                        # float32, sums of a few dozen numbers in another order.
                        torch.testing.assert_close(slots[name][first:-RECENT], wanted, rtol=0, atol=2e-5)
                    assert not slots["bias"].any()


def test_it_sees_pinned_slots() -> None:
    """Pins stay to the bit, in front of it; its slots are those of a stock forward over prefix and pins."""
    model = tiny.llama(LAYERS)
    with dictation.telling("summary") as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        dictation.feed(memory, FULL)
        row = memory.memory.sequences[0]
        pin(memory.memory, row, 10, 12)
        pin(memory.memory, row, FULL - 10, FULL - RECENT)
        pinned = [*range(FIRST), 10, 11, FULL - 10, FULL - 9]
        before, found = dictation.heads(memory), compacted(memory).summary
        after, cache = dictation.heads(memory), DynamicCache(config=model.config)
        assert found is not None
        assert found.position == FULL - 10 - len(WHOLE), "between the pins, for none of them makes room"
        for layer, store in enumerate(before):
            keys, values = (torch.stack([head[name][pinned] for head in store])[None] for name in ("keys", "values"))
            cache.update(keys, values, layer)
        cache = stock(model, cache, WHOLE, found.position)
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        for head in range(2):
            assert new[head]["positions"][: len(pinned)].tolist() == pinned
            for name in ("keys", "values"):
                assert torch.equal(new[head][name][: len(pinned)], old[head][name][pinned])
                assert torch.equal(new[head][name][-RECENT:], old[head][name][-RECENT:])
                wanted = getattr(cache.layers[layer], name)[0, head, len(pinned) :]
                torch.testing.assert_close(new[head][name][len(pinned) : -RECENT], wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("layer", "head"), [(0, 1), (1, 0), (LAYERS - 1, 1)])
def test_it_stands_behind_the_pins_of_every_head(layer: int, head: int) -> None:
    """Re-basing may move one head's pinned slot further up than the others': no head has two slots at a position."""
    with dictation.telling("summary") as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        dictation.feed(memory, FULL)
        pin(memory.memory, memory.memory.sequences[0], 10, 11)
        promote(memory.memory, memory.memory.sequences[0])
        store = dictation.stores(memory)[layer]
        store.segment(head, FIRST, 0).positions[0] = FULL - 15
        found = compacted(memory).summary
        assert found is not None
        assert found.position == FULL - 15 - len(WHOLE)
        for slots in flat(dictation.heads(memory)):
            positions = slots["positions"].tolist()
            assert len(set(positions)) == len(positions)


def test_summaries_pins_and_re_basing_share_positions() -> None:
    """Heads whose pins stand apart: through many of all three no two slots of a head are at one position."""
    model = tiny_model("llama", max_position_embeddings=400)
    with dictation.telling("summary", model, rebase=True) as memory:
        dictation.dictate(memory, (*SCRIPT, END), (END,), (END,))
        dictation.feed(memory, 40, model=model)
        pin(memory.memory, memory.memory.sequences[0], 9, 10)
        pin(memory.memory, memory.memory.sequences[0], 25, 27)
        for seed in range(40):
            dictation.feed(memory, 11, seed=seed, model=model)
            for slots in flat(dictation.heads(memory)):
                positions = slots["positions"].tolist()
                assert len(set(positions)) == len(positions)
                assert positions[FIRST + 3 :] == sorted(positions[FIRST + 3 :])
        report = memory.report()
    assert len(report.rebases) >= 2
    assert sum(each.summary is not None for each in report.compactions) >= 6
    assert {len(each.faults) for each in report.compactions} == {0, 1}


# ---- what is written


@pytest.mark.parametrize(("keep", "left"), [(0.1, 2), (0.5, 8), (0.75, 13), (1.0, 17)])
def test_keep_is_the_fraction_that_matching_leaves(keep: float, left: int) -> None:
    """Of the summary's slots, its lead included."""
    with dictation.telling(summary_am(keep=keep)) as memory:
        dictation.dictate(memory, (*SCRIPT, END))
        dictation.feed(memory, FULL)
        compacted(memory)
        assert dictation.lengths(memory) == [[FIRST + left + RECENT] * 2] * LAYERS


@pytest.mark.parametrize("tokens", [8, 12, 20])
def test_summary_tokens_is_the_most_that_is_written(tokens: int) -> None:
    """With a script that never ends by itself; what follows its last full stop is left out."""
    script = [51, 52, 53, 54, 55, 56, 57, 60] + [61 + each % 9 for each in range(90)]
    with dictation.telling(summary(summary_tokens=tokens)) as memory:
        calls = dictation.dictate(memory, script)
        dictation.feed(memory, memory.room())
        found = compacted(memory).summary
    assert found is not None
    assert (calls, found.tokens) == ([tokens], len(LEAD) + 8)


def test_the_model_is_asked_in_its_own_format() -> None:
    """A chat template where the tokenizer has one, else a paragraph; the ids before what is written are its own."""

    class Chatting(dictation.Tokenizer):
        chat_template = "yes"

        def apply_chat_template(self, said: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
            assert (said[0]["role"], tokenize, add_generation_prompt) == ("user", False, True)
            return f"a {said[0]['content']}"

    asked: list[Any] = []
    for tokenizer in (dictation.Tokenizer(), Chatting()):
        with dictation.telling(summary(instruction="what have you seen"), tokenizer=tokenizer) as memory:
            run = memory.engine.forwards.next_logits

            def watched(ids: Any, start: int, step: Any, run: Any = run) -> Any:
                asked.append((tuple(ids), start))
                return run(ids, start, step)

            memory.engine.forwards.next_logits = watched  # type: ignore[method-assign]
            dictation.feed(memory, FULL)
            memory.compact()
    first = [ids for ids, start in asked if start == FULL]
    assert first == [(7, 7, 6, 7), (4, 7, 7, 6, 7)]


def test_no_run_of_eight_is_written_twice() -> None:
    """Greedy decoding that would go round in circles takes the next best; short repeats are let be."""
    with dictation.telling("summary") as memory:
        dictation.feed(memory, 20)
        core, forwards, cycle = memory.memory, memory.engine.forwards, [31, 32, 33]
        run, state = forwards.next_logits, [0]

        def circling(*given: Any) -> torch.Tensor:
            logits = torch.arange(run(*given).shape[0]) * -1e-3
            logits[cycle[state[0] % 3]] = 1.0
            state[0] += 1
            return logits

        forwards.next_logits = circling  # type: ignore[method-assign]
        free = write(core, forwards, core.sequences[0], (5, 6), 60)[2:]
        state[0] = 0
        bound = write(core, forwards, core.sequences[0], (5, 6), 60, no_repeat=8)[2:]
    assert free == tuple(cycle * 20)[:58]
    runs = [bound[at : at + 8] for at in range(51)]
    assert len(set(runs)) == len(runs)
    assert bound[:10] == free[:10], "ten tokens of a cycle of three are three runs of eight, all different"


def test_repeats_are_those_of_a_loop() -> None:
    """Against trying every id: it is banned exactly where the text would end with eight, two … that it has already."""
    texts = [[], [1], [1, 1, 1], [1, 2, 1, 2, 1], [3, 1, 2, 3, 1, 2, 3], [0, 1, 2, 0, 1, 2, 0, 1]]
    for text in texts:
        for length in (0, 1, 2, 3, 8):
            banned = set()
            for each in range(5):
                grown = [*text, each]
                runs = [grown[at : at + length] for at in range(len(grown) - length + 1)]
                if length and runs and runs[-1] in runs[:-1]:
                    banned.add(each)
            assert set(repeats(text, length)) == banned


@EVERY
def test_the_same_tokens_give_the_same_memory(kind: str) -> None:
    """Text, slots and logits, to the bit; the global random state is left alone."""
    found = []
    for _ in range(2):
        state = torch.get_rng_state()
        with dictation.telling(kind) as memory:
            logits = dictation.feed(memory, 90)
            texts = [report.summary and report.summary.text for report in memory.compactions]
            found.append((dictation.heads(memory), logits.tolist(), texts))
        assert torch.equal(torch.get_rng_state(), state)
    assert dictation.same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert any(found[0][2])


# ---- policies


@EVERY
def test_the_policies_keep_the_laws(kind: str) -> None:
    """Their compactor, which makes up for summaries that fail, on every other case of the kit."""
    assert check_policy(POLICIES[kind], shapes=CASES[:-1:2]).broken == ()
    assert POLICIES[kind].name == kind


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"instruction": "  "}, "instruction: it is empty"),
        ({"summary_tokens": 7}, "tokens: a summary of 7 tokens says nothing; give at least 8"),
        ({"keep": 0.0}, "keep: 0.0 is no fraction"),
        ({"keep": 1.5}, "keep: 1.5 is no fraction"),
        ({"probe": "nonsense"}, "'nonsense' is unknown"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], said: str) -> None:
    """With the value and what would do."""
    with pytest.raises(ValueError, match=said):
        summary_am(**options)


def test_a_summary_needs_a_compactor_a_tokenizer_and_full_layers() -> None:
    """Each is refused before any work: who makes up for it, who writes it, what cannot be taken back."""
    with pytest.raises(ValueError, match="'lonely': a summary that fails is made up for by a compactor"):
        Policy("lonely", "-", "-", None, rewrite=Rewrite())
    with pytest.raises(SettingsRefused, match=r"'summary' with 'a summary'.*needs a tokenizer"):
        api.wrap(tiny.llama(), cap=1 << 24, policy=POLICIES["summary"], **dictation.SETTINGS)
    for variant in ("gemma3_text", "mistral, sliding"):
        with variants.refused(variants.model(variant), UnsupportedModel, "sliding-window", "a summary", "'summary-am'"):
            api.wrap(
                variants.model(variant), dictation.Tokenizer(), cap=1 << 24, policy=POLICIES["summary-am"],
                **dictation.SETTINGS,
            )  # fmt: skip
