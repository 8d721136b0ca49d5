"""Slots of 8 and of 4 bits through everything that a memory does: exact bytes, the cap, and numbers that are close."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import agentmem
from agentmem import plugins
from agentmem.attention import quantised
from agentmem.attention.quantised import Format
from agentmem.hf import CappedCache
from agentmem.memory import state
from agentmem.memory.pinning import settle
from agentmem.memory.rotation import Rotation, shift_keys
from agentmem.memory.slot_spec import SlotSpec
from agentmem.planning.model_shape import LayerShape
from agentmem.planning.rebasing import layer_scratch
from agentmem.settings import SlotDtype
from agentmem.testing import peak_allocated, tiny_model
from support import tiny, tiny_chat
from support.matrices import matrix

POLICIES = sorted({*plugins.names()} - {"full", "am-calibrated", "am-pursuit", "am-recall", "summary", "summary-am"})
POLICIES += ["am-pursuit[budgets=global]", "am-halving[budgets=adaptive]", "am-halving[probe=live]"]
SETTINGS: dict[str, Any] = {"keep_first": 4, "keep_recent": 8, "min_reclaim": 4, "chunk": 32, "max_slots": 96}
DTYPES = [torch.float32, torch.bfloat16]


def model(family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A tiny model whose heads the compiled step serves."""
    return tiny_model(family, dtype=dtype, head_dim=64, **config)  # type: ignore[arg-type]  # a family's name


@contextmanager
def capped(made: Any, policy: str, rows: int = 1, **settings: Any) -> Iterator[CappedCache]:
    """A memory of 96 quantised slots per head and the smallest cap for them, audited after every forward."""
    options = SETTINGS | {"slot_dtype": "int8"} | settings
    plan = agentmem.plan(made, cap=1 << 30, policy=policy, rows=rows, **options)
    cap = plan.resident_bytes + plan.workspace_bytes
    with agentmem.capped(made, tiny.tokenizer, cap=cap, policy=policy, **options) as memory:
        memory.subscribe(lambda _: tiny.audit(memory.memory))
        yield memory
        assert memory.report().peak_bytes <= cap


def ids(count: int, rows: int = 1) -> torch.Tensor:
    """Random ids ``[rows, count]``."""
    return torch.randint(3, 128, (rows, count), generator=torch.Generator().manual_seed(count))


@matrix(policy=POLICIES, dtype=DTYPES, slot_dtype=list(quantised.BITS))
def test_every_policy_compacts_them_under_the_smallest_cap(
    policy: str, dtype: torch.dtype, slot_dtype: SlotDtype
) -> None:
    """Without a fault, and with bytes as they are priced."""
    made = model(dtype=dtype)
    with capped(made, policy, slot_dtype=slot_dtype) as memory:
        made.generate(ids(220), past_key_values=memory, max_new_tokens=30, do_sample=False)
        report = memory.report()
        store = memory.memory.sequences[0].stores[0]
        assert store is not None
        assert store.keys.dtype == torch.uint8
        assert store.keys.shape[1] == Format(64, quantised.BITS[slot_dtype][0]).row_bytes
        assert store.values.shape[1] == Format(64, quantised.BITS[slot_dtype][1]).row_bytes
    assert len(report.compactions) >= 2
    assert not [fault for each in report.compactions for fault in each.faults if "SummaryRefused" not in fault]


def test_quantised_slots_cost_what_the_plan_says() -> None:
    """144, 112 or 80 bytes a slot of 64 + 64 numbers instead of 520 in float32: codes, scales, β and a position."""
    prices = []
    for slot_dtype in ("auto", "int8", "k8v4", "int4"):
        options = SETTINGS | {"slot_dtype": slot_dtype}
        plan = agentmem.plan(model(), cap=1 << 30, policy="window", **options)
        prices.append(plan.resident_bytes / (2 * 2 * 96))
    assert prices == [520, 144, 112, 80]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_logits_are_close_to_stock_s_below_the_cap(family: str) -> None:
    """Prefill in chunks, then decode steps: the error is that of 8 bits, not that of a wrong slot."""
    made, text = model(family), ids(60)
    with torch.no_grad():
        wanted = made(text).logits[0, -20:].float()
        with capped(made, "window") as memory:
            made(text[:, :40], past_key_values=memory, logits_to_keep=1)
            found = [made(text[:, at : at + 1], past_key_values=memory).logits[0, -1] for at in range(40, 60)]
    off = (torch.stack(found) - wanted).norm() / wanted.norm()
    assert 0 < float(off) < 0.05


@pytest.mark.parametrize("policy", ["heavy-hitters", "am-halving"])
def test_without_compiled_code_the_slots_are_the_same(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's path writes the rows that the compiled step writes, and goes on with nearly the same numbers."""
    found = []
    for compiled in (True, False):
        monkeypatch.setattr("agentmem.attention.decode.COMPILED", compiled)
        made = model()
        with capped(made, policy) as memory, torch.no_grad():
            memory_logits = [made(ids(80), past_key_values=memory, logits_to_keep=1).logits[0, -1]]
            tokens = ids(30)[0].view(-1, 1, 1)
            memory_logits += [made(token, past_key_values=memory).logits[0, -1] for token in tokens]
            found.append(torch.stack(memory_logits))
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("policy", ["window", "heavy-hitters", "am-halving", "am-halving[budgets=global]"])
def test_the_profiler_s_peak_is_within_the_cap(policy: str) -> None:
    """A long prompt and decode steps: the peak, less the model's forward of one chunk, stays under the smallest cap."""
    made = model(num_hidden_layers=3)
    with torch.no_grad():
        forward = peak_allocated(lambda: made(ids(32), use_cache=False))
    caps = []

    def run() -> None:
        with capped(made, policy) as memory:
            made.generate(ids(300), past_key_values=memory, max_new_tokens=20, do_sample=False)
            caps.append(memory.plan.cap_bytes)

    assert peak_allocated(run) - forward <= caps[0]


def test_a_batch_with_pads_is_each_row_alone() -> None:
    """Left-padded rows, compacted apart."""
    made, lengths = model(), (150, 90)
    text, mask = torch.zeros(2, 150, dtype=torch.long), torch.zeros(2, 150, dtype=torch.long)
    for row, length in enumerate(lengths):
        text[row, -length:], mask[row, -length:] = ids(length)[0], 1
    with capped(made, "am-halving", rows=2) as memory:
        both = made.generate(text, attention_mask=mask, past_key_values=memory, max_new_tokens=12, do_sample=False)
    for row, length in enumerate(lengths):
        with capped(made, "am-halving") as memory:
            alone = made.generate(ids(length), past_key_values=memory, max_new_tokens=12, do_sample=False)
        assert both[row, 150:].tolist() == alone[0, length:].tolist()


def test_a_memory_is_re_based() -> None:
    """Through several re-basings under the smallest cap, no slot lies beyond the model's positions."""
    made = model(max_position_embeddings=160)
    with capped(made, "window", rebase=True) as memory:
        made.generate(ids(300), past_key_values=memory, max_new_tokens=30, do_sample=False)
        assert memory.report().rebases
        sequence = memory.memory.sequences[0]
        store = sequence.stores[0]
        assert store is not None
        settle(sequence, store)
        assert int(store.part(0, 0, 0).positions.max()) < 160


@pytest.mark.parametrize("slot_dtype", ["int8", "int4"])
def test_moved_keys_are_turned_and_others_keep_their_bits(slot_dtype: SlotDtype) -> None:
    """Each moved key is the turned one, to its bits; what is allocated is what is priced."""
    layer = LayerShape(1, 2, 64, 64, slot_dtype=slot_dtype)
    spec = SlotSpec(layer, torch.float32, torch.device("cpu"), scores=False)
    rotation = Rotation(10000.0 ** -torch.arange(0, 1, 1 / 32, dtype=torch.float64))
    form = Format(64, quantised.BITS[slot_dtype][0])
    keys = form.encode(torch.randn(150, 64, generator=torch.Generator().manual_seed(0)))
    positions = torch.arange(200, 350, dtype=torch.int32)
    deltas = torch.where(positions % 3 == 0, 0, -100).to(torch.int32)
    before, wanted = keys.clone(), form.decode(keys)
    shift_keys(wanted, positions, deltas, rotation)

    peak = peak_allocated(lambda: spec.shift(keys, positions, deltas, rotation))

    assert torch.equal(keys[deltas == 0], before[deltas == 0])
    off = (form.decode(keys) - wanted).abs()[deltas != 0]
    assert 0 < float(off.max()) <= float(wanted.abs().max()) / (2 ** (form.bits - 1) - 1) * 1.008
    assert peak <= layer_scratch(layer, 150, 4)


def test_a_float64_model_computes_in_its_own_dtype() -> None:
    """Chunks and decode steps, which no compiled code serves."""
    made = model(dtype=torch.float64)
    with capped(made, "window") as memory:
        made.generate(ids(120), past_key_values=memory, max_new_tokens=8, do_sample=False)
        assert memory.report().compactions


def test_a_copy_and_its_original_go_on_alike() -> None:
    """The state of a memory holds rows as they are stored, to the bit."""
    made = model()
    with capped(made, "am-halving") as memory:
        made.generate(ids(150), past_key_values=memory, max_new_tokens=4, do_sample=False)
        saved, tensors = state.take(memory.memory)
        held = {name: tensor.clone() for name, tensor in tensors.items()}
        other = memory.memory.empty()
        state.give(other, saved, dict(held))
        _, again = state.take(other)
        assert saved.dtype == torch.float32
        assert held.keys() == again.keys()
        assert all(torch.equal(held[name], again[name]) for name in held)
        other.close()


# ---- sessions


def on_quantised(sessions: float = 2, **options: Any) -> agentmem.Runtime:
    """A runtime whose sessions hold 64 quantised slots per head."""
    return tiny_chat.runtime(sessions, on=model(num_hidden_layers=3), **({"slot_dtype": "int8"} | options))


@pytest.mark.parametrize(("policy", "slot_dtype"), [("am-halving", "int4"), ("heavy-hitters", "int8")])
def test_a_fork_and_a_snapshot_go_on_with_the_same_tokens(policy: str, slot_dtype: SlotDtype, tmp_path: Any) -> None:
    """Compacted before and after; the copy-on-write of a fork, a save, and a load in another runtime."""
    settings = {"policy": policy, "slot_dtype": slot_dtype}
    with on_quantised(3, **settings) as made, on_quantised(1, **settings) as elsewhere:
        session = tiny_chat.filled(made, 120)
        session.save(tmp_path / "saved")
        fork, loaded = session.fork(), elsewhere.load(tmp_path / "saved")
        wanted = tiny_chat.on(session, 40)
        assert tiny_chat.on(fork, 40) == wanted == tiny_chat.on(loaded, 40)
        assert session.stats.compactions > 1
        tiny_chat.audit(made)


def test_a_session_comes_back_from_disk(tmp_path: Any) -> None:
    """Swapped out for another one, with the dtype that its numbers are computed in."""
    with on_quantised(1, pressure=("disk",), spill=tmp_path) as made, on_quantised(1) as quiet:
        first, alone = tiny_chat.filled(made, 100), tiny_chat.filled(quiet, 100)
        tiny_chat.filled(made, 50, seed=1)
        assert tiny_chat.on(first) == tiny_chat.on(alone)


def test_a_snapshot_keeps_its_kind_of_slots(tmp_path: Any) -> None:
    """Saved with plain slots and loaded where others are quantised, and the other way round: it goes on as it was."""
    with on_quantised(3) as coded, tiny_chat.runtime(9, on=model(num_hidden_layers=3)) as plain:
        for one, other, place in ((coded, plain, "coded"), (plain, coded, "plain")):
            session = tiny_chat.filled(one, 40)
            session.save(tmp_path / place)
            loaded = other.load(tmp_path / place)
            assert tiny_chat.on(loaded, 30) == tiny_chat.on(session, 30)
            assert [store.keys.dtype for store in loaded.memory.sequences[0].stores if store is not None] == [
                store.keys.dtype for store in session.memory.sequences[0].stores if store is not None
            ]


@pytest.mark.parametrize(("saved", "wished"), [("int8", "int4"), ("k8v4", "int8"), ("int4", "auto")])
def test_a_snapshot_is_not_loaded_as_another_kind_of_slots(saved: str, wished: str, tmp_path: Any) -> None:
    """Even where both are bytes: the refusal names the kind that was asked for and the remedy."""
    with on_quantised(1, slot_dtype=saved) as made:
        tiny_chat.filled(made, 40).save(tmp_path / "saved")
        with pytest.raises(agentmem.errors.AgentmemError, match=f"'{wished}' does not hold; leave slot_dtype out"):
            made.load(tmp_path / "saved", slot_dtype=wished)


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Any) -> None:
    """A memory with such a number cannot be saved, and stays as it is."""
    with on_quantised(1) as made:
        session = tiny_chat.filled(made, 40)
        store = session.memory.sequences[0].stores[0]
        assert store is not None
        Format(64).scales(store.keys)[0, 0] = torch.nan
        with pytest.raises(agentmem.errors.AgentmemError, match="scale that is not finite"):
            session.save(tmp_path / "saved")
        assert tiny_chat.on(session, 3)
