"""Measure a single compaction: read a document, compact it once, and teacher-force its continuation.

This is the main setting of arXiv:2602.16284. The compaction keeps a fraction of the document's slots, and no other
compaction follows. The logits over the continuation are compared with those of full memory.

Two baselines are also measured. ``no-context`` reads the continuation without the document. ``truncation`` reads only
the last tokens of the document, and then the continuation. The number of these tokens is the number of slots per KV
head that the compaction keeps.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator

from agentmem.errors import SettingsRefused
from agentmem.evaluation.full_logits import MOST_BYTES, full_logits, passage_key
from agentmem.evaluation.kept import load, save, settings_key
from agentmem.evaluation.metrics import Divergence
from agentmem.evaluation.terms import Frozen, Reader, Source, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.contracts import Policy

NO_CONTEXT, TRUNCATION = "no-context", "truncation"
KEEP_FIRST, KEEP_RECENT = 4, 8
"""Defaults of ``keep_first`` and ``keep_recent``, small enough for 1/100 of a document of 1,300 tokens."""


class Shot(Frozen):
    """Settings of a measurement: the length of the continuation, and the ratios of document tokens to kept slots."""

    continuation: int = Field(default=256, ge=1)
    """Tokens that are teacher-forced; all tokens before them are the document."""
    ratios: tuple[int, ...] = (10, 20, 50, 100)
    """A document of n tokens keeps ``n // ratio`` slots per KV head, prefix and recent window included."""

    @field_validator("ratios")
    @classmethod
    def _check_ratios(cls, ratios: tuple[int, ...]) -> tuple[int, ...]:
        if not ratios or min(ratios) < 2 or len(set(ratios)) < len(ratios):  # noqa: PLR2004  # 1 compacts nothing
            raise ValueError(f"ratios: {list(ratios)} must be different and at least 2; write 10,20,50,100")
        return ratios


class OneShotRow(Source):
    """The measured results of one policy or baseline at one ratio, on one passage.

    KL means KL(full ‖ capped) in nats; it compares next-token distributions with full memory and with capped memory.
    All scores are over the ``positions`` positions of the continuation.
    """

    policy: str
    """Name or spec of the policy as the caller gave it, or ``no-context`` or ``truncation``."""
    ratio: int | None
    """Tokens of the document divided by slots kept; ``None`` for ``no-context``."""
    document: int
    """Tokens of the document."""
    slots: int
    """Slots per KV head that the compaction should leave; for ``truncation``, the number of document tokens read."""
    positions: int
    kl_mean: float
    kl_p95: float
    top1: float
    """Share of positions at which capped and full memory have the same most likely token."""
    nll: float
    """Negative log-likelihood of the continuation, in nats per token."""
    delta_nll: float
    """``nll`` minus the negative log-likelihood with full memory, in nats per token."""
    held: int
    """Slots held right after the compaction, mean over layers and KV heads."""
    bytes: int
    """Peak of resident and temporary bytes, including the document's slots before the compaction."""
    seconds: float
    compact_seconds: float
    """The part of ``seconds`` that was spent compacting."""


class Medians(Frozen):
    """The medians of one policy at one ratio over ``windows`` passages; :class:`OneShotRow` explains the fields."""

    policy: str
    ratio: int | None
    slots: int
    windows: int
    kl_mean: float
    kl_p95: float
    top1: float
    nll: float
    delta_nll: float
    compact_seconds: float


class _Place(Frozen):
    """The number of tokens of the document, and the number of slots to keep.

    Both are part of the key under which the result of a :class:`_Case` is saved, beside the policy and the settings of
    the memory.
    """

    document: int
    slots: int


class _Run(NamedTuple):
    """The raw result of measuring one :class:`_Case`; ``held`` and the bytes are 0 for a baseline."""

    divergence: Divergence
    held: int = 0
    bytes: int = 0
    seconds: float = 0.0
    compact_seconds: float = 0.0


class _Case(NamedTuple):
    """One measurement to be made: a policy or a baseline (given by its name) at one ratio.

    The ratio is the number of document tokens per kept slot. ``slots`` is the number of slots to keep, and ``terms``
    are the settings of the memory. For a policy, ``terms.target`` equals ``slots``.
    """

    policy: Policy | str
    ratio: int | None
    slots: int
    terms: Terms

    @property
    def name(self) -> str:
        return self.policy if isinstance(self.policy, str) else self.policy.name


def cases(policies: Sequence[str], terms: Terms, shot: Shot, tokens: int) -> list[_Case]:
    """Return the measurements to be made on a passage of ``tokens`` tokens, in order, after checking the settings.

    The last ``shot.continuation`` tokens of the passage are its continuation. All tokens before them are the document.
    For a policy, the document is compacted once, and then the continuation is teacher-forced.

    The baseline ``no-context`` comes first. Each ratio in ``shot.ratios`` then gives one measurement of the baseline
    ``truncation`` and one of each policy. A ratio is the number of document tokens per kept slot.

    Raises:
        SettingsRefused: the continuation leaves no token for the document, a ratio leaves fewer slots than prefix +
            recent window + 1, or a policy is unknown.

    """
    document = tokens - shot.continuation
    if document < 1:
        raise SettingsRefused(
            f"continuation: {shot.continuation} of {tokens} tokens leaves no document; "
            "give fewer to --continuation or more to --tokens"
        )
    found = [_Case(NO_CONTEXT, None, 0, terms)]
    for ratio in shot.ratios:
        slots = document // ratio
        least = terms.keep_first + terms.keep_recent + 1
        if slots < least:
            raise SettingsRefused(
                f"ratios: 1/{ratio} of a document of {document} tokens is {slots} slots, but keep_first="
                f"{terms.keep_first} + keep_recent={terms.keep_recent} + 1 need {least}; lower the ratio, "
                "--keep-first or --keep-recent, or give more --tokens"
            )
        # The memory is full when the document ends; the continuation must fit behind the slots that are kept.
        capacity = max(document, slots + shot.continuation)
        update = {"slots": capacity, "cap_bytes": None, "target": slots}
        found.append(_Case(TRUNCATION, ratio, slots, terms))
        found += [_Case(terms.policy(spec), ratio, slots, terms.model_copy(update=update)) for spec in policies]
    return found


def stream(
    model: PreTrainedModel,
    ids: torch.Tensor,
    policies: Sequence[str],
    terms: Terms,
    shot: Shot,
    *,
    cache_dir: Path,
    source: Source = Source(),  # noqa: B008  # frozen
    tokenizer: PreTrainedTokenizerBase | None = None,
    fresh: bool = False,
    most_bytes: int = MOST_BYTES,
    progress: Callable[[str, int], None] = lambda _name, _tokens: None,
) -> Iterator[OneShotRow]:
    """Measure baselines and policies on the passage ``ids [tokens + 1]``, and yield one row per measurement.

    The model reads all ids but the last, which is only predicted. The last ``shot.continuation`` of the read tokens are
    the continuation; all tokens before them are the document. A policy compacts the document once, and then the
    continuation is teacher-forced.

    The baseline ``no-context`` comes first. Each ratio in ``shot.ratios`` then gives one row for the baseline
    ``truncation`` and one row for each policy. A ratio is the number of document tokens per kept slot.

    Each row is saved in ``cache_dir`` before it is yielded. If a row of the same model, passage, settings and code was
    saved earlier, it is loaded instead of being measured again; with ``fresh``, it is measured again. ``progress`` is
    called with the name of the measurement and the number of tokens done. ``source`` is only copied into the rows. All
    logits of full memory in ``cache_dir`` take ``most_bytes`` at most.

    Raises:
        AgentmemError: :func:`cases` refuses the settings, or a policy cannot work with the settings in ``terms``. Rows
            that were saved before the error stay on disk.

    """
    asked = cases(policies, terms, shot, len(ids) - 1)
    folder = cache_dir / passage_key(model, ids)
    document = len(ids) - 1 - shot.continuation
    full: torch.Tensor | None = None
    for case in asked:
        place = _Place(document=document, slots=case.slots)
        path = folder / f"{settings_key(case.policy, case.terms, place)}.json"
        found = None if fresh else load(OneShotRow, path)
        if found is None:
            if full is None:
                named = partial(progress, "full memory")
                full = full_logits(
                    model, ids, folder, first=document, fresh=fresh, most_bytes=most_bytes, progress=named
                )
            label = case.name if case.ratio is None else f"{case.name}, 1/{case.ratio}"
            found = _measure(model, ids, full, case, tokenizer, partial(progress, label))
            save(found, path)
        yield found.model_copy(update={**dict(source), "settings": case.terms, "ratio": case.ratio})


def _measure(
    model: PreTrainedModel,
    ids: torch.Tensor,
    full: torch.Tensor,
    case: _Case,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Callable[[int], None],
) -> OneShotRow:
    document = len(ids) - 1 - len(full)
    if isinstance(case.policy, str):
        run = _anew(model, ids[document - case.slots :], full)
        progress(len(ids) - 1)
    else:
        run = _compacted(model, ids, full, case.policy, case.terms, tokenizer, progress)
    divergence = run.divergence
    kl = np.array(divergence.kl)
    return OneShotRow(
        policy=case.name,
        ratio=case.ratio,
        document=document,
        slots=case.slots,
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_p95=float(np.percentile(kl, 95)),
        top1=float(np.mean(divergence.agrees)),
        nll=float(np.mean(divergence.nll)),
        delta_nll=float(np.mean(divergence.delta_nll)),
        held=run.held,
        bytes=run.bytes,
        seconds=run.seconds,
        compact_seconds=run.compact_seconds,
    )


def _anew(model: PreTrainedModel, ids: torch.Tensor, full: torch.Tensor) -> _Run:
    """Measure a baseline, which reads only ``ids``, and compare its logits with those of full memory.

    ``full [c, V]`` are the logits of full memory over the ``c`` tokens of the continuation. ``ids`` end with these
    tokens and one more id, which is only predicted. The baseline reads ``ids`` in one forward.
    """
    divergence, began = Divergence(), time.perf_counter()
    with torch.no_grad():
        piece = ids[:-1].unsqueeze(0).to(model.device)
        logits = model(input_ids=piece, use_cache=False, logits_to_keep=len(full)).logits[0]
    seconds = time.perf_counter() - began
    divergence.add(full, logits, ids[-len(full) :], 0)
    return _Run(divergence, seconds=seconds)


def _compacted(
    model: PreTrainedModel,
    ids: torch.Tensor,
    full: torch.Tensor,
    policy: Policy,
    terms: Terms,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Callable[[int], None],
) -> _Run:
    """Measure a policy: read the document, compact it once, and read the continuation.

    The logits over the continuation are compared with ``full [c, V]``, which are the logits of full memory over the
    same ``c`` tokens. ``ids`` are the document, the continuation and one more id, which is only predicted.
    """
    divergence, document = Divergence(), len(ids) - 1 - len(full)
    roomy = _beside_scratch(terms, model, policy)
    with roomy.memory(model, policy, tokenizer, mode="manual", min_reclaim=1) as memory:
        reader = Reader(model, memory)
        for span, _ in reader.read(ids[:document], every=False):
            progress(span.stop)
        reader.compact()
        held = reader.held
        for span, logits in reader.read(ids[document:-1]):
            targets = ids[document + span.start + 1 : document + span.stop + 1]
            divergence.add(full[span], logits, targets, len(memory.compactions))
            progress(document + span.stop)
        spent = reader.spent()
    return _Run(divergence, held, spent.bytes, spent.seconds, spent.compact_seconds)


def _beside_scratch(terms: Terms, model: PreTrainedModel, policy: Policy) -> Terms:
    """Return ``terms`` with more slots, so that the document fits into the memory without a compaction.

    A policy may let the model write texts. The number of slots that are reserved for these texts is added to
    ``terms.slots``.
    """
    slots, more = terms.slots or 0, terms
    while (plan := more.plan(model, policy, min_reclaim=1)).capacity - plan.scratch < slots:
        more = terms.model_copy(update={"slots": slots + plan.scratch})
    return more


def medians(found: Sequence[OneShotRow]) -> tuple[Medians, ...]:
    """Return the medians over all passages, one entry per ratio and policy, in order of first appearance."""
    groups: dict[tuple[int | None, str], list[OneShotRow]] = {}
    for row in found:
        groups.setdefault((row.ratio, row.policy), []).append(row)
    names = ("kl_mean", "kl_p95", "top1", "nll", "delta_nll", "compact_seconds")
    return tuple(
        Medians(
            policy=policy,
            ratio=ratio,
            slots=group[0].slots,
            windows=len(group),
            **{name: median(getattr(row, name) for row in group) for name in names},
        )
        for (ratio, policy), group in groups.items()
    )
