"""What ``benchmarks.allocations`` measures: ways to use a capped tiny model, each under a cap that is planned for it.

Every case is run by a policy in a dtype. A cap suffices for ``SLOTS`` slots per head of every sequence and no more.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

import agentmem
from agentmem.plugins import policy as named_policy
from agentmem.sessions import Session
from agentmem.testing import tiny_model

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the tiny chat model and dictated summaries are the tests'

from support import dictation, tiny_chat

SLOTS = 512
SETTINGS: dict[str, Any] = {"keep_first": 4, "keep_recent": 16, "chunk": 128, "max_slots": SLOTS}
SIZES = {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2}

Use = Callable[[], int]
"""Runs a case once; how often it compacted."""


@dataclass(frozen=True)
class Case:
    """How a model is used, by sequences ``rows``; ``config`` and ``settings`` are those of the model and the memory."""

    lengths: tuple[int, ...]
    family: str = "llama"
    sessions: Callable[[agentmem.Runtime, tuple[int, ...]], list[Session]] | None = None
    """Reads texts of these lengths in sessions; none: one ``generate`` of a batch, padded on the left."""
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def model(self, dtype: torch.dtype) -> Any:
        """The model."""
        return tiny_model(self.family, dtype=dtype, **SIZES, **self.config)  # type: ignore[arg-type]  # a family's name

    def prepare(self, model: Any, policy: str, slot_dtype: str) -> tuple[int, Use]:
        """The cap in bytes, and what is measured.

        Raises:
            AgentmemError: the policy cannot be used with this model.

        """
        settings = SETTINGS | self.settings | {"slot_dtype": slot_dtype}
        if self.sessions is None:
            plan = agentmem.plan(model, cap=1 << 34, policy=policy, rows=len(self.lengths), **settings)
            cap = plan.resident_bytes + plan.workspace_bytes
            return cap, lambda: self._generate(model, policy, cap, settings)
        plan = agentmem.plan(model, cap=1 << 34, policy=policy, **settings)
        share = plan.resident_bytes + plan.workspace_bytes
        return len(self.lengths) * share, lambda: self._converse(model, policy, share, settings)

    def _generate(self, model: Any, policy: str, cap: int, settings: dict[str, Any]) -> int:
        ids, mask = self.batch()
        summarises = named_policy(policy).rewrite is not None
        tokenizer: Any = dictation.Tokenizer() if summarises else tiny_chat.tokenizer()
        with agentmem.capped(model, tokenizer, cap=cap, policy=policy, **settings) as memory:
            if summarises:  # what a random model writes is no summary, and would be refused
                dictation.dictate(memory, (*dictation.SCRIPT, dictation.END))
            model.generate(ids, attention_mask=mask, past_key_values=memory, max_new_tokens=4, do_sample=False)
            compactions = memory.report().compactions
            if summarises and not any(each.summary is not None for each in compactions):
                raise AssertionError("no summary was adopted")
            return len(compactions)

    def _converse(self, model: Any, policy: str, share: int, settings: dict[str, Any]) -> int:
        assert self.sessions is not None  # noqa: S101  # the caller saw it
        cap = len(self.lengths) * share
        with agentmem.Runtime(model, tiny_chat.tokenizer(), cap=cap, policy=policy, share=share, **settings) as made:
            return sum(each.stats.compactions for each in self.sessions(made, self.lengths))

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask ``[rows, tokens]``, padded on the left."""
        rows, longest = len(self.lengths), max(self.lengths)
        ids, mask = torch.zeros(rows, longest, dtype=torch.long), torch.zeros(rows, longest, dtype=torch.long)
        for row, length in enumerate(self.lengths):
            ids[row, -length:], mask[row, -length:] = 3 + torch.arange(length) % 100, 1
        return ids, mask


def forked(made: agentmem.Runtime, lengths: tuple[int, ...]) -> list[Session]:
    """A session and its forks, each of which goes on with a text of its own."""
    first = tiny_chat.filled(made, lengths[0])
    found = [first, *(first.fork() for _ in lengths[1:])]
    for seed, (each, length) in enumerate(zip(found, lengths, strict=True)):
        each.read(tiny_chat.ids(length, seed))
        each.generate(max_new_tokens=4, do_sample=False)
    return found


def together(made: agentmem.Runtime, lengths: tuple[int, ...]) -> list[Session]:
    """Sessions that read and reply at the same time, so that forwards feed several."""
    found = [made.session() for _ in lengths]

    async def converse(session: Session, length: int) -> None:
        await session.aappend("user", "x" * length)
        await session.agenerate(max_new_tokens=4, do_sample=False)

    async def all_of_them() -> None:
        await asyncio.gather(*(converse(*each) for each in zip(found, lengths, strict=True)))

    asyncio.run(all_of_them())
    return found


CASES = {
    "long prompt": Case((3000,)),
    "batch": Case((700, 700, 700)),
    "padded batch": Case((700, 650, 400)),
    "sliding layers": Case((1500,), "gemma3_text"),
    "re-basing": Case((3000,), config={"max_position_embeddings": 1024}, settings={"rebase": True}),
    "forks": Case((700, 400), sessions=forked),
    "sessions fed together": Case((900, 700, 500), sessions=together),
}


def measure(case: Case, policy: str, dtype: torch.dtype, slot_dtype: str = "auto") -> dict[str, int]:
    """Bytes of a cell: its cap, the peak beyond A, A, and what MKL's products packed into so far in this process.

    Raises:
        AgentmemError: the policy cannot be used with this model.
        AssertionError: nothing was compacted, so the cell would show nothing.

    """
    model = case.model(dtype)
    cap, use = case.prepare(model, policy, slot_dtype)
    widths, ids = set[int](), case.batch()[0]
    model.get_decoder().layers[0].register_forward_pre_hook(lambda _, given: widths.add(given[0].shape[:2].numel()))
    if not use():  # it warms up what libraries keep for ever, too
        raise AssertionError("nothing was compacted")
    peak = peak_of(use)
    _attend_to_nothing(model)
    # of all widths: a library's buffers for the model's own products can be largest for a few tokens
    most = max(_plain_peak(model, ids, width) for width in sorted(widths))
    return {"cap": cap, "peak": peak - most, "plain": most, "products": account().allocations_products()}


def _plain(model: Any, ids: torch.Tensor, tokens: int) -> None:
    """One forward of so many tokens without a cache, in as many rows as the case has where that divides them."""
    rows = len(ids) if tokens % len(ids) == 0 else 1
    with torch.no_grad():
        model(input_ids=ids[:rows, : tokens // rows], use_cache=False, logits_to_keep=1)


def _plain_peak(model: Any, ids: torch.Tensor, tokens: int) -> int:
    """Bytes of that forward, after one that warms up what libraries keep for ever."""
    _plain(model, ids, tokens)
    return peak_of(lambda: _plain(model, ids, tokens))


def _attend_to_nothing(model: Any) -> None:
    """The model's attention allocates its output and no more: no mask, no copy, no kernel's scratch."""

    def nothing(
        _module: object, queries: Any, _keys: object, values: Any, *_: object, **__: object
    ) -> tuple[Any, None]:
        rows, heads, tokens, _ = queries.shape
        return values.new_zeros(rows, tokens, heads, values.shape[-1]), None

    AttentionInterface.register("nothing", nothing)
    AttentionMaskInterface.register("nothing", lambda *_, **__: None)
    model.set_attn_implementation("nothing")


def account() -> Any:
    """The functions of ``allocations.c``, which this process was started under."""
    found = ctypes.CDLL(None)
    for name in ("live", "peak", "products"):
        getattr(found, f"allocations_{name}").restype = ctypes.c_long
    return found


def peak_of(call: Callable[[], object]) -> int:
    """Bytes at the peak of a call beyond those before it; what libraries keep for ever counts, unless they have it."""
    counted = account()
    gc.collect()
    counted.allocations_restart()
    before = int(counted.allocations_live())
    call()
    return int(counted.allocations_peak()) - before
