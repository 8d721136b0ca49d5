"""Misuse of a memory in use is loud: prompts, masks, bypasses, its end; and settings that cannot work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import agentmem
from agentmem.errors import (
    AgentmemError,
    CapBypassed,
    CapTooSmall,
    MemoryCapExceeded,
    MemoryClosed,
    MemoryUnused,
    PromptMismatch,
    SettingsRefused,
    UnknownPolicy,
    UnsupportedGeneration,
)
from support import variants

# ---- prompts


def test_a_prompt_that_departs_from_the_conversation_is_refused() -> None:
    """A changed past is refused with the place where it departs."""
    model, ids = variants.model(), variants.prompt(10)
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        longer = torch.cat((ours.generate(ids, max_new_tokens=5), variants.prompt(3)), 1)
        longer[0, 4] = 127 - longer[0, 4]
        with variants.refused(model, PromptMismatch, "row 0", "token 4 of 14", "open a new memory"):
            ours.generate(longer, max_new_tokens=2)
        with variants.refused(model, PromptMismatch, "token 4 of 14"):
            ours.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=2)


def test_a_prompt_that_is_not_longer_is_refused() -> None:
    """The very same prompt, and new tokens without a mask over everything, are refused."""
    model, ids = variants.model(), variants.prompt(10)
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        ours.generate(ids, max_new_tokens=5)
        for short in (ids, variants.prompt(3)):
            fragments = (f"has {short.shape[1]} column(s)", "has seen 14", "whole conversation")
            with variants.refused(model, PromptMismatch, *fragments):
                ours.generate(short, max_new_tokens=2)


def test_another_batch_size_is_refused() -> None:
    """A memory serves the batch that it began with, through generate and through a forward."""
    model, ids = variants.model(), variants.prompt(10, rows=2)
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model.generate(ids, max_new_tokens=5, past_key_values=memory)
        with variants.refused(model, PromptMismatch, "holds 2 row(s), the prompt makes 3"):
            model.generate(variants.prompt(20, rows=3), max_new_tokens=2, past_key_values=memory)
        with variants.refused(model, UnsupportedGeneration, "batch of 1", "2"):
            model(ids[:1], past_key_values=memory)


def test_a_mask_of_another_length_is_refused() -> None:
    """A mask that covers neither the prompt nor everything is refused."""
    model, ids = variants.model(), variants.prompt(10)
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        longer = torch.cat((ours.generate(ids, max_new_tokens=5), variants.prompt(3)), 1)
        with variants.refused(model, PromptMismatch, "attention_mask", "17", "18"):
            ours.generate(longer, attention_mask=torch.ones(1, 17, dtype=torch.long), max_new_tokens=2)


def test_a_forward_whose_mask_forgets_the_past_is_refused() -> None:
    """A mask over the new columns alone would leave open which earlier columns were pads."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model(variants.prompt(5), past_key_values=memory)
        for keep in (0, 1):
            fragments = ("attention_mask has 3 columns", "the 5 seen so far", "3 new")
            with variants.refused(model, UnsupportedGeneration, *fragments):
                mask = torch.ones(1, 3, dtype=torch.long)
                model(variants.prompt(3), attention_mask=mask, past_key_values=memory, logits_to_keep=keep)


def test_embeddings_cannot_be_replayed() -> None:
    """inputs_embeds with a policy that replays is refused with what would do."""
    model = variants.model()
    embeds = model.get_input_embeddings()(variants.prompt(5)).detach()
    fragments = ("inputs_embeds have no token ids", "'am-halving'", "probe='live'")
    with agentmem.wrap(model, **variants.ROOMY) as ours, variants.refused(model, UnsupportedGeneration, *fragments):
        ours.generate(inputs_embeds=embeds, max_new_tokens=2)


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 1, 5, 5), {"full_attention": torch.ones(1, 1, 5, 5)}], ids=["4-D", "dict"]
)
@pytest.mark.parametrize("keep", [0, 1])
def test_prepared_masks_are_refused(mask: Any, keep: int) -> None:
    """Masks that say who sees whom cannot be combined with slots that are no columns."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        with variants.refused(model, UnsupportedGeneration, "2-D [batch, columns]"):
            model(variants.prompt(5), attention_mask=mask, past_key_values=memory, logits_to_keep=keep)
        model(variants.prompt(5), past_key_values=memory)


def test_a_forward_beyond_the_chunk_that_cannot_be_cut_is_refused() -> None:
    """Logits of every position are wanted: at most a chunk at once."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        with variants.refused(model, MemoryCapExceeded, "17 tokens", "at most 16", "logits_to_keep=1"):
            model(variants.prompt(17), past_key_values=memory)
        assert model(variants.prompt(16), past_key_values=memory).logits.shape[1] == 16


# ---- the memory's own life


def test_a_memory_that_no_forward_used_is_an_error() -> None:
    """A block in which nothing was generated is noticed at its end, unless it failed by itself."""
    model = variants.model()
    with pytest.raises(MemoryUnused, match="past_key_values=memory"), agentmem.capped(model, **variants.ROOMY):
        pass
    with pytest.raises(ZeroDivisionError), agentmem.capped(model, **variants.ROOMY):
        _ = 1 / 0


def test_a_cache_beside_the_memory_is_an_error() -> None:
    """A plain forward without past_key_values would grow a cache outside the cap."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        for bypass in (
            lambda: model(variants.prompt(5)),
            lambda: model(input_ids=variants.prompt(5), use_cache=True),
            lambda: model.get_decoder()(variants.prompt(5)),
        ):
            with variants.refused(model, CapBypassed, "past_key_values=memory", "use_cache=False"):
                bypass()
        model.generate(variants.prompt(5), max_new_tokens=2, use_cache=False)
        model.generate(variants.prompt(5), GenerationConfig(max_new_tokens=2, use_cache=False))
        model(variants.prompt(5), use_cache=False)
        model(variants.prompt(5), past_key_values=DynamicCache(config=model.config))
        model(variants.prompt(5), past_key_values=memory)


@pytest.mark.parametrize("given", [{}, {"past_key_values": None}])
def test_generate_takes_the_memory_of_its_block(given: dict[str, Any]) -> None:
    """Unmodified code runs under the cap, turn after turn, and gives the tokens that passing the memory gives."""
    model, outputs = variants.model(), []
    for passed in (False, True):
        with agentmem.capped(model, **variants.TIGHT) as memory:
            more = {"past_key_values": memory} if passed else given
            ids = model.generate(variants.prompt(50), GenerationConfig(max_new_tokens=20, do_sample=False), **more)
            outputs.append(model.generate(torch.cat((ids, variants.prompt(3)), 1), max_new_tokens=2, **more))
        assert memory.report().num_compactions >= 1
    assert torch.equal(*outputs)


def test_generate_in_two_blocks_must_be_told_which_memory() -> None:
    """Where two blocks cap the model, generate without a memory is refused; another model's block is none of its."""
    model, other = variants.model(), variants.private()
    with agentmem.capped(model, **variants.ROOMY) as outer:
        with agentmem.capped(other, **variants.ROOMY) as foreign:
            model.generate(variants.prompt(5), max_new_tokens=2)
            other.generate(variants.prompt(5), max_new_tokens=2)
            assert outer.get_seq_length() == foreign.get_seq_length() == 6
        with agentmem.capped(model, **variants.ROOMY) as inner:
            with variants.refused(model, CapBypassed, "2 blocks cap this model", "past_key_values=memory"):
                model.generate(variants.prompt(5), max_new_tokens=2)
            model.generate(variants.prompt(5), max_new_tokens=2, past_key_values=inner)


def test_a_context_that_outlives_its_block_has_no_memory() -> None:
    """A task that was begun in a block and goes on after it generates as stock does, while another block runs."""
    model = variants.model()
    stock = model.generate(variants.prompt(5), max_new_tokens=2)
    with agentmem.capped(model, **variants.ROOMY):
        model.generate(variants.prompt(5), max_new_tokens=2)
        task = copy_context()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        assert torch.equal(task.run(model.generate, variants.prompt(5), max_new_tokens=2), stock)
        assert not memory.memory.used
        model.generate(variants.prompt(5), max_new_tokens=2)


def test_a_closed_memory_is_refused() -> None:
    """After its block a memory serves neither generate nor a forward, attached or not; its report stays."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model.generate(variants.prompt(5), max_new_tokens=2, past_key_values=memory)
    for _ in range(2):
        with refused_midway(MemoryClosed):
            model.generate(variants.prompt(9), max_new_tokens=2, past_key_values=memory)
        with refused_midway(MemoryClosed):
            model(variants.prompt(2), past_key_values=memory)
    with agentmem.capped(model, **variants.ROOMY) as other:
        with variants.refused(model, MemoryClosed, "agentmem.capped"):
            model.generate(variants.prompt(9), max_new_tokens=2, past_key_values=memory)
        with variants.refused(model, MemoryClosed, "agentmem.capped"):
            model(variants.prompt(2), past_key_values=memory)
        model(variants.prompt(2), past_key_values=other)
    with pytest.raises(MemoryClosed):
        memory.compact()

    assert memory.report().num_new_tokens >= 1


@contextmanager
def refused_midway(error: type[AgentmemError]) -> Iterator[None]:
    """The block raises that error; a model without our hooks may have entered its first layer by then."""
    with pytest.raises(error):
        yield


@pytest.mark.parametrize("attached", [False, True])
def test_a_memory_of_another_model_is_refused(attached: bool) -> None:
    """A memory passed to a model that it was not opened for is refused, even if that model has one of its own."""
    model, other = variants.model(), variants.private()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model(variants.prompt(4), past_key_values=memory)
        if attached:
            with agentmem.wrap(other, **variants.ROOMY):
                with variants.refused(other, UnsupportedGeneration, "not opened for", "agentmem.capped"):
                    other(variants.prompt(4), past_key_values=memory)
                with variants.refused(other, UnsupportedGeneration, "not opened for", "agentmem.capped"):
                    other.generate(variants.prompt(9), max_new_tokens=2, past_key_values=memory)
        else:
            with pytest.raises(UnsupportedGeneration, match="not opened for"):
                other(variants.prompt(4), past_key_values=memory)
        assert memory.get_seq_length() == 4


def test_a_memory_takes_nothing_back() -> None:
    """crop, beams, repeated and selected rows and reset are refused with what to do instead."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model(variants.prompt(4), past_key_values=memory)
        for call, fragment in (
            (lambda: memory.crop(2), "greedy decoding or sampling"),
            (memory.activate_past_recording, "greedy decoding or sampling"),
            (lambda: memory.reorder_cache(torch.tensor([0])), "num_beams=1"),  # type: ignore[arg-type]
            (lambda: memory.batch_repeat_interleave(2), "batch the prompt"),
            (lambda: memory.batch_select_indices(torch.tensor([0])), "open a new memory"),
            (memory.reset, "open a new memory"),
        ):
            with variants.refused(model, UnsupportedGeneration, fragment):
                call()

    assert not memory.is_croppable
    assert not memory.is_compileable


# ---- settings


def test_an_unknown_policy_gets_a_suggestion() -> None:
    """A misspelt policy is refused with the nearest name."""
    model = variants.model()
    with variants.refused(model, UnknownPolicy, "'am-halfing' is unknown", "did you mean 'am-halving'"):
        agentmem.wrap(model, cap="1MiB", policy="am-halfing")


def test_unknown_settings_are_refused() -> None:
    """A misspelt setting is refused with its name and all that there are."""
    model = variants.model()
    with variants.refused(model, SettingsRefused, "keep_last", "keep_recent"):
        agentmem.wrap(model, cap="1MiB", keep_last=3)


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"cap": "lots"}, ("cannot read 'lots'", "24MiB")),
        ({"cap": 0}, ("0 is not positive",)),
        ({"cap": "1MiB", "target": 1.5}, ("target", "1.5", "between 0 and 1")),
        ({"cap": "1MiB", "mode": "often"}, ("mode", "often")),
        ({"cap": "1MiB", "max_slots": 20}, ("max_slots: 20 is below",)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], fragments: tuple[str, ...]) -> None:
    """Each is refused with the field and the value."""
    model = variants.model()
    with variants.refused(model, SettingsRefused, *fragments):
        agentmem.wrap(model, **settings)


def test_a_cap_that_is_too_small_says_what_would_do() -> None:
    """The cap named in the refusal is accepted, one byte less is not; more rows are refused at their first forward."""
    model = variants.model()
    with (
        variants.refused(model, CapTooSmall, "4.0 KiB", "too small", "raise cap") as _,
        agentmem.capped(model, cap="4KiB", chunk=16),
    ):
        pass
    with pytest.raises(CapTooSmall) as caught:
        agentmem.plan(model, cap="4KiB", chunk=16)
    enough = int(re.search(r"need (\d+) bytes", str(caught.value))[1])  # type: ignore[index]

    assert agentmem.plan(model, cap=enough, chunk=16).cap_bytes == enough
    with pytest.raises(CapTooSmall):
        agentmem.plan(model, cap=enough - 1, chunk=16)
    with agentmem.wrap(model, cap=enough, chunk=16) as ours, variants.refused(model, CapTooSmall, "3 row(s)"):
        ours.generate(variants.prompt(5, rows=3), max_new_tokens=2)


def test_a_full_memory_that_never_compacts_is_an_error() -> None:
    """The policy "full", and mode="off", raise when the slots are used up and say why."""
    model = variants.model()
    for settings, why in (({"policy": "full"}, "never compacts"), ({"mode": "off"}, "mode='off'")):
        with agentmem.wrap(model, **variants.TIGHT, **settings) as ours:  # type: ignore[arg-type]
            with pytest.raises(MemoryCapExceeded, match=f"40 of 40 slots.*{why}.*raise cap"):
                ours.generate(variants.prompt(30), max_new_tokens=30)
            assert ours.memory.get_seq_length() == 40


def test_a_memory_of_ones_own_is_refused_by_a_wrapped_model() -> None:
    """wrap(...).generate brings its own past_key_values."""
    model = variants.model()
    with (
        agentmem.wrap(model, **variants.ROOMY) as ours,
        variants.refused(model, SettingsRefused, "past_key_values", "agentmem.capped"),
    ):
        ours.generate(variants.prompt(5), past_key_values=DynamicCache(config=model.config))


def test_a_repeat_probe_needs_a_tokenizer() -> None:
    """probe="repeat" has an instruction to tokenize."""
    model = variants.model()
    with variants.refused(model, SettingsRefused, "'repeat'", "tokenizer=", "probe='replay'"):
        agentmem.wrap(model, cap="1MiB", policy_options={"probe": "repeat"})
