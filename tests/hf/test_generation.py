"""What ``generate`` does over a capped memory: batches, turns, sampling, processors, criteria, streamers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

import agentmem
from agentmem import plugins
from agentmem.contracts import Policy
from support import variants
from support.matrices import matrix
from support.waiting import LIMIT

TOLERANCE = 5e-5
LENGTHS = (21, 50, 34)
POLICIES = [*map(plugins.policy, variants.POLICIES), plugins.policy("am-halving", probe="live", probe_tokens=16)]
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES, ids=[*variants.POLICIES, "am-halving, live"])


# ---- batches


@matrix(policy=POLICIES, room=["below", "above"], variant=["llama", "gemma3_text"])
def test_a_row_in_a_batch_is_the_row_alone(policy: Policy, room: str, variant: str) -> None:
    """Each of three left-padded rows gets the tokens, logits, slots and compactions that it gets alone."""
    model, settings = variants.model(variant), variants.ROOMY if room == "below" else variants.TIGHT
    ids, mask = variants.left_padded(LENGTHS)
    with agentmem.capped(model, policy=policy, **settings) as memory:
        batch = variants.greedy(model, ids, 30, attention_mask=mask, past_key_values=memory)
        rows = [(row.seen, row.held, row.next_position, row.ids) for row in memory.memory.sequences]
    compactions = memory.compactions

    for index, length in enumerate(LENGTHS):
        with agentmem.capped(model, policy=policy, **settings) as memory:
            alone = variants.greedy(model, ids[index : index + 1, -length:], 30, past_key_values=memory)
            (row,) = memory.memory.sequences
            assert rows[index] == (row.seen, row.held, row.next_position, row.ids)
        mine = [report.tokens_seen for report in compactions if report.row == index]
        assert mine == [report.tokens_seen for report in memory.compactions]
        assert (len(mine) > 0) == (room == "above")
        assert torch.equal(batch.sequences[index, -length - 30 :], alone.sequences[0])
        torch.testing.assert_close(variants.steps(batch)[index], variants.steps(alone)[0], rtol=0, atol=10 * TOLERANCE)


def test_a_left_padded_batch_below_the_cap_is_stock() -> None:
    """Three left-padded rows get stock's tokens and logits."""
    model, (ids, mask) = variants.model(), variants.left_padded(LENGTHS)
    stock = variants.greedy(model, ids, 20, attention_mask=mask)

    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = variants.greedy(model, ids, 20, attention_mask=mask, past_key_values=memory)

    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(variants.steps(ours), variants.steps(stock), rtol=0, atol=TOLERANCE)


def test_the_cap_is_shared_by_all_rows() -> None:
    """Three rows have fewer slots each under the same cap, and never more bytes together."""
    model, (ids, mask) = variants.model(), variants.left_padded(LENGTHS)
    alone = agentmem.plan(model, cap="300KiB", chunk=16, keep_first=4, keep_recent=8)

    with agentmem.capped(model, cap="300KiB", chunk=16, keep_first=4, keep_recent=8) as memory:
        model.generate(ids, attention_mask=mask, max_new_tokens=10, past_key_values=memory)

    assert memory.plan.rows == 3
    assert memory.plan.capacity < alone.capacity
    assert memory.report().peak_bytes <= 300 * 1024


def test_finished_rows_wait_for_the_others() -> None:
    """A row that met its end token is padded like stock's while the others go on."""
    model, ids = variants.model(), variants.prompt(20, rows=3)
    free = model.generate(ids, max_new_tokens=25, do_sample=False)
    end = int(free[1, 24])
    stock = model.generate(ids, max_new_tokens=25, do_sample=False, eos_token_id=end, pad_token_id=0)

    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = model.generate(
            ids, max_new_tokens=25, do_sample=False, eos_token_id=end, pad_token_id=0, past_key_values=memory
        )

    assert torch.equal(ours, stock)
    assert (stock[1, 26:] == 0).all()


@pytest.mark.parametrize("how", ["argument", "config"])
def test_several_sequences_from_one_prompt(how: str) -> None:
    """num_return_sequences makes rows of its own, with stock's draws."""
    model, ids = variants.model(), variants.prompt(30, rows=2)
    options: dict[str, Any] = {"max_new_tokens": 15, "do_sample": True, "num_return_sequences": 3}

    def sampled(**kwargs: Any) -> torch.Tensor:
        torch.manual_seed(3)
        chosen = options if how == "argument" else {"generation_config": GenerationConfig(**options)}
        return model.generate(ids, **chosen, **kwargs)  # type: ignore[no-any-return]

    stock = sampled()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = sampled(past_key_values=memory)

    assert torch.equal(ours, stock)
    assert memory.report().rows == 6
    assert len({tuple(row) for row in ours.tolist()}) > 3


# ---- prompts


@EVERY_POLICY
def test_a_prompt_of_many_times_the_cap(policy: Policy) -> None:
    """A prompt of six times the slots is taken in pieces, compacting on the way, and never crosses the cap."""
    model, ids = variants.model(), variants.prompt(240)
    plan = agentmem.plan(model, policy=policy, **variants.TIGHT)
    settings = variants.TIGHT | {"cap": plan.resident_bytes + plan.workspace_bytes}
    with agentmem.capped(model, policy=policy, **settings) as memory:
        output = model.generate(ids, max_new_tokens=5, past_key_values=memory)
        report = memory.report()

    assert output.shape == (1, 245)
    assert report.num_prompt_tokens == 240
    assert report.num_compactions >= 10
    assert report.peak_bytes <= report.cap_bytes


def test_the_moments_of_compaction_do_not_depend_on_the_pieces() -> None:
    """However a text is cut into forwards, rows are compacted at the same tokens."""
    model, ids = variants.model(), variants.prompt(90)
    moments = []
    for cuts in ([90], [7] * 12 + [6], [1] * 90, [50, 40]):
        with torch.no_grad(), agentmem.capped(model, policy="window", **variants.TIGHT) as memory:
            for piece in ids.split(cuts, 1):
                model(piece, past_key_values=memory, logits_to_keep=1)
        moments.append([report.tokens_seen for report in memory.compactions])

    assert moments == [[40, 60, 80]] * 4


def test_prefill_in_chunks_of_transformers_own() -> None:
    """A caller's prefill_chunk_size is served: the same tokens."""
    model, ids = variants.model(), variants.prompt(60)
    stock = model.generate(ids, max_new_tokens=15, do_sample=False)

    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = model.generate(ids, max_new_tokens=15, do_sample=False, prefill_chunk_size=23, past_key_values=memory)

    assert torch.equal(ours, stock)


def test_embeddings_instead_of_ids() -> None:
    """inputs_embeds work with a policy that needs no ids, below the cap like stock and above it."""
    model, ids = variants.model(), variants.prompt(40)
    embeds = model.get_input_embeddings()(ids).detach()
    stock = model.generate(inputs_embeds=embeds, max_new_tokens=20, do_sample=False)

    with agentmem.capped(model, policy="window", **variants.ROOMY) as memory:
        ours = model.generate(inputs_embeds=embeds, max_new_tokens=20, do_sample=False, past_key_values=memory)
    with agentmem.capped(model, policy="window", **variants.TIGHT) as memory:
        model.generate(inputs_embeds=embeds, max_new_tokens=20, do_sample=False, past_key_values=memory)

    assert torch.equal(ours, stock)
    assert memory.report().num_compactions >= 1


def test_hidden_states_of_a_prompt_are_whole_or_refused() -> None:
    """Hidden states are wanted for every position: a prompt of one chunk gives stock's, a longer one is refused."""
    model, ids = variants.model(), variants.prompt(16)
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    stock = model.generate(ids, **options)

    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = model.generate(ids, **options, past_key_values=memory)
        with pytest.raises(agentmem.MemoryCapExceeded, match=r"17 tokens.*chunk=16"):
            model.generate(torch.cat((ours.sequences, variants.prompt(16)), 1), **options, past_key_values=memory)

    torch.testing.assert_close(ours.hidden_states[0], stock.hidden_states[0], rtol=0, atol=TOLERANCE)


# ---- what callers add


class Forbid(LogitsProcessor):
    """Forbids the token that was drawn before."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Mask it."""
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)  # type: ignore[return-value]


class AfterColumns(StoppingCriteria):
    """Stops at 33 columns."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        """Every row at once."""
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 33)  # type: ignore[return-value]


class Ids(BaseStreamer):
    """Collects what a streamer is given."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        """Ids as they come."""
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        """No more."""
        self.ended = True


def test_processors_criteria_and_streamers_are_served() -> None:
    """Logits processors, stopping criteria and a streamer see what they see in stock."""
    model, ids = variants.model(), variants.prompt(20)

    def run(**kwargs: Any) -> tuple[torch.Tensor, Ids]:
        streamer = Ids()
        output = model.generate(
            ids,
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=1.2,
            logits_processor=LogitsProcessorList([Forbid()]),
            stopping_criteria=StoppingCriteriaList([AfterColumns(), MaxTimeCriteria(600)]),
            streamer=streamer,
            **kwargs,
        )
        return output, streamer

    stock, stock_streamer = run()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours, streamer = run(past_key_values=memory)

    assert ours.shape == (1, 33)
    assert torch.equal(ours, stock)
    assert (streamer.seen, streamer.ended) == (stock_streamer.seen, True)


class Spelling:
    """A tokenizer for streamers: every id is a word."""

    def decode(self, ids: list[int], **_: Any) -> str:
        """Words."""
        return "".join(f"{each} " for each in ids)


def test_a_streamer_in_a_thread() -> None:
    """A run in a thread feeds a TextIteratorStreamer that the main thread reads, over compactions."""
    model, ids = variants.model(), variants.prompt(30)
    streamer = TextIteratorStreamer(Spelling(), skip_prompt=True, timeout=LIMIT)  # type: ignore[arg-type]
    outputs: list[torch.Tensor] = []
    with agentmem.capped(model, **variants.TIGHT) as memory:
        thread = threading.Thread(
            target=lambda: outputs.append(
                model.generate(ids, max_new_tokens=30, do_sample=False, streamer=streamer, past_key_values=memory)
            )
        )
        thread.start()
        text = "".join(streamer)
        thread.join()

    assert [int(word) for word in text.split()] == outputs[0][0, 30:].tolist()
    assert memory.report().num_compactions >= 1


def test_a_loop_of_ones_own() -> None:
    """custom_generate=<callable> gets prepared inputs and the memory; its own loop gives stock's greedy tokens."""
    model, ids = variants.model(), variants.prompt(20)
    stock = model.generate(ids, max_new_tokens=8, do_sample=False)

    def loop(lm: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        memory, step = kwargs["past_key_values"], input_ids
        for _ in range(8):
            step = lm(step, past_key_values=memory, logits_to_keep=1).logits.argmax(-1)
            input_ids = torch.cat((input_ids, step), 1)
        return input_ids

    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = model.generate(ids, max_new_tokens=8, do_sample=False, custom_generate=loop, past_key_values=memory)

    assert torch.equal(ours, stock)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_callers_in_either_mode(mode: Any) -> None:
    """Under inference_mode and under no_grad tokens are stock's, and the memory goes on outside."""
    model, ids = variants.model(), variants.prompt(20)
    stock = model.generate(ids, max_new_tokens=10, do_sample=False)

    with agentmem.capped(model, **variants.ROOMY) as memory:
        with mode():
            ours = model.generate(ids, max_new_tokens=10, do_sample=False, past_key_values=memory)
        longer = torch.cat((ours.clone(), variants.prompt(3)), 1)
        model.generate(longer, max_new_tokens=3, past_key_values=memory)

    assert torch.equal(ours, stock)


@EVERY_POLICY
def test_compactions_leave_the_global_random_state_alone(policy: Policy) -> None:
    """A greedy run over compactions ends in the random state that it began in."""
    model = variants.model()
    state = torch.get_rng_state()
    with agentmem.capped(model, policy=policy, **variants.TIGHT) as memory:
        model.generate(variants.prompt(60), max_new_tokens=10, do_sample=False, past_key_values=memory)

    assert memory.report().num_compactions == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_return_dict_carries_the_memory() -> None:
    """return_dict_in_generate returns the memory as past_key_values, as stock returns its cache."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        output = variants.greedy(model, variants.prompt(10), 3, past_key_values=memory)

    assert output.past_key_values is memory
    assert len(output.logits) == 3
