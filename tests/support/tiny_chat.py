"""Tiny chat models for the tests of sessions: a tokenizer of characters, leases of so many slots, turns, audits."""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakSet

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import agentmem.api
from agentmem import plugins
from agentmem.contracts import Policy
from agentmem.memory.ledger import Ledger
from agentmem.memory.memory import Memory
from agentmem.sessions import Event, Runtime, Session
from agentmem.testing import tiny_model
from support.waiting import LIMIT

SETTINGS: dict[str, Any] = {"keep_first": 4, "keep_recent": 8, "min_reclaim": 4, "chunk": 16}
SLOTS = 64
_SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tokenizer(template: str | None = _TEMPLATE) -> Any:
    """128 ids: special tokens, then characters."""
    letters = [*string.printable[:95], "\n"]
    words = [*_SPECIAL, *letters, *map(chr, range(192, 192 + 128 - len(letters) - len(_SPECIAL)))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106  # no password
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        chat_template=template,
        eos_token="<|im_end|>",  # noqa: S106  # no password
        unk_token="<unk>",  # noqa: S106  # the same
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<pad>"],
    )


@cache
def model(family: str = "llama", layers: int = 3, **config: Any) -> Any:
    """A shared random model; leave it as you found it."""
    return tiny_model(family, num_hidden_layers=layers, **config)  # type: ignore[arg-type]


def lease(policy: str | Policy = "am-halving", on: Any = None, slots: int = SLOTS, **settings: Any) -> int:
    """What a memory of so many slots per head needs and not a byte more."""
    options = SETTINGS | settings | {"max_slots": slots}
    for name in ("seed", "share", "pin_roles", "pin_request", "history", "soft"):
        options.pop(name, None)
    plan = agentmem.api.plan(on or model(), cap=1 << 30, policy=plugins.policy(policy), **options)
    return plan.resident_bytes + plan.workspace_bytes


def runtime(sessions: float = 1, policy: str | Policy = "am-halving", on: Any = None, **options: Any) -> Runtime:
    """A runtime whose cap is so many leases (of 64 slots per head, unless said otherwise): its sessions' share."""
    names = ("pressure", "spill", "wait", "max_waiting", "max_batch_tokens", "name")
    own: dict[str, Any] = {"wait": LIMIT, **{name: options.pop(name) for name in names if name in options}}
    share = lease(policy, on, options.pop("slots", SLOTS), **options)
    settings = {"share": share} | SETTINGS | options
    return Runtime(on or model(), tokenizer(), cap=int(share * sessions), policy=policy, **own, **settings)


def ids(count: int, seed: int = 0) -> list[int]:
    """Random ids of characters."""
    return torch.randint(6, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def filled(made: Runtime, tokens: int = 100, seed: int = 0, **options: Any) -> Session:
    """A session that has read so many random tokens."""
    session = made.session(**options)
    session.read(ids(tokens, seed))
    return session


def on(session: Session, count: int = 12, **options: Any) -> list[int]:
    """The next greedy tokens; the reply stays open."""
    before = len(session.ids)
    session.generate(max_new_tokens=count, keep_open=True, **{"do_sample": False} | options)
    return list(session.ids[before:])


def audit(made: Runtime) -> None:
    """What is allocated is what is accounted, no memory holds more than it is charged, and the sum keeps the cap."""
    for holding in made.leases.holdings:
        memory = holding.memory
        if memory is not None:
            assert allocated(memory) == memory.ledger.resident <= holding.charged
            assert memory.ledger.resident + memory.ledger.transient <= memory.ledger.peak <= memory.ledger.cap
    assert made.leases.charged <= made.cap
    assert made.stats.charged_bytes == made.leases.charged


def allocated(memory: Memory) -> int:
    """Bytes of all storages of a memory."""
    stores = [store for row in memory.sequences for store in row.stores if store is not None]
    samples = [sample for row in memory.sequences for layer in row.samples for sample in layer]
    storages = sum(store.allocated_bytes for store in stores)
    return storages + sum(sample.queries.untyped_storage().nbytes() for sample in samples)


def slots(session: Session) -> list[dict[str, torch.Tensor]]:
    """Copies of all that a session's memory holds, head by head."""
    found = []
    for store in session.memory.sequences[0].stores:
        assert store is not None
        for head, length in enumerate(store.lengths):
            start = store.starts[head]
            span = slice(start, start + length)
            full = store.spec.shape.window is None
            names = ("keys", "values", "bias") + (("positions",) if full and length == store.settled[head] else ())
            found.append({name: getattr(store, name)[span].clone() for name in names})
    return found


def same(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> bool:
    """Whether two memories hold the same, bit for bit."""
    return len(left) == len(right) and all(
        torch.equal(one[name], other[name])
        for one, other in zip(left, right, strict=True)
        for name in one.keys() & other.keys()
    )


async def events(session: Session, **options: Any) -> list[Event]:
    """All events of a stream."""
    return [event async for event in session.astream(**{"do_sample": False, "max_new_tokens": 8} | options)]


@contextmanager
def watched(cap: int) -> Iterator[list[int]]:
    """Check at every allocation that all memories together hold and work with no more than ``cap``; yields the peak."""
    ledgers: WeakSet[Ledger] = WeakSet()
    patch, peak = pytest.MonkeyPatch(), [0]
    begin, note = Ledger.__init__, Ledger._note

    def opened(self: Ledger, own: int) -> None:
        begin(self, own)
        ledgers.add(self)

    def noted(self: Ledger, now: int) -> None:
        note(self, now)
        others = [each for each in ledgers if each is not self]
        peak[0] = max(peak[0], now + sum(each.resident + each.transient for each in others))
        assert peak[0] <= cap

    patch.setattr(Ledger, "__init__", opened)
    patch.setattr(Ledger, "_note", noted)
    try:
        yield peak
    finally:
        patch.undo()
