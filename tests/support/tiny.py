"""Tiny capped models for the tests: a cap that is exactly as large as 48 slots per head need, and ways to feed them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch

import agentmem.api
from agentmem import plugins
from agentmem.contracts import Compaction, Compactor, Part, Policy, Queries, Segment, SegmentShape
from agentmem.hf import CappedCache
from agentmem.memory.memory import Memory
from agentmem.planning.pricing import Plan
from agentmem.testing import tiny_model

SLOTS = 48
SETTINGS: dict[str, Any] = {"keep_first": 4, "keep_recent": 8, "min_reclaim": 4, "chunk": 16, "max_slots": SLOTS}
FOCUS = "keep the colour of the door"


def mixture(*parts: Part, tokens: int | None = None) -> Policy:
    """AM halving with these parts of reference queries."""
    return replace(plugins.policy("am-halving"), queries=Queries(parts, tokens))


KINDS: dict[str, Policy] = {
    "window": plugins.policy("window"),
    "heavy-hitters": plugins.policy("heavy-hitters"),
    "replay": plugins.policy("am-halving"),
    "repeat": plugins.policy("am-halving", probe="repeat"),
    "live": plugins.policy("am-halving", probe="live", probe_tokens=24),
    "context": plugins.policy("am-halving", probe="context", probe_tokens=24),
    "random": plugins.policy("am-halving", probe="random", probe_tokens=24),
    "live+replay": plugins.policy("am-halving", probe="live+replay*2", probe_tokens=24),
    "replay+spread": plugins.policy("am-halving", probe="replay:3+spread*0.5"),
    "focus+replay": mixture(Part("focus", 1.0, 2.0, FOCUS), Part("replay", 2.0)),
}
"""Every policy that compacts, and every source of reference queries whose cost is bounded."""


def tokenizer(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
    """Enough of a tokenizer for the texts of ``repeat`` and ``focus``."""
    return {"input_ids": [3 + len(word) for word in text.split()][:5]}


@cache
def llama(layers: int = 2) -> Any:
    """A shared random model; leave it as you found it."""
    return tiny_model("llama", num_hidden_layers=layers)


def ids(count: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[1, count]``."""
    return torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(seed))


def plan(kind: str | Policy, model: Any, **settings: Any) -> Plan:
    """The plan of 48 slots per head whatever they cost."""
    policy = KINDS[kind] if isinstance(kind, str) else kind
    return agentmem.api.plan(model, cap=1 << 30, policy=policy, **(SETTINGS | settings))


def need(kind: str | Policy, model: Any, **settings: Any) -> int:
    """The cap that 48 slots per head need and not a byte more."""
    made = plan(kind, model, **settings)
    return made.resident_bytes + made.workspace_bytes


@contextmanager
def capped(kind: str, model: Any | None = None, **settings: Any) -> Iterator[CappedCache]:
    """A memory of exactly 48 slots per head under the smallest cap that holds them; every forward is audited."""
    model = model or llama()
    settings = SETTINGS | settings
    settings = settings if "cap" in settings else settings | {"cap": need(kind, model, **settings)}
    with agentmem.api.capped(model, policy=KINDS[kind], tokenizer=tokenizer, **settings) as memory:
        memory.subscribe(lambda _: audit(memory.memory))
        yield memory


@contextmanager
def capped_by(policy: Policy, model: Any | None = None, **settings: Any) -> Iterator[CappedCache]:
    """The same with a policy that a test made, and a cap that is never short."""
    settings = {"cap": 1 << 24} | SETTINGS | settings
    with agentmem.api.capped(model or llama(), policy=policy, tokenizer=tokenizer, **settings) as memory:
        memory.subscribe(lambda _: audit(memory.memory))
        yield memory


def audit(memory: Memory) -> None:
    """The ledger holds what the storages hold, and R + T stays under the cap."""
    stores = [store for row in memory.sequences for store in row.stores if store is not None]
    samples = [sample for row in memory.sequences for layer in row.samples for sample in layer]
    held = sum(store.allocated_bytes for store in stores)
    held += sum(sample.queries.untyped_storage().nbytes() for sample in samples)
    ledger = memory.ledger
    assert ledger.resident == held
    assert ledger.resident + ledger.transient <= ledger.peak <= ledger.cap


def feed(memory: CappedCache, tokens: torch.Tensor, pieces: int = 1 << 20, model: Any | None = None) -> torch.Tensor:
    """Feed tokens ``[1, n]``, so many a forward, and return the logits after the last."""
    logits = torch.empty(0)
    for piece in tokens.split(pieces, 1):
        logits = (model or llama())(input_ids=piece, past_key_values=memory, logits_to_keep=1).logits[:, -1]
    return logits.detach()


def greedy(memory: CappedCache, token: int, count: int, model: Any | None = None) -> list[int]:
    """The next greedy tokens after ``token``, one forward each."""
    result = []
    for _ in range(count):
        token = int(feed(memory, torch.tensor([[token]]), model=model).argmax())
        result.append(token)
    return result


class Faulty(Compactor):
    """Another compactor that raises the next of ``errors`` whenever it comes to layer ``at``."""

    def __init__(self, inner: Compactor, at: int, errors: list[BaseException]) -> None:
        self.inner, self.at, self.errors, self.scores = inner, at, errors, inner.scores

    def workspace(self, shape: SegmentShape) -> int:
        """What the other needs."""
        return self.inner.workspace(shape)

    def compact(self, segment: Segment, slots: Any) -> Compaction:
        """Raise, or hand over."""
        if segment.layer == self.at and self.errors:
            raise self.errors.pop(0)
        return self.inner.compact(segment, slots)
