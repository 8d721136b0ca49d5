"""The two doors: blocks that leave nothing behind, and an object whose memory lives over turns."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

import agentmem
from agentmem import Compaction, CompactionFailed, Compactor, MemoryUnused, Policy, Queries, Segment, plugins
from agentmem.contracts import SegmentShape
from agentmem.serving.settings import ServerSettings
from agentmem.settings import Settings, SettingsOptions
from support import tiny_chat, variants
from support.waiting import LIMIT


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Everything that a capped block touches on a model."""
    modules = list(model.modules())
    hooks = [
        (len(each._forward_pre_hooks), len(each._forward_hooks), len(each._forward_hooks_always_called))
        for each in modules
    ]
    return (
        model.config._attn_implementation,
        [sorted(vars(each)) for each in modules],
        hooks,
        model.config.to_json_string(),
        model.generation_config.to_json_string(),
        "generate" in vars(model),
    )


# ---- blocks


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_stays_on_a_model(implementation: str) -> None:
    """After a block, attention, hooks, generate and configs are what they were; and so after one that fails."""
    model = variants.private()
    model.set_attn_implementation(implementation)
    before = fingerprint(model)

    with agentmem.capped(model, **variants.TIGHT) as memory:
        assert fingerprint(model) != before
        model.generate(variants.prompt(50), max_new_tokens=5, past_key_values=memory)
    assert fingerprint(model) == before
    with pytest.raises(ZeroDivisionError), agentmem.capped(model, **variants.TIGHT) as memory:
        model.generate(variants.prompt(50), max_new_tokens=1 // 0, past_key_values=memory)
    assert fingerprint(model) == before
    with pytest.raises(MemoryUnused), agentmem.capped(model, **variants.TIGHT):
        pass
    assert fingerprint(model) == before


def test_a_generate_of_the_callers_own_is_put_back() -> None:
    """A model whose instance has a generate of its own keeps it, and it is called in the block."""
    model = variants.private()
    calls: list[int] = []
    stock = model.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    model.generate = counted
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model.generate(variants.prompt(5), max_new_tokens=2, past_key_values=memory)

    assert model.generate is counted
    assert calls == [1]


def test_a_block_frees_its_slots() -> None:
    """After the block nothing is held, and the report tells what was."""
    model = variants.model()
    with agentmem.capped(model, **variants.TIGHT) as memory:
        model.generate(variants.prompt(50), max_new_tokens=5, past_key_values=memory)
        held = memory.usage().resident_bytes

    assert held > 0
    assert memory.usage().resident_bytes == 0
    assert memory.report().num_compactions == 1
    assert memory.report().peak_bytes >= held


def test_nested_blocks_are_counted() -> None:
    """Two memories on one model live beside each other; the model is restored with the outer one."""
    model, ids = variants.private(), variants.prompt(20)
    before, stock = fingerprint(model), model.generate(ids, max_new_tokens=10, do_sample=False)

    with agentmem.capped(model, **variants.ROOMY) as outer:
        first = model.generate(ids[:, :9], max_new_tokens=1, past_key_values=outer)
        with agentmem.capped(model, **variants.TIGHT) as inner:
            model.generate(variants.prompt(60), max_new_tokens=10, past_key_values=inner)
        assert fingerprint(model) != before
        ours = model.generate(ids, max_new_tokens=10, do_sample=False, past_key_values=outer)

    assert first.shape == (1, 10)
    assert torch.equal(ours, stock)
    assert fingerprint(model) == before


def test_an_exception_inside_a_nested_block_ends_both() -> None:
    """An error that leaves both blocks restores the model."""
    model = variants.private()
    before = fingerprint(model)
    settings = variants.ROOMY
    with pytest.raises(ZeroDivisionError), agentmem.capped(model, **settings), agentmem.capped(model, **settings):
        _ = 1 / 0

    assert fingerprint(model) == before


def test_a_block_is_usable_once_per_call() -> None:
    """Each call makes a new memory: state does not leak from one block into the next."""
    model, ids = variants.model(), variants.prompt(30)
    outputs = []
    for _ in range(2):
        with agentmem.capped(model, **variants.TIGHT) as memory:
            outputs.append(model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=memory))

    assert torch.equal(*outputs)


def test_two_threads_with_memories_of_their_own() -> None:
    """Two threads that stream from capped memories on one model get what each gets alone."""
    model = variants.private()
    before = fingerprint(model)
    prompts = [variants.prompt(30, seed=seed) for seed in (5, 6)]

    def run(ids: torch.Tensor, streamer: Any = None) -> torch.Tensor:
        with agentmem.capped(model, **variants.TIGHT) as memory:
            output = model.generate(ids, max_new_tokens=40, do_sample=False, streamer=streamer, past_key_values=memory)
            assert memory.report().num_compactions == 2
        return output  # type: ignore[no-any-return]

    alone = [run(ids) for ids in prompts]
    streamers = [TextIteratorStreamer(Spelling(), skip_prompt=True, timeout=LIMIT) for _ in prompts]  # type: ignore[arg-type]
    threads = [threading.Thread(target=run, args=pair) for pair in zip(prompts, streamers, strict=True)]
    for thread in threads:
        thread.start()
    texts = ["".join(streamer) for streamer in streamers]
    for thread in threads:
        thread.join()

    assert [[int(word) for word in text.split()] for text in texts] == [ids[0, 30:].tolist() for ids in alone]
    assert fingerprint(model) == before


class Spelling:
    """A tokenizer whose words are ids."""

    def decode(self, ids: list[int], **_: Any) -> str:
        """Words."""
        return "".join(f"{each} " for each in ids)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Ids."""
        return {"input_ids": [2 + len(word) for word in text.split()]}


def test_a_block_in_one_thread_does_not_bind_another() -> None:
    """Only the context that opened a block must not forget past_key_values; other threads are free."""
    model, ids = variants.model(), variants.prompt(8)
    stock = model.generate(ids, max_new_tokens=5, do_sample=False)
    results: list[torch.Tensor] = []
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model(ids, past_key_values=memory)
        thread = threading.Thread(target=lambda: results.append(model.generate(ids, max_new_tokens=5, do_sample=False)))
        thread.start()
        thread.join()

    assert torch.equal(results[0], stock)


def test_cap_texts_and_integers_are_the_same() -> None:
    """A cap may be written with a unit."""
    model = variants.model()

    assert agentmem.plan(model, cap="1MiB", chunk=16) == agentmem.plan(model, cap=2**20, chunk=16)


def test_every_entry_point_takes_the_model_and_its_tokenizer_first() -> None:
    """So that the arguments of one can be passed to another; a plan needs no tokenizer."""
    for entry in (agentmem.plan, agentmem.capped, agentmem.wrap, agentmem.Runtime):
        assert list(inspect.signature(entry).parameters)[:3] == ["model", "tokenizer", "cap"]
    model = tiny_chat.model()
    given = agentmem.plan(model, tiny_chat.tokenizer(), cap="1MiB", chunk=16)

    assert given == agentmem.plan(model, cap="1MiB", chunk=16)


def test_a_plan_needs_no_weights() -> None:
    """The plan of a config alone is the plan of its model."""
    model = variants.model()

    assert agentmem.plan(model.config, cap="1MiB", chunk=16) == agentmem.plan(model, cap="1MiB", chunk=16)
    assert (
        agentmem.plan(model.config, cap="1MiB", chunk=16, itemsize=2).capacity
        > agentmem.plan(model, cap="1MiB", chunk=16).capacity
    )


def test_a_policy_may_be_an_object() -> None:
    """A Policy is taken as it is; a name takes options."""
    model = variants.model()
    made = plugins.policy("am-halving", score="mean")
    with agentmem.capped(model, policy=made, **variants.TIGHT) as memory:
        model.generate(variants.prompt(50), max_new_tokens=2, past_key_values=memory)
    with agentmem.capped(model, policy_options={"score": "max"}, **variants.TIGHT) as memory:
        model.generate(variants.prompt(50), max_new_tokens=2, past_key_values=memory)

    assert memory.memory.policy.compactor != made.compactor
    assert memory.report().num_compactions == 1


def test_a_repeat_probe_takes_the_tokenizer() -> None:
    """probe="repeat" asks with its instruction, tokenized once at the edge."""
    model = variants.model()
    options = {"probe": "repeat", "probe_tokens": 16}
    with agentmem.capped(model, tokenizer=Spelling(), policy_options=options, **variants.TIGHT) as memory:
        model.generate(variants.prompt(50), max_new_tokens=2, past_key_values=memory)

    assert memory.memory.words == {"am-halving": {"repeat": ((8, 5, 10, 9, 6, 5, 7),)}}
    assert memory.report().num_compactions == 1


def test_a_mixture_is_an_option_in_one_line() -> None:
    """Sources with shares and weights; those with a text get the caller's tokenizer; the report names them."""
    model = variants.model()
    options = {"probe": "focus+replay:2+spread*0.5", "focus": "the red door", "probe_tokens": 16}
    with agentmem.capped(model, tokenizer=Spelling(), policy_options=options, **variants.TIGHT) as memory:
        model.generate(variants.prompt(50), max_new_tokens=2, past_key_values=memory)

    assert memory.memory.words == {"am-halving": {"focus": ((5, 5, 6),)}}
    assert memory.compactions[0].queries == "focus+replay+spread"
    assert [part.weight for part in memory.memory.policy.queries.parts] == [1.0, 1.0, 0.5]


# ---- a wrapped model


def test_a_wrapped_model_returns_what_generate_returns() -> None:
    """What comes back is Hugging Face's own result in both of its forms; the report is beside it, and is JSON."""
    model, ids = variants.model(), variants.prompt(30)
    stock = model.generate(ids, max_new_tokens=5, do_sample=False)
    with agentmem.wrap(model, Spelling(), **variants.ROOMY) as ours:
        plain = ours.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=False)
        report = json.loads(ours.report().model_dump_json())
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        rich = ours.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)

    assert type(plain) is type(stock)
    assert torch.equal(plain, stock)
    assert torch.equal(rich.sequences, stock)
    assert type(rich).__name__ == "GenerateDecoderOnlyOutput"
    assert report["num_prompt_tokens"] == 30
    assert report["cap_bytes"] == 64 * 2**20
    assert 0 < report["peak_bytes"] <= report["cap_bytes"]


def test_every_token_is_counted_once() -> None:
    """Tokens of prompts and tokens consumed one at a time add up; a turn's last sampled one waits for the next."""
    model = variants.model()
    with agentmem.wrap(model, **variants.TIGHT) as ours:
        first = ours.generate(variants.prompt(30), max_new_tokens=12)
        report = ours.report()
        assert (report.num_prompt_tokens, report.num_new_tokens) == (30, 12 - 1)
        ours.generate(torch.cat((first, variants.prompt(7)), 1), max_new_tokens=9)
        report = ours.report()

    assert (report.num_prompt_tokens, report.num_new_tokens) == (30 + 1 + 7, 12 - 1 + 9 - 1)


def test_turns_go_on_until_reset() -> None:
    """The memory lives over turns; reset begins anew under the same settings with the same tokens."""
    model, ids = variants.private(), variants.prompt(30)
    before = fingerprint(model)
    ours = agentmem.wrap(model, **variants.TIGHT)
    first = ours.generate(ids, max_new_tokens=20, do_sample=False)
    assert ours.report().num_compactions == 1
    ours.generate(torch.cat((first, variants.prompt(5)), 1), max_new_tokens=20, do_sample=False)
    assert ours.report().num_compactions == 2
    ours.reset()
    again = ours.generate(ids, max_new_tokens=20, do_sample=False)
    ours.close()

    assert torch.equal(again, first)
    assert ours.report().num_compactions == 1
    assert fingerprint(model) == before


def test_closing_twice_is_closing_once() -> None:
    """Both close() and the end of a with block may come; other memories on the model are not cut off."""
    model = variants.private()
    before = fingerprint(model)
    other = agentmem.wrap(model, **variants.ROOMY)
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        ours.generate(variants.prompt(5), max_new_tokens=2)
        ours.close()
    ours.close()
    assert other.generate(variants.prompt(5), max_new_tokens=2).shape == (1, 7)
    other.close()

    assert fingerprint(model) == before
    with pytest.raises(agentmem.MemoryClosed):
        ours.generate(variants.prompt(5), max_new_tokens=2)


@pytest.mark.parametrize("count", [3, 5, 9])
def test_a_memory_whose_block_has_ended_is_named(count: int) -> None:
    """Whatever of the prompt it has seen."""
    model = variants.private()
    with agentmem.capped(model, **variants.ROOMY) as memory:
        model.generate(variants.prompt(5), past_key_values=memory, max_new_tokens=2)
    with pytest.raises(agentmem.MemoryClosed, match="open another"):
        model.generate(variants.prompt(count), past_key_values=memory, max_new_tokens=2)


def test_a_generation_config_is_not_written() -> None:
    """Neither the model's nor a caller's generation config is changed by a run."""
    model = variants.private()
    mine = GenerationConfig(max_new_tokens=4, do_sample=False)
    texts = model.generation_config.to_json_string(), mine.to_json_string()
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        ours.generate(variants.prompt(40), generation_config=mine)

    assert (model.generation_config.to_json_string(), mine.to_json_string()) == texts


class Broken(Compactor):
    """A compactor that always fails."""

    def workspace(self, shape: SegmentShape) -> int:
        """Nothing."""
        return 0

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """Fails."""
        raise ArithmeticError("the matrix ran away")


def broken() -> Policy:
    """The policy of that compactor."""
    return Policy("broken", "fails", "-", Broken(), plugins.policy("window").budgets, Queries())


def test_on_failure_stop_returns_what_there_is() -> None:
    """With on_failure="stop" a failing policy ends generation with the tokens consumed so far and says why."""
    model, ids = variants.model(), variants.prompt(20)
    stock = model.generate(ids, max_new_tokens=40, do_sample=False)
    with agentmem.wrap(model, policy=broken(), on_failure="stop", **variants.TIGHT) as ours:
        output = ours.generate(ids, max_new_tokens=40, do_sample=False)
        stopped = ours.report().stopped
    with agentmem.wrap(model, policy=broken(), on_failure="stop", **variants.TIGHT) as ours:
        rich = ours.generate(ids, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)

    assert torch.equal(output, stock[:, :40])
    assert torch.equal(rich.sequences, output)
    assert stopped is not None
    assert "the matrix ran away" in stopped


def test_on_failure_raise_leaves_a_readable_memory() -> None:
    """With on_failure="raise" the failure arrives, naming policy and layer, and the memory still holds its tokens."""
    model = variants.model()
    with agentmem.wrap(model, policy=broken(), on_failure="raise", **variants.TIGHT) as ours:
        with pytest.raises(CompactionFailed, match=r"'broken' failed 2 times at layer 0 \(ArithmeticError"):
            ours.generate(variants.prompt(20), max_new_tokens=40)
        assert ours.memory.get_seq_length() == 40
        assert ours.memory.usage().total_slots == 40 * 4


# ---- the package


def test_importing_is_silent_and_light() -> None:
    """Importing loads no large package; the first use prints nothing, and loads neither plots nor a command line."""
    code = (
        "import sys, logging, json; import agentmem; root = logging.getLogger();"
        "heavy = [name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules];"
        "agentmem.capped, agentmem.Runtime;"
        "names = ('matplotlib', 'typer', 'gguf', 'agentmem.policies', 'agentmem.cli');"
        "heavy += [name for name in names if name in sys.modules];"
        "handlers = [type(each).__name__ for each in logging.getLogger('agentmem').handlers];"
        "import structlog;"
        "print(json.dumps([heavy, len(root.handlers), root.level, handlers, structlog.is_configured()]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stderr == ""
    assert json.loads(done.stdout) == [[], 0, 30, ["NullHandler"], False]


def test_a_run_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """A library keeps stdout and stderr for its user, through compactions too."""
    model = variants.model()
    with agentmem.capped(model, **variants.TIGHT) as memory:
        model.generate(variants.prompt(50), max_new_tokens=20, past_key_values=memory)

    assert memory.report().num_compactions == 2
    assert capfd.readouterr() == ("", "")


def test_the_public_names() -> None:
    """Everything in __all__ is there, sorted, and the version is the distribution's."""
    assert sorted(agentmem.__all__) == agentmem.__all__
    assert all(hasattr(agentmem, name) for name in agentmem.__all__)
    assert dir(agentmem) == agentmem.__all__
    assert agentmem.__getattr__("errors").CapTooSmall is agentmem.CapTooSmall
    with pytest.raises(AttributeError, match="has no attribute 'caped'"):
        agentmem.caped  # type: ignore[attr-defined]  # noqa: B018  # that is the point
    assert agentmem.__version__ == importlib.metadata.version("agentmem-runtime")


def test_a_type_checker_and_python_find_the_public_names_in_the_same_places() -> None:
    """Those that are imported for type checkers only, and those that are imported when they are first used."""
    tree = ast.parse(Path(agentmem.__file__).read_text(encoding="utf-8"))
    imports = [each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom) and each.level == 0]
    checked = {name.name: each.module for each in imports for name in each.names}
    assert {name: checked[name] for name in agentmem._PLACES} == agentmem._PLACES
    assert agentmem._PLACES.keys() == set(agentmem.__all__) - {"__version__"}


def test_the_keyword_arguments_are_the_settings() -> None:
    """What type checkers know of ``capped(**settings)`` is every field beside the cap, and nothing else."""
    assert set(SettingsOptions.__annotations__) == set(Settings.model_fields) - {"cap"}


@pytest.mark.parametrize("kind", [Settings, agentmem.SessionSettings, ServerSettings])
def test_help_describes_every_setting(kind: type[Any]) -> None:
    """With its default, and without what pydantic makes of its annotation."""
    said = " ".join(inspect.getdoc(kind).split())
    for name, field in kind.model_fields.items():
        assert field.description
        assert (
            f"{name} ({'required' if field.is_required() else repr(field.default)}): {field.description[:20]}" in said
        )
    assert list(inspect.signature(kind).parameters) == list(kind.model_fields)
    assert "Pydantic" not in str(inspect.signature(kind))


# ---- in the model's place


def test_a_wrapped_model_stands_in_for_the_model() -> None:
    """Its class, device, configs, methods and forward are the model's; moving it or eval() keeps the cap."""
    model, ids = variants.private(), variants.prompt(9)
    with agentmem.wrap(model, **variants.ROOMY) as ours:
        assert isinstance(ours, type(model))
        assert isinstance(ours, agentmem.CappedModel)
        assert ours.device == model.device
        assert ours.config is model.config
        assert ours.generation_config is model.generation_config
        assert ours.num_parameters() == model.num_parameters()
        assert ours.to("cpu").eval() is ours
        assert torch.equal(ours(ids).logits, model(ids).logits)
        assert torch.equal(ours(ids, past_key_values=ours.memory).logits[:, -1], model(ids).logits[:, -1])
        assert ours.report().num_prompt_tokens == 9


def test_a_pipeline_runs_a_wrapped_model_under_its_cap(caplog: pytest.LogCaptureFixture) -> None:
    """Stock text below the cap, and a conversation of more tokens than slots above it."""
    model, speaks = variants.private(), tiny_chat.tokenizer()
    options = {"max_new_tokens": 60, "do_sample": False, "return_full_text": True}
    stock = pipeline("text-generation", model=model, tokenizer=speaks)("hello", max_new_tokens=9, do_sample=False)
    with agentmem.wrap(model, **variants.TIGHT) as ours:
        speak = pipeline("text-generation", model=ours, tokenizer=speaks)
        assert speak("hello", max_new_tokens=9, do_sample=False) == stock
        assert not [record for record in caplog.records if "not supported" in record.message]
        ours.reset()
        (first,) = speak("hello", **options)
        assert len(speaks(first["generated_text"])["input_ids"]) > ours.memory.plan.capacity
        assert ours.report().num_compactions > 0
        with pytest.raises(agentmem.PromptMismatch):
            speak("another text", **options)
