"""What all policies of one comparison share, and how a memory is opened and read under it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agentmem import plugins
from agentmem.api import capped, plan
from agentmem.contracts import Queries
from agentmem.errors import SettingsRefused
from agentmem.settings import Seed, SlotDtype
from agentmem.untrusted.texts import faults

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.contracts import Policy
    from agentmem.hf import CappedCache
    from agentmem.planning.pricing import Plan

Equal = Literal["slots", "bytes"]
_ROOMY = 1 << 50
"""A cap that any policy's workspace fits into, for comparisons at equal slots; nothing of it is allocated ahead."""


class Frozen(BaseModel):
    """Values that are written down: settings of an evaluation, and what it found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, **values: object) -> Self:
        """Build it; every violation becomes one :class:`SettingsRefused` with field and value."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsRefused(faults(error, values)) from None


class Terms(Frozen):
    """What all policies of one comparison share: ``slots`` per KV head, or ``cap_bytes`` with the workspace in it."""

    slots: int | None = Field(default=None, ge=1)
    cap_bytes: int | None = Field(default=None, ge=1)
    keep_first: int = Field(default=16, ge=0)
    keep_recent: int = Field(default=96, ge=0)
    target: int | float | str = 0.5
    chunk: int = Field(default=1024, ge=1)
    slot_dtype: SlotDtype = "auto"
    probe: str | None = None
    """A mixture such as ``replay+spread:0.5`` for every policy that asks for queries; ``None`` leaves each its own."""
    probe_tokens: int | None = Field(default=None, ge=1)
    """As many reference tokens for every policy that asks for queries; ``None`` lets the plan choose."""
    seed: Seed = 0

    @field_validator("probe")
    @classmethod
    def _check_probe(cls, probe: str | None) -> str | None:
        if probe is not None:
            Queries.of(probe)
        return probe

    @property
    def equal(self) -> Equal:
        """What is held equal over the policies."""
        return "bytes" if self.slots is None else "slots"

    def policy(self, spec: str) -> Policy:
        """The policy of that name or spec, asking for these terms' reference queries if it asks for any.

        Raises:
            SettingsRefused: see :func:`agentmem.plugins.policy`.

        """
        policy = plugins.policy(spec)
        if not policy.queries.parts:
            return policy
        parts = policy.queries.parts if self.probe is None else Queries.of(self.probe).parts
        tokens = self.probe_tokens or policy.queries.tokens
        return replace(policy, queries=replace(policy.queries, parts=parts, tokens=tokens))

    def memory(
        self, model: PreTrainedModel, policy: Policy, tokenizer: PreTrainedTokenizerBase | None, **settings: Any
    ) -> AbstractContextManager[CappedCache]:
        """A memory under these terms; ``settings`` are further ones of :func:`agentmem.capped`."""
        return capped(
            model, cap=self.cap_bytes or _ROOMY, policy=policy, tokenizer=tokenizer, **self._settings(), **settings
        )

    def plan(self, model: PreTrainedModel, policy: Policy, **settings: Any) -> Plan:
        """What :meth:`memory` will plan."""
        return plan(model, cap=self.cap_bytes or _ROOMY, policy=policy, **self._settings(), **settings)

    def _settings(self) -> dict[str, Any]:
        names = ("keep_first", "keep_recent", "target", "chunk", "slot_dtype", "seed")
        return {"max_slots": self.slots, **{name: getattr(self, name) for name in names}}


class Moment(Frozen):
    """A memory after one forward; its bytes are R alone."""

    tokens: int
    """Tokens read so far."""
    used: int
    """Bytes of the slots that are held."""
    resident: int
    """Bytes allocated for slots."""


class Compacted(Frozen):
    """One compaction while a text was read."""

    tokens: int
    """Tokens read before it."""
    seconds: float
    peak: int
    """The most bytes, R + T, that it had allocated."""
    output_error: float | None
    """Relative L2 error on held-out reference queries, mean over layers; ``None`` without any."""


class Spent(Frozen):
    """What reading through one memory took."""

    capacity: int
    """Tokens that an empty memory takes: the first position that needs a compaction."""
    held: int
    """The most slots that were held after a forward, mean over layers and KV heads."""
    bytes: int
    """The most that R + T came to."""
    seconds: float
    """Forwards and compactions; what is done with their output is left out."""
    compact_seconds: float
    """Of these, compactions."""
    moments: tuple[Moment, ...] = ()
    """After every forward."""
    compacted: tuple[Compacted, ...] = ()
    heads: tuple[tuple[int, ...], ...] = ()
    """Slots of every KV head of every compacted layer right after the last compaction; empty without one."""


@dataclass
class Reader:
    """Reads tokens into a memory and keeps the account."""

    model: PreTrainedModel
    memory: CappedCache
    seconds: float = 0.0
    _most: int = field(default=0, repr=False)
    _moments: list[Moment] = field(default_factory=list, repr=False)
    _heads: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    def read(self, ids: torch.Tensor, *, every: bool = True) -> Iterator[tuple[slice, torch.Tensor]]:
        """Read ``ids [n]`` in pieces that never reach over the moment at which the memory is full.

        Yields where a piece lies in ``ids`` and its logits, ``[piece, V]``; the last line alone unless ``every``.
        """
        position = 0
        while position < len(ids):
            # A full memory has room 0: one token makes it compact, as in decoding, and then there is room again.
            room = min(self.memory.room(), self.capacity, self.memory.engine.most_tokens)
            compactions = len(self.memory.compactions)
            stop = min(position + max(1, room), len(ids))
            began = time.perf_counter()
            with torch.no_grad():
                logits = self.model(
                    input_ids=ids[position:stop].unsqueeze(0).to(self.model.device),
                    past_key_values=self.memory,
                    use_cache=True,
                    logits_to_keep=0 if every else 1,
                ).logits[0]
            self.seconds += time.perf_counter() - began
            self._note(compacted=len(self.memory.compactions) > compactions)
            yield slice(position, stop), logits
            position = stop

    @property
    def capacity(self) -> int:
        """Tokens that an empty memory takes; what a policy keeps free for itself is no room."""
        return self.memory.plan.capacity - self.memory.plan.scratch

    @property
    def held(self) -> int:
        """Slots held now, mean over layers and KV heads."""
        return self._mean(self.memory.usage().held_slots)

    def _mean(self, slots: int) -> int:
        return round(slots / sum(layer.kv_heads for layer in self.memory.memory.shape.layers))

    def compact(self) -> None:
        """Compact now, on the account."""
        began = time.perf_counter()
        self.memory.compact()
        self.seconds += time.perf_counter() - began
        self._note(compacted=True)

    def _note(self, *, compacted: bool) -> None:
        usage = self.memory.usage()
        self._most = max(self._most, usage.held_slots)
        self._moments.append(Moment(tokens=usage.tokens_seen, used=usage.used_bytes, resident=usage.resident_bytes))
        if compacted:
            stores = self.memory.memory.sequences[0].stores
            self._heads = tuple(tuple(store.lengths) for store in stores if store is not None)

    def spent(self) -> Spent:
        """What it took so far."""
        report = self.memory.report()
        return Spent(
            capacity=self.capacity,
            held=self._mean(self._most),
            bytes=report.peak_bytes,
            seconds=self.seconds,
            compact_seconds=report.seconds_compacting,
            moments=tuple(self._moments),
            compacted=tuple(
                Compacted(
                    tokens=each.tokens_seen, seconds=each.seconds, peak=each.bytes_peak, output_error=each.output_error
                )
                for each in report.compactions
            ),
            heads=self._heads,
        )
