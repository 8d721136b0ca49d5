"""Fidelity: a text is streamed through capped memory by teacher forcing and compared with full memory.

Every policy reads the same tokens in the same pieces under the same :class:`Terms`: at equal slots per KV head, or at
equal bytes, workspace included. A piece never reaches over the moment at which the memory is full, so compactions
happen exactly there. What was measured is kept on disk, so a killed comparison goes on where it stopped.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import FailFast

from agentmem.evaluation.full_logits import full_logits, passage_key
from agentmem.evaluation.kept import load, save, settings_key
from agentmem.evaluation.metrics import Divergence
from agentmem.evaluation.terms import Equal, Frozen, Reader, Spent, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.contracts import Policy

GROUP = 8
"""Compactions in one group of the drift."""
LEAST_DRIFT = 2 * GROUP
"""Compactions from which on drift is reported."""


class Measurement(Spent):
    """One policy's run over one passage, position by position; see :class:`Divergence` for the measures."""

    policy: str
    equal: Equal
    kl: Annotated[tuple[float, ...], FailFast()]
    delta_nll: Annotated[tuple[float, ...], FailFast()]
    agrees: Annotated[tuple[bool, ...], FailFast()]
    compactions: Annotated[tuple[int, ...], FailFast()]


class Drift(Frozen):
    """Mean KL of the ``positions`` that were read after ``first`` to ``last`` compactions."""

    first: int
    last: int
    kl_mean: float
    positions: int


class FidelityRow(Frozen):
    """One line of the table. KL in nats, over the ``positions`` that lie past the first crossing of the cap."""

    policy: str
    """The name or spec as it was asked for."""
    equal: Equal
    offset: int
    """Character of the text at which the passage begins."""
    kl_mean: float
    kl_p95: float
    top1: float
    """Share of positions at which the most likely token is the same as with full memory."""
    delta_nll: float
    """Negative log-likelihood of the text minus that with full memory, nats per token."""
    num_compactions: int
    held: int
    bytes: int
    seconds: float
    compact_seconds: float
    """Of ``seconds``, those spent compacting."""
    positions: int
    capacity: int
    kl_by_compaction: Annotated[tuple[float, ...], FailFast()]
    """Mean KL of the positions read after 0, 1, 2, … compactions; the first shows an untouched memory's KL."""
    drift: Annotated[tuple[Drift, ...], FailFast()]
    """The same in groups of eight compactions from the first on; empty below sixteen."""

    @property
    def seconds_each(self) -> float:
        """Seconds per compaction; 0 without any."""
        return self.compact_seconds / max(1, self.num_compactions)


class Medians(Frozen):
    """One policy's medians over ``windows`` passages; the fields are those of :class:`FidelityRow`."""

    policy: str
    equal: Equal
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
    """Stream ``ids [tokens + 1]`` through capped memory and compare with ``full [tokens, V]``.

    Raises:
        AgentmemError: the terms do not fit the model, or the policy cannot serve them.

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
    progress: Callable[[str, int], None] = lambda _name, _tokens: None,
) -> Iterator[Measurement]:
    """One :class:`Measurement` per policy, in order; each is saved in ``cache_dir`` before it is yielded.

    What was saved with the same model, passage, settings and code is not measured again unless ``fresh``.
    ``progress`` is called with the policy's name ("full" memory's under "full memory") and the tokens done.

    Raises:
        AgentmemError: see :func:`measure`; what was saved before stays.

    """
    made = [terms.policy(spec) for spec in policies]  # an unknown name is refused before any work
    folder = cache_dir / passage_key(model, ids)
    full: torch.Tensor | None = None
    for policy in made:
        path = folder / f"{settings_key(policy, terms)}.json"
        found = None if fresh else load(Measurement, path)
        if found is None:
            if full is None:
                full = full_logits(model, ids, folder, fresh=fresh, progress=partial(progress, "full memory"))
            named = partial(progress, policy.name)
            found = measure(model, ids, full, policy, terms, tokenizer=tokenizer, progress=named)
            save(found, path)
        yield found


def rows(measurements: Sequence[Measurement], *, offset: int = 0) -> tuple[FidelityRow, ...]:
    """The table of one passage. All policies are judged on the same positions: from where the first had to compact.

    Positions before any compaction are left out because nothing differs there; where no policy had to compact, all
    positions count.
    """
    crossed = [each for each in measurements if each.capacity < len(each.kl)]
    first = {
        equal: min((each.capacity for each in crossed if each.equal == equal), default=0)
        for equal in ("slots", "bytes")
    }
    return tuple(_row(each, first[each.equal], offset) for each in measurements)


def _row(measurement: Measurement, first: int, offset: int) -> FidelityRow:
    kl = np.array(measurement.kl)
    counts = np.array(measurement.compactions)
    return FidelityRow(
        policy=measurement.policy,
        equal=measurement.equal,
        offset=offset,
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
    """One line per (equal, policy), in order of appearance: medians over the passages that were measured."""
    groups: dict[tuple[Equal, str], list[FidelityRow]] = {}
    for row in found:
        groups.setdefault((row.equal, row.policy), []).append(row)
    return tuple(_medians(group) for group in groups.values())


def _medians(group: Sequence[FidelityRow]) -> Medians:
    first = group[0]
    names = ("kl_mean", "kl_p95", "top1", "delta_nll", "seconds_each")
    return Medians(
        policy=first.policy,
        equal=first.equal,
        windows=len(group),
        **{name: median(getattr(row, name) for row in group) for name in names},
        drift=_median_drift([row.drift for row in group]),
    )


def _median_drift(drifts: Sequence[Sequence[Drift]]) -> tuple[Drift, ...]:
    """Group by group, as far as every passage has it."""
    return tuple(
        same[0].model_copy(update={"kl_mean": median(each.kl_mean for each in same)})
        for same in zip(*drifts, strict=False)
    )
