"""Segments of 8-bit slots: decoded when they are read, a head at a time; codes are kept where nothing is fitted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import agentmem
from agentmem import plugins
from agentmem.attention.quantised import BITS, Format
from agentmem.contracts import Compactor, HeadSegment, Segment
from agentmem.hf import CappedCache
from agentmem.memory.encoded import EncodedHead
from agentmem.memory.ledger import Ledger
from agentmem.memory.slot_spec import SlotSpec
from agentmem.memory.store import LayerStore
from agentmem.planning.model_shape import LayerShape
from agentmem.planning.pricing import copy_bytes
from agentmem.settings import SlotDtype
from agentmem.testing import Case, make_segment, peak_allocated, tiny_model

DTYPES = [torch.float32, torch.bfloat16]
EVICTIONS = ("window", "heavy-hitters", "snapkv", "g-kv", "random-subset")


def filled(slots: int, dtype: torch.dtype, heads: int = 3, slot_dtype: SlotDtype = "int8") -> LayerStore:
    """A store of ``heads`` heads with ``slots`` random slots each."""
    shape = LayerShape(heads, heads, 64, 64, slot_dtype=slot_dtype)
    store = LayerStore(SlotSpec(shape, dtype, torch.device("cpu"), scores=False), [slots] * heads, Ledger(1 << 30))
    make = torch.Generator().manual_seed(slots)
    store.append(*(torch.randn(heads, slots, 64, generator=make).to(dtype) for _ in range(2)))
    store.settle(torch.arange(slots, dtype=torch.int32))
    return store


@pytest.mark.parametrize(("slot_dtype", "bits"), BITS.items())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reading_gives_the_numbers_that_attention_computes_with(
    dtype: torch.dtype, slot_dtype: SlotDtype, bits: tuple[int, int]
) -> None:
    """More slots than are decoded at a time, without the prefix and the recent ones."""
    store = filled(1300, dtype, slot_dtype=slot_dtype)
    head = store.segment(1, 4, 8)
    part = store.part(1, 4, 8)

    assert isinstance(head, EncodedHead)
    assert (head.slots, head.key_dim, head.value_dim, head.dtype) == (1288, 64, 64, dtype)
    assert torch.equal(head.keys, Format(64, bits[0]).decode(part.keys, dtype))
    assert torch.equal(head.values, Format(64, bits[1]).decode(part.values, dtype))
    assert head.positions.data_ptr() == part.positions.data_ptr()


def test_a_tensor_in_use_is_not_decoded_again() -> None:
    """Reading a dim or the keys once more takes no second copy; a copy that nobody holds is freed."""
    head = filled(40, torch.float32).segment(0, 0, 0)
    keys = head.keys

    assert head.keys is keys
    assert head.keys.float() is keys  # nor does a cast to the same dtype
    copied = keys.clone()
    del keys
    assert torch.equal(head.keys, copied)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_one_head_is_decoded_at_a_time(dtype: torch.dtype) -> None:
    """What a policy allocates that reads one head after the other is what the plan has for one head."""
    store = filled(2000, dtype, heads=4)
    promised = copy_bytes(store.spec.shape, 2000, dtype.itemsize)

    def read() -> None:
        for head in [store.segment(index, 0, 0) for index in range(4)]:
            keys, values = head.keys, head.values
            assert keys.shape == values.shape
            del keys, values

    assert 0.8 * promised < peak_allocated(read) <= promised
    assert promised < 2 * 2000 * 128 * dtype.itemsize


class Unreadable(HeadSegment):
    """A head whose keys or values must not be read."""

    __slots__ = ("compactor", "whole")

    def __init__(self, whole: HeadSegment, compactor: Compactor) -> None:
        """Keep what may be read."""
        for name in ("bias", "positions", "scores"):
            object.__setattr__(self, name, getattr(whole, name))
        object.__setattr__(self, "whole", whole)
        object.__setattr__(self, "compactor", compactor)

    @property
    def keys(self) -> torch.Tensor:
        """The keys, if the compactor says that it reads them."""
        assert self.compactor.reads_keys
        return self.whole.keys

    @property
    def values(self) -> torch.Tensor:
        """The values, likewise."""
        assert self.compactor.reads_values
        return self.whole.values


@pytest.mark.parametrize("name", sorted({*plugins.names()} - {"full"}))
def test_a_policy_reads_what_it_says(name: str) -> None:
    """The plan reserves nothing for keys and values that a compactor says it does not read."""
    policy = plugins.policy(name)
    assert policy.compactor is not None
    case = Case("unread", held=(40, 40), slots=(20, 20))
    made = make_segment(case, policy)
    heads = tuple(Unreadable(head, policy.compactor) for head in made.heads)
    segment = Segment(made.layer, heads, made.references, made.scale, made.generator, made.workspace_bytes)

    policy.compactor.compact(segment, case.slots)
    if type(policy.compactor).survey is not Compactor.survey:
        policy.compactor.survey(segment)


def rows_of(memory: CappedCache) -> list[set[tuple[int, ...]]]:
    """The bytes of every slot's key and value, as a set for each head of each layer."""
    stores = [store for store in memory.memory.sequences[0].stores if store is not None]
    parts = [store.part(head, 0, 0) for store in stores for head in range(2)]
    return [set(map(tuple, torch.cat((part.keys, part.values), 1).tolist())) for part in parts]


@pytest.mark.parametrize("policy", EVICTIONS)
def test_kept_slots_keep_their_bits(policy: str) -> None:
    """An eviction copies codes and scales: every row of a compacted store is a row of the old one."""
    model = tiny_model("llama", dtype=torch.bfloat16, head_dim=64)
    options: dict[str, Any] = {"keep_first": 4, "keep_recent": 8, "min_reclaim": 4, "chunk": 32, "max_slots": 96}
    text = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(0))
    with agentmem.capped(model, cap=1 << 30, policy=policy, slot_dtype="int8", **options) as memory, torch.no_grad():
        model(text, past_key_values=memory, logits_to_keep=1)
        before = rows_of(memory)
        memory.compact()
        after = rows_of(memory)
    for old, new in zip(before, after, strict=True):
        assert 12 <= len(new) < len(old)
        assert new <= old


def test_without_a_fit_nothing_is_reserved_for_numbers() -> None:
    """Window at 64 MiB: a new store is all that a compaction takes, a thirtieth of the cap; it was 10 %."""
    heads = {"num_key_value_heads": 3, "num_attention_heads": 9, "hidden_size": 576}
    made = tiny_model("llama", num_hidden_layers=30, head_dim=64, **heads)
    plan = agentmem.plan(made, cap="64MiB", policy="window", itemsize=2, slot_dtype="int8")

    assert (plan.copy_bytes, plan.check_bytes, plan.survey_bytes) == (0, 0, 0)
    assert plan.workspace_bytes < 0.045 * plan.cap_bytes
