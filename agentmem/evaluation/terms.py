"""Define the memory settings that all policies in a comparison share, and a reader that feeds tokens into a memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agentmem import plugins
from agentmem.api import capped, plan
from agentmem.contracts import Queries
from agentmem.errors import SettingsRefused
from agentmem.settings import Seed, SlotDtype, format_bytes
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
"""Cap in bytes for comparisons at equal slots, large enough for any policy; it is not allocated in advance."""


class Frozen(BaseModel):
    """Base class of the evaluations' settings and results: immutable pydantic models without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, **values: object) -> Self:
        """Build an instance from ``values``.

        Raises:
            SettingsRefused: a value is not valid; the message names the fields and their values.

        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsRefused(faults(error, values)) from None


class Terms(Frozen):
    """Memory settings that all policies in one comparison share.

    The limit is either ``slots`` per KV head, or ``cap_bytes`` for resident and temporary bytes together.
    """

    slots: int | None = Field(default=None, ge=1)
    cap_bytes: int | None = Field(default=None, ge=1)
    keep_first: int = Field(default=16, ge=0)
    keep_recent: int = Field(default=96, ge=0)
    target: int | float | str = 0.5
    chunk: int = Field(default=1024, ge=1)
    slot_dtype: SlotDtype = "auto"
    probe: str | None = None
    """Sources of reference queries, such as ``replay+spread:0.5``, for every policy that uses reference queries.

    With ``None``, each policy uses its own sources.
    """
    probe_tokens: int | None = Field(default=None, ge=1)
    """Number of reference tokens of every policy that uses reference queries.

    With ``None``, each policy uses its own number, or the plan's choice if it has none.
    """
    seed: Seed = 0

    @field_validator("probe")
    @classmethod
    def _check_probe(cls, probe: str | None) -> str | None:
        if probe is not None:
            Queries.of(probe)
        return probe

    @property
    def equal(self) -> Equal:
        """Return the kind of limit that all policies share: ``slots`` (per KV head) or ``bytes``."""
        return "bytes" if self.slots is None else "slots"

    @property
    def limit(self) -> str:
        """Return the limit that all policies share as a text, such as ``512 slots`` or ``24.0 MiB``."""
        return format_bytes(self.cap_bytes or 0) if self.slots is None else f"{self.slots} slots"

    def policy(self, spec: str) -> Policy:
        """Make a policy from its name, or from its spec (a name with options).

        ``probe`` and ``probe_tokens``, if they are set, replace the policy's own settings for its reference queries. A
        policy without reference queries is not changed.

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
        """Return a context manager that opens a memory with these settings for ``model``.

        ``settings`` are further arguments of :func:`agentmem.capped`.
        """
        return capped(
            model, cap=self.cap_bytes or _ROOMY, policy=policy, tokenizer=tokenizer, **self._settings(), **settings
        )

    def plan(self, model: PreTrainedModel, policy: Policy, **settings: Any) -> Plan:
        """Return the plan that :meth:`memory` would make; nothing is allocated."""
        return plan(model, cap=self.cap_bytes or _ROOMY, policy=policy, **self._settings(), **settings)

    def _settings(self) -> dict[str, Any]:
        names = ("keep_first", "keep_recent", "target", "chunk", "slot_dtype", "seed")
        return {"max_slots": self.slots, **{name: getattr(self, name) for name in names}}


def versions() -> dict[str, str]:
    """Return the versions of agentmem, torch and transformers."""
    return {
        "agentmem": version("agentmem-runtime"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class Source(Frozen):
    """What a measurement was made of; texts are empty where the caller did not say."""

    model: str = ""
    """Name of the model as the caller gave it."""
    text: str = ""
    """Name of the text."""
    text_sha256: str = ""
    """SHA-256 hash of the whole text in UTF-8, in hexadecimal digits."""
    offset: int = 0
    """Character of the text at which the passage begins, counted from 0."""
    settings: Terms = Terms()
    """The limit and the other settings that all policies share."""
    versions: dict[str, str] = Field(default_factory=versions)
    """Versions of agentmem, torch and transformers."""

    @property
    def limit(self) -> str:
        """Return the limit as a text, such as ``512 slots`` or ``24.0 MiB``."""
        return self.settings.limit


class Moment(Frozen):
    """State of a memory after one forward; temporary bytes are not included."""

    tokens: int
    """Tokens read so far."""
    used: int
    """Bytes of the slots that hold tokens."""
    resident: int
    """Bytes that are allocated for slots."""


class Compacted(Frozen):
    """The record of one compaction that happened while a text was read."""

    tokens: int
    """Tokens read before the compaction."""
    seconds: float
    peak: int
    """Peak of resident and temporary bytes during the compaction."""
    output_error: float | None
    """Relative L2 error of attention on held-out reference queries, mean over layers; ``None`` without such queries."""


class Spent(Frozen):
    """The slots, bytes and seconds that reading a text into one memory took."""

    capacity: int
    """Number of tokens that fit into an empty memory; one more token needs a compaction."""
    held: int
    """The most slots held after a forward, as the mean over layers and KV heads."""
    bytes: int
    """Peak of resident and temporary bytes."""
    seconds: float
    """Seconds of forwards and compactions, without the comparison of their logits."""
    compact_seconds: float
    """The part of ``seconds`` that was spent compacting."""
    moments: tuple[Moment, ...] = ()
    """State of the memory after every forward."""
    compacted: tuple[Compacted, ...] = ()
    heads: tuple[tuple[int, ...], ...] = ()
    """Slots by compacted layer and KV head, right after the last compaction; empty without compactions."""


@dataclass
class Reader:
    """A reader that feeds tokens into a memory, and records the slots, bytes and seconds that this takes."""

    model: PreTrainedModel
    memory: CappedCache
    seconds: float = 0.0
    _most: int = field(default=0, repr=False)
    _moments: list[Moment] = field(default_factory=list, repr=False)
    _heads: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    def read(self, ids: torch.Tensor, *, every: bool = True) -> Iterator[tuple[slice, torch.Tensor]]:
        """Read ``ids [n]`` into the memory, in pieces that end when the memory is full.

        Yields for each piece its slice of ``ids`` and its logits ``[piece, V]``. With ``every=False``, only the logits
        of the piece's last token are computed, ``[1, V]``.
        """
        position = 0
        while position < len(ids):
            # A full memory has room 0. One more token makes it compact, as in decoding, and then it has room again.
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
        """Return the number of tokens that fit into an empty memory.

        A policy may let the model write texts, such as summaries. The slots reserved for these texts are not counted.
        """
        return self.memory.plan.capacity - self.memory.plan.scratch

    @property
    def held(self) -> int:
        """Return the slots held now, as the mean over layers and KV heads."""
        return self._mean(self.memory.usage().total_slots)

    def _mean(self, slots: int) -> int:
        return round(slots / sum(layer.kv_heads for layer in self.memory.memory.shape.layers))

    def compact(self) -> None:
        """Compact the memory now, and add the time and the new state of the memory to the records."""
        began = time.perf_counter()
        self.memory.compact()
        self.seconds += time.perf_counter() - began
        self._note(compacted=True)

    def _note(self, *, compacted: bool) -> None:
        usage = self.memory.usage()
        self._most = max(self._most, usage.total_slots)
        self._moments.append(Moment(tokens=usage.tokens_seen, used=usage.used_bytes, resident=usage.resident_bytes))
        if compacted:
            stores = self.memory.memory.sequences[0].stores
            self._heads = tuple(tuple(store.lengths) for store in stores if store is not None)

    def spent(self) -> Spent:
        """Return the slots, bytes and seconds that reading took so far."""
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
