"""Models that write summaries which a test dictates: the forwards run, and what they say comes from a script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from agentmem import api
from agentmem.contracts import Policy
from agentmem.hf import CappedCache
from agentmem.memory.forwards import Scratch
from agentmem.memory.pinning import settle
from agentmem.memory.store import LayerStore
from agentmem.policies.summary import summary
from agentmem.policies.summary_am import summary_am
from support import tiny

LAYERS = 3
SIZE, TARGET, FIRST, RECENT = 176, 40, 4, 8
SETTINGS = tiny.SETTINGS | {"max_slots": SIZE, "target": TARGET, "chunk": 64}
SCRATCH = 96 + SIZE // 6
FULL = SIZE - SCRATCH
"""Tokens of a row at its first compaction."""
EACH = TARGET - FIRST - RECENT
"""Slots of a head's segment that matching leaves."""
END = 2
SCRIPT = (31, 32, 33, 34, 40, 35, 36, 37, 38, 39, 41, 50)
"""Two sentences of twelve tokens."""
LEAD = (10, 5, 7, 7, 10)
"""What stands before a summary, as the tokenizer writes it."""
POLICIES: dict[str, Policy] = {"summary": summary(), "summary-am": summary_am()}


class Tokenizer:
    """Ids are lengths of words; tens are full stops, all others words with a space before them."""

    chat_template: str | None = None

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """The first five words at most."""
        return {"input_ids": [3 + len(word) for word in text.split()][:5]}

    def decode(self, ids: Sequence[int]) -> str:
        """The text."""
        return "".join("." if each % 10 == 0 else f" w{each}" for each in ids)

    def batch_decode(self, lines: Sequence[Sequence[int]]) -> list[str]:
        """Of each line."""
        return [self.decode(line) for line in lines]


def cap_of(policy: Policy, model: Any, **settings: Any) -> int:
    """What 176 slots per head need and not a byte more."""
    plan = api.plan(model, cap=1 << 30, policy=policy, **(SETTINGS | settings))
    return plan.resident_bytes + plan.workspace_bytes


@contextmanager
def telling(
    policy: str | Policy = "summary-am", model: Any = None, tokenizer: Any = None, **settings: Any
) -> Iterator[CappedCache]:
    """A memory of 176 slots per head under the smallest cap, audited after every forward."""
    made = POLICIES[policy] if isinstance(policy, str) else policy
    settings, model = SETTINGS | settings, model or tiny.llama(LAYERS)
    settings = settings if "cap" in settings else settings | {"cap": cap_of(made, model, **settings)}
    with api.capped(model, policy=made, tokenizer=tokenizer or Tokenizer(), **settings) as memory:
        memory.subscribe(lambda _: tiny.audit(memory.memory))
        yield memory


def dictate(memory: CappedCache, *scripts: Sequence[int]) -> list[int]:
    """Let the model write these texts, one a summary, over and over; END ends a text. Tells how often it wrote."""
    core, forwards, writings, said = memory.memory, memory.engine.forwards, list[Scratch](), list[int]()
    run = forwards.next_logits
    assert core.language is not None
    core.language = replace(core.language, ends=(END,))

    def dictated(ids: Sequence[int], start: int, step: Scratch) -> torch.Tensor:
        logits = torch.zeros_like(run(ids, start, step))
        if not writings or writings[-1] is not step:
            writings.append(step)
            said.append(0)
        script = scripts[(len(writings) - 1) % len(scripts)]
        logits[script[said[-1] % len(script)]] = 1.0
        said[-1] += 1
        return logits

    forwards.next_logits = dictated  # type: ignore[method-assign]
    return said


def feed(memory: CappedCache, count: int, seed: int = 0, pieces: int = 1 << 20, model: Any = None) -> torch.Tensor:
    """Feed random tokens; the logits after the last."""
    return tiny.feed(memory, tiny.ids(count, seed), pieces, model or tiny.llama(LAYERS))


def stores(memory: CappedCache) -> list[LayerStore]:
    """The stores of the only row, positions settled."""
    row = memory.memory.sequences[0]
    found = [store for store in row.stores if store is not None]
    for store in found:
        settle(row, store)
    return found


def heads(memory: CappedCache) -> list[list[dict[str, torch.Tensor]]]:
    """Copies of all slots, ``[layer][head]``: keys, values, β, positions."""
    names = ("keys", "values", "bias", "positions")
    return [
        [{name: getattr(store.segment(head, 0, 0), name).clone() for name in names} for head in range(2)]
        for store in stores(memory)
    ]


def same(left: list[Any], right: list[Any]) -> bool:
    """Whether two copies are equal to the bit."""
    pairs = [pair for one, other in zip(left, right, strict=True) for pair in zip(one, other, strict=True)]
    return all(torch.equal(one[name], other[name]) for one, other in pairs for name in one)


def lengths(memory: CappedCache) -> list[list[int]]:
    """Slots of every head of every layer."""
    return [list(store.lengths) for store in stores(memory)]
