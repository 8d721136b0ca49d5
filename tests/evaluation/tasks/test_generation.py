"""Replies under a cap: what is written, when it ends, and that questions behind one context do not see each other."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem import models
from agentmem.errors import AgentmemError, SettingsRefused
from agentmem.evaluation.tasks.generation import Forced, Sampling, Writer
from agentmem.evaluation.terms import Terms
from support.shell import save_model

TERMS = Terms(slots=64, keep_first=0, keep_recent=8, chunk=48)
PROMPT = list(b"Once there was a clock that ran backwards, and nobody minded it.")
FORCED = Forced(text="\nFinal Answer:", end="</think>", tokens=8)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random model that never ends by itself, and its tokenizer of one token per byte."""
    model, tokenizer = models.load(save_model(tmp_path_factory.mktemp("model")))
    model.generation_config.eos_token_id = None
    return model, tokenizer


def writer(loaded: Any, terms: Terms | None = TERMS, policy: str = "am-halving", **options: Any) -> Writer:
    """A writer on the tiny model."""
    return Writer(*loaded, terms, policy, **options)


def test_full_memory_writes_what_generate_writes(loaded: Any) -> None:
    """Greedy tokens equal those of stock generate, and nothing is compacted."""
    model, tokenizer = loaded
    found = writer(loaded, None).reply(PROMPT, Sampling(max_tokens=40))
    with torch.no_grad():
        stock = model.generate(torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False, pad_token_id=0)

    assert found.text == tokenizer.decode(stock[0, len(PROMPT) :])
    assert (found.compactions, found.tokens_read, found.tokens_generated, found.stop) == (0, len(PROMPT), 40, "tokens")


def test_full_memory_answers_questions_as_long_as_its_chunk(loaded: Any) -> None:
    """Full memory takes what a capped one of the same ``chunk`` takes, by default 1,024 tokens."""
    long = PROMPT * 8
    with closing(writer(loaded, None)) as wide, closing(writer(loaded, None, chunk=64)) as narrow:
        assert wide.answer(PROMPT, long, Sampling(max_tokens=6)).tokens_generated == 6
        with pytest.raises(AgentmemError, match="chunk"):
            narrow.answer(PROMPT, long, Sampling(max_tokens=6))


@pytest.mark.parametrize("most", [1, 2, 4])
def test_no_more_compactions_than_allowed(loaded: Any, most: int) -> None:
    """Thinking ends before another compaction would be needed, and the forced answer fits into what is left."""
    found = writer(loaded, max_compactions=most).reply(PROMPT, Sampling(max_tokens=1000), FORCED)

    assert (found.compactions, found.stop, found.forced) == (most, "budget", True)
    before, words, answer = found.text.partition(FORCED.text)
    assert words
    assert 0 < len(answer) <= FORCED.tokens
    # Each halving frees about half of the slots beside the newest; the last filling keeps room for the answer.
    assert len(before) < most * TERMS.slots
    assert found.tokens_generated > FORCED.tokens


def test_the_effective_size_grows_with_the_compactions(loaded: Any) -> None:
    """More compactions allow more tokens at the same physical size."""
    written = [
        writer(loaded, max_compactions=most).reply(PROMPT, Sampling(max_tokens=1000)).tokens_generated
        for most in (1, 2, 4)
    ]

    assert written == sorted(set(written))
    peaks = {
        writer(loaded, max_compactions=most).reply(PROMPT, Sampling(max_tokens=1000)).peak_bytes for most in (2, 4)
    }
    assert len(peaks) == 1


def test_nothing_is_forced_where_thinking_ended(loaded: Any) -> None:
    """The end of thinking that the model wrote itself, here any letter, makes the forced words needless."""
    plain = writer(loaded).reply(PROMPT, Sampling(max_tokens=30))
    end = plain.text[5]

    found = writer(loaded).reply(PROMPT, Sampling(max_tokens=30), FORCED.model_copy(update={"end": end}))

    assert not found.forced
    assert found.text == plain.text


def test_samples_are_seeded_and_leave_the_random_state(loaded: Any) -> None:
    """The same seed writes the same text, another seed another one, and the caller's random state stays."""
    before = torch.get_rng_state()
    texts = [
        writer(loaded).reply(PROMPT, Sampling(max_tokens=40, temperature=1.0, seed=seed)).text for seed in (1, 1, 2)
    ]

    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_questions_behind_a_context_do_not_see_each_other(loaded: Any) -> None:
    """Asked in any order, each question gets the answer that it gets alone; the context is read once."""
    context, questions = PROMPT * 3, [list(b"Who?"), list(b"When?"), list(b"Why?")]
    one = writer(loaded)
    together = [one.answer(context, each, Sampling(max_tokens=6)) for each in (*questions, questions[0])]
    one.close()
    alone = []
    for each in questions:
        other = writer(loaded)
        alone.append(other.answer(context, each, Sampling(max_tokens=6)))
        other.close()

    assert [each.text for each in together] == [each.text for each in (*alone, alone[0])]
    assert [each.fresh for each in together] == [True, False, False, False]
    assert [each.tokens_read for each in together[:2]] == [len(context) + 4, 5]
    assert {each.compactions for each in together} == {alone[0].compactions}
    assert alone[0].compactions > 0
    assert together[1].compact_seconds == 0.0 < together[0].compact_seconds


def test_shared_questions_are_greedy(loaded: Any) -> None:
    """A transient forward leaves no trace, so there is nothing to sample from twice."""
    with pytest.raises(SettingsRefused, match=r"temperature: 0\.5"):
        writer(loaded).answer(PROMPT, [1], Sampling(temperature=0.5))


def test_a_memory_opened_in_one_task_is_closed_in_another(loaded: Any, tmp_path: Path) -> None:
    """Tasks of asyncio have contexts of their own; the shared memory does not belong to any of them."""
    from contextvars import copy_context

    one = writer(loaded)
    first = copy_context().run(one.answer, PROMPT, [65], Sampling(max_tokens=2))
    second = copy_context().run(one.answer, PROMPT * 2, [65], Sampling(max_tokens=2))
    copy_context().run(one.close)

    assert first.fresh
    assert second.fresh
