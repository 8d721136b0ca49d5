"""What may be done to a model beside a capped block: compiling, copying, offloading, padding, training."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

import agentmem
from support import tiny, variants
from support.tiny_chat import tokenizer


def _layers(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile(backend="eager")


COMPILED: dict[str, Callable[[Any], Any]] = {
    "forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")),
    "decoder's forward": lambda model: setattr(
        model.model, "forward", torch.compile(model.model.forward, backend="eager")
    ),
    "decoder": lambda model: model.model.compile(backend="eager"),
    "layers": _layers,
    "attention": lambda model: model.model.layers[0].self_attn.compile(backend="eager"),
    "wrapped layer": lambda model: model.model.layers.__setitem__(
        0, torch.compile(model.model.layers[0], backend="eager")
    ),
}


@pytest.mark.parametrize("way", COMPILED)
def test_a_compiled_part_that_attends_is_refused(way: str) -> None:
    """Every way to compile a model, or a part that holds an attention call, is refused by name."""
    model = variants.private()
    COMPILED[way](model)

    with pytest.raises(agentmem.UnsupportedModel, match="is compiled"), agentmem.capped(model, **variants.ROOMY):
        pass


def test_a_compiled_mlp_works() -> None:
    """A compiled part without an attention call is served as it is."""
    model, ids = variants.private(), variants.prompt(60)
    stock = model.generate(ids, max_new_tokens=5, do_sample=False)
    model.model.layers[0].mlp.compile(backend="eager")
    with agentmem.capped(model, **variants.ROOMY) as memory:
        ours = model.generate(ids, past_key_values=memory, max_new_tokens=5, do_sample=False)

    assert torch.equal(ours, stock)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301  # our own
def test_a_copy_of_a_capped_model_is_a_stock_one(copied: Callable[[Any], Any]) -> None:
    """Whatever is hung on a capped model, on its decoder and on its config stays out of copies."""
    model, ids = variants.private(), variants.prompt(20)
    with agentmem.wrap(model, **variants.ROOMY):
        twin = copied(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}

    assert twin.config._attn_implementation == model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(twin)
    assert "__reduce_ex__" not in {*vars(twin), *vars(model)}
    for module in (twin, twin.model):
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert torch.equal(twin.generate(ids, **options), type(twin).generate(twin, ids, **options))
    with agentmem.capped(twin, **variants.ROOMY) as memory:
        assert torch.equal(
            twin.generate(ids, past_key_values=memory, **options), twin.generate(ids, use_cache=False, **options)
        )


def test_offloaded_weights_are_served() -> None:
    """Weights that are on no device between forwards: ids go where accelerate runs the embeddings."""
    model, ids = variants.private(), variants.prompt(60)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with agentmem.capped(model, on_failure="raise", **variants.TIGHT) as memory:
        model.generate(ids, past_key_values=memory, max_new_tokens=20, do_sample=False)
        assert memory.peek([5]).shape == (1, 128)

    assert memory.memory.shape.fused
    assert [each.faults for each in memory.report().compactions] == [()] * memory.report().num_compactions


def test_pads_at_the_end_are_refused_before_any_work() -> None:
    """A prompt that is padded on the right has no output that its row could go on from."""
    model, ids = variants.model(), variants.prompt(4, rows=2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    fragments = ("row 0 ends with a pad", "padding_side='left'")
    with agentmem.capped(model, **variants.ROOMY) as memory:
        with variants.refused(model, agentmem.UnsupportedGeneration, *fragments):
            model.generate(ids, attention_mask=mask, past_key_values=memory, max_new_tokens=2)
        assert not memory.memory.used
        model.generate(ids, attention_mask=mask.flip(1), past_key_values=memory, max_new_tokens=2)


def _one_column(model: Any, memory: Any) -> None:
    """A step whose row 0 gets a pad, of which the logits of the last column are wanted."""
    columns = memory.columns
    mask = torch.ones(2, columns + 1, dtype=torch.long)
    mask[0, -1] = 0
    model(torch.tensor([[0], [7]]), attention_mask=mask, past_key_values=memory, logits_to_keep=1)


def _second_turn(model: Any, memory: Any) -> None:
    mask = torch.ones(2, memory.columns + 1, dtype=torch.long)
    mask[0, -1] = 0
    model.generate(torch.tensor([[0], [7]]), attention_mask=mask, past_key_values=memory, max_new_tokens=2)


def _hidden_states(model: Any, memory: Any) -> None:
    longer = torch.cat((variants.prompt(8, rows=2), torch.tensor([[5, 0], [5, 6]])), 1)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, -1] = 0
    options: dict[str, Any] = {"max_new_tokens": 2, "output_hidden_states": True, "return_dict_in_generate": True}
    model.generate(longer, attention_mask=mask, past_key_values=memory, **options)


@pytest.mark.parametrize("call", [_one_column, _second_turn, _hidden_states])
def test_a_pad_in_the_only_new_column_is_refused(call: Callable[[Any, Any], None]) -> None:
    """However few columns a call has and whatever else it returns: its row cannot go on from a pad."""
    model = variants.model()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model(variants.prompt(8, rows=2), past_key_values=memory)
        with variants.refused(model, agentmem.UnsupportedGeneration, "row 0 ends with a pad"):
            call(model, memory)
        assert memory.columns == 8


@pytest.mark.parametrize("columns", [1, 3])
def test_a_prompt_of_pads_alone_is_refused(columns: int) -> None:
    """Nothing can follow a row that has no token; in a forward of its own it is the padding of tokens to come."""
    model, ids = variants.model(), variants.prompt(columns, rows=2)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with agentmem.capped(model, **variants.ROOMY) as memory:
        with variants.refused(model, agentmem.UnsupportedGeneration, "row 1 ends with a pad"):
            model.generate(ids, attention_mask=mask, past_key_values=memory, max_new_tokens=2)
        model(ids, attention_mask=mask, past_key_values=memory, logits_to_keep=1)
        assert [row.seen for row in memory.memory.sequences] == [columns, 0]


def test_training_mode_in_a_block_is_refused() -> None:
    """``model.train()`` after a memory was opened refuses the next forward; ``eval`` goes on."""
    model, ids = variants.private(), variants.prompt(20)
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model.generate(ids, past_key_values=memory, max_new_tokens=1)
        model.train()
        with variants.refused(model, agentmem.UnsupportedModel, "in training mode", "model.eval()"):
            model(input_ids=ids[:, :1], past_key_values=memory)
        with variants.refused(model, agentmem.UnsupportedModel, "in training mode"):
            memory.peek([5])
        model.eval()
        model(input_ids=ids[:, :1], past_key_values=memory)


def test_a_compaction_in_training_mode_is_refused() -> None:
    """Its probe could not run, and every layer would be evicted."""
    with tiny.capped("replay") as memory:
        model: Any = memory.model
        tiny.feed(memory, tiny.ids(30), pieces=7)
        for part in (model, model.model):
            part.train()
            with pytest.raises(agentmem.UnsupportedModel, match="in training mode"):
                memory.compact()
            with pytest.raises(agentmem.UnsupportedModel, match="in training mode"):
                memory.peek([5])
            model.eval()
        (report,) = memory.compact()
        assert (report.index, report.faults) == (0, ())


def test_a_decoder_in_training_mode_is_refused() -> None:
    """The decoder alone has all the dropout: forwards, peeks and further memories are refused before any work."""
    model, ids = variants.private(), variants.prompt(20)
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model.model.train()
        with variants.refused(model, agentmem.UnsupportedModel, "LlamaModel is in training mode", "model.eval()"):
            model.generate(ids, past_key_values=memory, max_new_tokens=2)
        assert not memory.memory.used
        model.eval().generate(ids, past_key_values=memory, max_new_tokens=2)
        model.model.train()
        with variants.refused(model, agentmem.UnsupportedModel, "LlamaModel is in training mode"):
            memory.peek([5])
        with pytest.raises(agentmem.UnsupportedModel, match="LlamaModel is in training mode"):
            agentmem.wrap(model, **variants.ROOMY)
        model.eval()


MOVES: dict[str, Callable[[Any], Any]] = {
    "to": lambda model: model.to("cpu"),
    "type": lambda model: model.type(torch.float32),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "apply": lambda model: model.apply(lambda _: None),
    **{name: operator.methodcaller(name) for name in ("cpu", "float", "train", "eval", "half", "bfloat16", "double")},
}


@pytest.mark.parametrize("name", MOVES)
def test_a_wrapped_model_that_is_moved_or_cast_is_still_capped(name: str) -> None:
    """Methods by which torch returns the model return the wrapped model, whose ``generate`` has the cap."""
    with agentmem.wrap(variants.private(), **variants.ROOMY) as wrapped:
        assert MOVES[name](wrapped) is wrapped
        MOVES["float"](wrapped).eval().generate(variants.prompt(20), max_new_tokens=2)
        assert wrapped.memory.memory.used


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_holds_a_memory_is_not_copied(copied: Callable[[Any], Any]) -> None:
    """Copies and pickles of a memory or a wrapped model are refused at once, and name fork()."""
    with agentmem.wrap(variants.private(), **variants.ROOMY) as wrapped:
        for held in (wrapped, wrapped.memory, wrapped.memory.memory):
            with pytest.raises(agentmem.CopyRefused, match=r"fork\(\)"):
                copied(held)


def test_a_wrapped_model_answers_for_its_model() -> None:
    """Attributes that a wrapped model has not are the model's own."""
    model = variants.private()
    with agentmem.wrap(model, **variants.ROOMY) as wrapped:
        assert wrapped.config is model.config
        assert wrapped.device == model.device
        assert wrapped.generation_config is model.generation_config


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_sessions_and_runtimes_are_not_copied(copied: Callable[[Any], Any]) -> None:
    """Copies and pickles of a session or of its runtime are refused at once."""
    with agentmem.Runtime(variants.private(), tokenizer(), cap="64MiB") as runtime, runtime.session() as session:
        session.append("user", "hi")
        for held in (runtime, session, session.memory):
            with pytest.raises(agentmem.CopyRefused, match=r"fork\(\)"):
                copied(held)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_what_contains_a_memory_is_not_copied(copied: Callable[[Any], Any]) -> None:
    """The part of a session that holds its memory is refused by that memory."""
    with agentmem.Runtime(variants.private(), tokenizer(), cap="64MiB") as runtime, runtime.session() as session:
        session.append("user", "hi")
        with pytest.raises(agentmem.CopyRefused, match=r"fork\(\)"):
            copied(session.holding)
