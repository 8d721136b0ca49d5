"""Fidelity: a text is streamed through capped memory by teacher forcing and compared with full memory.

Every policy reads the same tokens in the same pieces under the same :class:`Terms`: at equal slots per KV head, or at
equal bytes, workspace included. A piece never reaches over the moment at which the memory is full, so compactions
happen exactly there. What was measured is kept on disk, so a killed comparison goes on where it stopped.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from agentmem import plugins
from agentmem.contracts import QuerySource
from agentmem.doors import capped
from agentmem.evaluation.full_logits import full_logits, passage_key
from agentmem.evaluation.kept import load, save, settings_key
from agentmem.evaluation.metrics import Divergence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.contracts import Policy
    from agentmem.hf import CappedMemory

Equal = Literal["slots", "bytes"]
_ROOMY = 1 << 50
"""A cap that any policy's workspace fits into, for comparisons at equal slots; nothing of it is allocated ahead."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Terms(_Frozen):
    """What all policies of one comparison share: ``slots`` per KV head, or ``cap_bytes`` with the workspace in it."""

    slots: int | None = Field(default=None, ge=1)
    cap_bytes: int | None = Field(default=None, ge=1)
    keep_first: int = Field(default=16, ge=0)
    keep_recent: int = Field(default=96, ge=0)
    target: int | float | str = 0.5
    chunk: int = Field(default=1024, ge=1)
    probe: QuerySource | None = None
    """Replaces the source of every policy that probes; ``None`` leaves each its own."""
    probe_tokens: int | None = Field(default=None, ge=1)
    """The same probe length for every policy that probes; ``None`` lets the plan choose."""
    seed: int = 0

    @property
    def equal(self) -> Equal:
        """What is held equal over the policies."""
        return "bytes" if self.slots is None else "slots"


class Measurement(_Frozen):
    """One policy's run over one passage, position by position; see :class:`Divergence` for the measures."""

    policy: str
    equal: Equal
    capacity: int
    """Slots per KV head when the memory is full: the first position that needs a compaction."""
    held: int
    """The most slots that were held after a forward, mean over layers and KV heads."""
    bytes: int
    """The most that R + T came to."""
    seconds: float
    """Forwards and compactions, the comparison itself left out."""
    kl: tuple[float, ...]
    delta_nll: tuple[float, ...]
    agrees: tuple[bool, ...]
    compactions: tuple[int, ...]


class FidelityRow(_Frozen):
    """One line of the table. KL in nats, over the ``positions`` that lie past the first crossing of the cap."""

    policy: str
    equal: Equal
    kl_mean: float
    kl_p95: float
    top1: float
    delta_nll: float
    num_compactions: int
    held: int
    bytes: int
    seconds: float
    positions: int
    capacity: int
    kl_by_compaction: tuple[float, ...]
    """Mean KL of the positions read after 0, 1, 2, … compactions; the first shows an untouched memory's KL."""


def measure(
    model: PreTrainedModel,
    ids: torch.Tensor,
    full: torch.Tensor,
    policy: Policy,
    terms: Terms,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Measurement:
    """Stream ``ids [tokens + 1]`` through capped memory and compare with ``full [tokens, V]``.

    Raises:
        AgentmemError: the terms do not fit the model, or the policy cannot serve them.

    """
    divergence, position, most, seconds = Divergence(), 0, 0, 0.0
    with _capped(model, policy, terms, tokenizer) as memory, torch.no_grad():
        while position < len(full):
            # A full memory has room 0: one token makes it compact, as in decoding, and then there is room again.
            stop = min(position + max(1, min(memory.memory.slack(), memory.room())), len(full))
            started = time.perf_counter()
            piece = ids[position:stop].unsqueeze(0).to(model.device)
            logits = model(input_ids=piece, past_key_values=memory, use_cache=True).logits[0]
            seconds += time.perf_counter() - started
            divergence.add(full[position:stop], logits, ids[position + 1 : stop + 1], len(memory.compactions))
            most, position = max(most, memory.usage().held_slots), stop
            progress(position)
        return Measurement(
            policy=policy.name,
            equal=terms.equal,
            capacity=memory.plan.capacity,
            held=round(most / sum(layer.kv_heads for layer in memory.memory.shape.layers)),
            bytes=memory.report().peak_bytes,
            seconds=seconds,
            kl=tuple(divergence.kl),
            delta_nll=tuple(divergence.delta_nll),
            agrees=tuple(divergence.agrees),
            compactions=tuple(divergence.compactions),
        )


def stream(
    model: PreTrainedModel,
    ids: torch.Tensor,
    policies: Sequence[str],
    terms: Terms,
    *,
    cache_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fresh: bool = False,
    progress: Callable[[str, int], None] = lambda _name, _tokens: None,
) -> Iterator[Measurement]:
    """One :class:`Measurement` per policy, in order; each is saved in ``cache_dir`` before it is yielded.

    What was saved with the same model, passage, settings and code is not measured again unless ``fresh``.
    ``progress`` is told the policy's name ("full" memory's under "full memory") and the tokens done.

    Raises:
        AgentmemError: see :func:`measure`; what was saved before stays.

    """
    made = [_policy(name, terms) for name in policies]  # an unknown name is refused before any work
    folder = cache_dir / passage_key(model, ids)
    full: torch.Tensor | None = None
    for policy in made:
        path = folder / f"{settings_key(policy, terms)}.json"
        found = None if fresh else load(Measurement, path)
        if found is None:
            if full is None:
                full = full_logits(model, ids, folder, fresh=fresh, progress=partial(progress, "full memory"))
            told = partial(progress, policy.name)
            found = measure(model, ids, full, policy, terms, tokenizer=tokenizer, progress=told)
            save(found, path)
        yield found


def rows(measurements: Sequence[Measurement]) -> tuple[FidelityRow, ...]:
    """The table. All policies are judged on the same positions: from where the first of them had to compact.

    Positions before any compaction are left out because nothing differs there; where no policy had to compact, all
    positions count.
    """
    crossed = [each for each in measurements if each.capacity < len(each.kl)]
    first = {
        equal: min((each.capacity for each in crossed if each.equal == equal), default=0)
        for equal in ("slots", "bytes")
    }
    return tuple(_row(each, first[each.equal]) for each in measurements)


def _row(measurement: Measurement, first: int) -> FidelityRow:
    kl = np.array(measurement.kl)
    counts = np.array(measurement.compactions)
    return FidelityRow(
        policy=measurement.policy,
        equal=measurement.equal,
        kl_mean=float(kl[first:].mean()),
        kl_p95=float(np.percentile(kl[first:], 95)),
        top1=float(np.mean(measurement.agrees[first:])),
        delta_nll=float(np.mean(measurement.delta_nll[first:])),
        num_compactions=int(counts[-1]),
        held=measurement.held,
        bytes=measurement.bytes,
        seconds=measurement.seconds,
        positions=len(kl) - first,
        capacity=measurement.capacity,
        kl_by_compaction=tuple(float(kl[counts == count].mean()) for count in range(int(counts[-1]) + 1)),
    )


def _policy(name: str, terms: Terms) -> Policy:
    """The named policy with the comparison's common probe."""
    policy = plugins.policy(name)
    if not policy.queries.probes and policy.queries.source != "live":
        return policy
    queries = replace(
        policy.queries,
        source=terms.probe or policy.queries.source,
        tokens=terms.probe_tokens or policy.queries.tokens,
    )
    return replace(policy, queries=queries)


def _capped(
    model: PreTrainedModel, policy: Policy, terms: Terms, tokenizer: PreTrainedTokenizerBase | None
) -> AbstractContextManager[CappedMemory]:
    return capped(
        model,
        terms.cap_bytes or _ROOMY,
        policy=policy,
        tokenizer=tokenizer,
        keep_first=terms.keep_first,
        keep_recent=terms.keep_recent,
        target=terms.target,
        chunk=terms.chunk,
        max_slots=terms.slots,
        seed=terms.seed,
    )
