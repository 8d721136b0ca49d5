"""Measure fidelity: how much the logits with a capped memory differ from those with full memory on the same text.

The text is teacher-forced: the model reads the true tokens, whatever it predicts. All policies read the same tokens
with the same settings (:class:`Terms`). Their memories have the same limit, which is either a number of slots per KV
head, or a number of bytes including temporary bytes. The text is read in pieces. A piece ends when the memory is full;
the token after the piece causes a compaction. Each measurement is saved on disk, so that an interrupted comparison can
be resumed.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import FailFast

from agentmem.contracts import blocks
from agentmem.evaluation.full_logits import MOST_BYTES, full_logits, passage_key
from agentmem.evaluation.kept import load, save, settings_key
from agentmem.evaluation.metrics import Divergence
from agentmem.evaluation.terms import Equal, Frozen, Reader, Source, Spent, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.contracts import Policy

GROUP = 8
"""The number of compactions over which one :class:`Drift` averages."""
BLOCK = 64
"""The number of positions over which one value of ``kl_by_tokens`` averages."""
LEAST_DRIFT = 2 * GROUP
"""The least number of compactions for which drift is reported."""


class Measurement(Spent):
    """The measured results of one policy on one passage, with one number per position for each measure.

    :class:`Divergence` explains the measures.
    """

    policy: str
    equal: Equal
    kl: Annotated[tuple[float, ...], FailFast()]
    delta_nll: Annotated[tuple[float, ...], FailFast()]
    agrees: Annotated[tuple[bool, ...], FailFast()]
    compactions: Annotated[tuple[int, ...], FailFast()]


class Drift(Frozen):
    """The mean KL between full and capped memory, over positions that were read after similarly many compactions.

    ``positions`` positions were read after at least ``first`` and at most ``last`` compactions. ``kl_mean`` is the mean
    of KL(full ‖ capped) over these positions, in nats. This KL compares the next-token distributions with full memory
    and with capped memory.
    """

    first: int
    last: int
    kl_mean: float
    positions: int


class FidelityRow(Source):
    """One line of the fidelity table: the scores of one policy on one passage.

    KL means KL(full ‖ capped) in nats; it compares next-token distributions with full memory and with capped memory.
    The scores are computed over the last ``positions`` positions of the passage. The first of these is the token that
    caused the earliest compaction among the compared policies. Before it, all memories were complete; see :func:`rows`.
    """

    policy: str
    """Name or spec of the policy as the caller gave it."""
    equal: Equal
    kl_mean: float
    kl_p95: float
    top1: float
    """Share of positions at which capped and full memory have the same most likely token."""
    delta_nll: float
    """Negative log-likelihood of the text minus its negative log-likelihood with full memory, in nats per token."""
    num_compactions: int
    held: int
    bytes: int
    seconds: float
    compact_seconds: float
    """The part of ``seconds`` that was spent compacting."""
    positions: int
    capacity: int
    kl_by_compaction: Annotated[tuple[float, ...], FailFast()]
    """Mean KL of the positions read after 0, 1, 2, … compactions; entry 0 is the KL before the first compaction."""
    kl_by_tokens: Annotated[tuple[float, ...], FailFast()] = ()
    """Mean KL of each :data:`BLOCK` successive positions of the passage, from its beginning; the last may be fewer."""
    drift: Annotated[tuple[Drift, ...], FailFast()]
    """Mean KL in groups of eight compactions, beginning with the first; empty if there were fewer than sixteen."""

    @property
    def seconds_each(self) -> float:
        """Return the mean seconds per compaction; 0 if there was no compaction."""
        return self.compact_seconds / max(1, self.num_compactions)


class Medians(Frozen):
    """The medians of one policy's rows over ``windows`` passages; :class:`FidelityRow` explains the fields."""

    policy: str
    equal: Equal
    model: str
    limit: str
    windows: int
    kl_mean: float
    kl_p95: float
    top1: float
    delta_nll: float
    seconds_each: float
    drift: Annotated[tuple[Drift, ...], FailFast()]


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
    """Read ``ids [tokens + 1]`` into a capped memory, and compare the logits with those of full memory.

    ``full [tokens, V]`` are the logits of full memory. The last id is only predicted. ``progress`` is called with the
    number of tokens read so far.

    Raises:
        AgentmemError: the settings in ``terms`` do not fit the model or the policy.

    """
    divergence = Divergence()
    with terms.memory(model, policy, tokenizer) as memory:
        reader = Reader(model, memory)
        for span, logits in reader.read(ids[:-1]):
            divergence.add(full[span], logits, ids[span.start + 1 : span.stop + 1], len(memory.compactions))
            progress(span.stop)
        return Measurement(
            **dict(reader.spent()),
            policy=policy.name,
            equal=terms.equal,
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
    most_bytes: int = MOST_BYTES,
    progress: Callable[[str, int], None] = lambda _name, _tokens: None,
) -> Iterator[Measurement]:
    """Measure every policy on the passage ``ids [tokens + 1]``; yield the measurements in the order of ``policies``.

    Each measurement is saved in ``cache_dir`` before it is yielded. If a measurement of the same model, passage,
    settings and code was saved earlier, it is loaded instead of being made again; with ``fresh``, it is made again.
    The logits of full memory are saved there, too; all logits in ``cache_dir`` take ``most_bytes`` at most.
    ``progress`` is called with the policy's name and the number of tokens done. While the logits of full memory are
    computed, the name is "full memory".

    Raises:
        AgentmemError: see :func:`measure`; measurements that were saved before stay on disk.

    """
    made = [terms.policy(spec) for spec in policies]  # an unknown name is refused before any work
    folder = cache_dir / passage_key(model, ids)
    full: torch.Tensor | None = None
    for policy in made:
        path = folder / f"{settings_key(policy, terms)}.json"
        found = None if fresh else load(Measurement, path)
        if found is None:
            if full is None:
                named = partial(progress, "full memory")
                full = full_logits(model, ids, folder, fresh=fresh, most_bytes=most_bytes, progress=named)
            named = partial(progress, policy.name)
            found = measure(model, ids, full, policy, terms, tokenizer=tokenizer, progress=named)
            save(found, path)
        yield found


def rows(measurements: Sequence[Measurement], source: Source = Source()) -> tuple[FidelityRow, ...]:  # noqa: B008  # frozen
    """Return the fidelity table of one passage under one limit, which ``source`` describes: one row per measurement.

    All policies with the same kind of limit (slots or bytes) are scored on the same positions. These begin at the token
    that caused the earliest compaction among these policies, and end with the passage. Before that token, all memories
    are still complete. If no policy compacted, all positions count.
    """
    crossed = [each for each in measurements if each.capacity < len(each.kl)]
    first = {
        equal: min((each.capacity for each in crossed if each.equal == equal), default=0)
        for equal in ("slots", "bytes")
    }
    return tuple(_row(each, first[each.equal], source) for each in measurements)


def _row(measurement: Measurement, first: int, source: Source) -> FidelityRow:
    kl = np.array(measurement.kl)
    counts = np.array(measurement.compactions)
    return FidelityRow(
        **dict(source),
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
        compact_seconds=measurement.compact_seconds,
        positions=len(kl) - first,
        capacity=measurement.capacity,
        kl_by_compaction=tuple(float(kl[counts == count].mean()) for count in range(int(counts[-1]) + 1)),
        kl_by_tokens=tuple(float(kl[part].mean()) for part in blocks(len(kl), BLOCK)),
        drift=_drift(kl, counts),
    )


def _drift(kl: np.ndarray, counts: np.ndarray) -> tuple[Drift, ...]:
    total = int(counts[-1])
    if total < LEAST_DRIFT:
        return ()
    found = []
    for first in range(1, total + 1, GROUP):
        last = min(first + GROUP - 1, total)
        within = kl[(counts >= first) & (counts <= last)]
        found.append(Drift(first=first, last=last, kl_mean=float(within.mean()), positions=len(within)))
    return tuple(found)


def medians(found: Sequence[FidelityRow]) -> tuple[Medians, ...]:
    """Return the medians over all passages, one entry per model, limit and policy, in order of first appearance."""
    groups: dict[tuple[str, ...], list[FidelityRow]] = {}
    for row in found:
        groups.setdefault((row.model, row.equal, row.limit, row.policy), []).append(row)
    return tuple(_medians(group) for group in groups.values())


def _medians(group: Sequence[FidelityRow]) -> Medians:
    first = group[0]
    names = ("kl_mean", "kl_p95", "top1", "delta_nll", "seconds_each")
    return Medians(
        policy=first.policy,
        equal=first.equal,
        model=first.model,
        limit=first.limit,
        windows=len(group),
        **{name: median(getattr(row, name) for row in group) for name in names},
        drift=_median_drift([row.drift for row in group]),
    )


def _median_drift(drifts: Sequence[Sequence[Drift]]) -> tuple[Drift, ...]:
    """Return the median KL over passages for each group of positions, up to the last group that all passages have.

    ``drifts`` has the groups of each passage; :class:`Drift` describes a group.
    """
    return tuple(
        same[0].model_copy(update={"kl_mean": median(each.kl_mean for each in same)})
        for same in zip(*drifts, strict=False)
    )
