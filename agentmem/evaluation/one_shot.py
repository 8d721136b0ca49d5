"""One-shot: a document is read, compacted once to a fraction of its slots, and its continuation is teacher-forced.

This is the main setting of arXiv:2602.16284. No compaction follows the one. What is said to the continuation is
compared with full memory; beside the policies stand what needs none: the continuation without its document, and with
the document's last tokens alone (as many as the policies keep slots), read anew.
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
from agentmem.evaluation.full_logits import full_logits, passage_key
from agentmem.evaluation.kept import load, save, settings_key
from agentmem.evaluation.metrics import Divergence
from agentmem.evaluation.terms import Frozen, Reader, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.contracts import Policy

NO_CONTEXT, TRUNCATION = "no-context", "truncation"
KEEP_FIRST, KEEP_RECENT = 4, 8
"""Defaults of this setting: they fit into 1/100 of a document of 1,300 tokens."""


class Shot(Frozen):
    """How a document is compacted and continued."""

    continuation: int = Field(default=256, ge=1)
    """Tokens that are teacher-forced; the document is all that comes before."""
    ratios: tuple[int, ...] = (10, 20, 50, 100)
    """A document of n tokens keeps ``n // ratio`` slots per KV head, prefix and recent included."""

    @field_validator("ratios")
    @classmethod
    def _check_ratios(cls, ratios: tuple[int, ...]) -> tuple[int, ...]:
        if not ratios or min(ratios) < 2 or len(set(ratios)) < len(ratios):  # noqa: PLR2004  # 1 compacts nothing
            raise ValueError(f"ratios: {list(ratios)} must be different and at least 2; write 10,20,50,100")
        return ratios


class OneShotRow(Frozen):
    """One line of the table. KL in nats, over the ``positions`` of the continuation."""

    policy: str
    """The name or spec as it was asked for, or ``no-context`` or ``truncation``."""
    ratio: int | None
    """Tokens of the document per slot that is kept; ``None`` for ``no-context``."""
    offset: int
    """Character of the text at which the document begins."""
    document: int
    """Tokens of the document."""
    slots: int
    """Slots per KV head after the compaction; for ``truncation`` the tokens that are left of the document."""
    positions: int
    kl_mean: float
    kl_p95: float
    top1: float
    """Share of positions at which the most likely token is the same as with full memory."""
    nll: float
    """Negative log-likelihood of the continuation, nats per token."""
    delta_nll: float
    """``nll`` minus that with full memory."""
    held: int
    """Slots that were held right after the compaction, mean over layers and KV heads."""
    bytes: int
    """The most that R + T came to, the document's slots before the compaction included."""
    seconds: float
    compact_seconds: float
    """Of ``seconds``, those spent compacting."""


class Medians(Frozen):
    """One policy's medians at one ratio over ``windows`` passages; the fields are those of :class:`OneShotRow`."""

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
    """What the terms do not say of a case."""

    document: int
    slots: int


class _Run(NamedTuple):
    """What reading one case gave."""

    divergence: Divergence
    held: int = 0
    bytes: int = 0
    seconds: float = 0.0
    compact_seconds: float = 0.0


class _Case(NamedTuple):
    """One line to measure: a policy with terms that hold its target, or a baseline by its name."""

    policy: Policy | str
    ratio: int | None
    slots: int
    terms: Terms

    @property
    def name(self) -> str:
        return self.policy if isinstance(self.policy, str) else self.policy.name


def cases(policies: Sequence[str], terms: Terms, shot: Shot, tokens: int) -> list[_Case]:
    """What is measured on a passage of ``tokens`` tokens, in order; refused before any work.

    Raises:
        SettingsRefused: no document is left, a ratio leaves fewer slots than prefix + recent + 1, or a policy is
            unknown.

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
        # The memory is full when the document ends; the continuation must fit behind what is left of it.
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
    offset: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fresh: bool = False,
    progress: Callable[[str, int], None] = lambda _name, _tokens: None,
) -> Iterator[OneShotRow]:
    """Rows for ``ids [tokens + 1]``, ratio by ratio; each is saved in ``cache_dir`` before it is yielded.

    What was saved with the same model, passage, settings and code is not measured again unless ``fresh``.

    Raises:
        AgentmemError: see :func:`cases`; or a policy cannot serve the terms; what was saved before stays.

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
                full = full_logits(model, ids, folder, first=document, fresh=fresh, progress=named)
            label = case.name if case.ratio is None else f"{case.name}, 1/{case.ratio}"
            found = _measure(model, ids, full, case, tokenizer, partial(progress, label))
            save(found, path)
        yield found.model_copy(update={"offset": offset, "ratio": case.ratio})


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
        offset=0,
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
    """Read ``ids`` from position 0 on, without a memory."""
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
    """Read the document, compact, and go on."""
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
    """The same terms with as many more slots as the policy keeps free for itself."""
    slots, more = terms.slots or 0, terms
    while (plan := more.plan(model, policy, min_reclaim=1)).capacity - plan.scratch < slots:
        more = terms.model_copy(update={"slots": slots + plan.scratch})
    return more


def medians(found: Sequence[OneShotRow]) -> tuple[Medians, ...]:
    """One line per (ratio, policy), in order of appearance: medians over the passages that were measured."""
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
