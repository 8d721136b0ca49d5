"""``agentmem eval fidelity --one-shot``: compact a document once, then teacher-force its continuation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentmem.cli.evaluate.options import Delivery, Work, bars
from agentmem.evaluation import OneShotRow, Shot, Terms, one_shot
from agentmem.evaluation.one_shot import Medians, medians


def compare(work: Work, passages: dict[int, torch.Tensor], terms: Terms, shot: Shot) -> None:
    """Measure every passage and deliver the results; after an error or Ctrl-C, deliver the results measured so far."""
    done: list[OneShotRow] = []
    tokens = len(next(iter(passages.values()))) - 1
    cases = one_shot.cases(work.specs, terms, shot, tokens)
    for case in cases:
        if not isinstance(case.policy, str):  # a policy that cannot serve these terms is refused now, not minutes later
            case.terms.plan(work.model, case.policy, min_reclaim=1)
    wanted = len(passages) * len(cases)
    try:
        for offset, ids in passages.items():
            with bars(tokens, f" from {offset}" if len(passages) > 1 else "") as progress:
                streamed = one_shot.stream(
                    work.model,
                    ids,
                    work.specs,
                    terms,
                    shot,
                    tokenizer=work.tokenizer,
                    cache_dir=work.folder,
                    offset=offset,
                    fresh=work.fresh,
                    progress=progress,
                )
                for row in streamed:
                    done.append(row)  # noqa: PERF402  # what came before an error is kept
    finally:
        if done:
            _deliver(done, work.delivery)
        work.note_missing(len(done), wanted)


def _deliver(rows: Sequence[OneShotRow], delivery: Delivery) -> None:
    delivery.rows(rows)
    found, first = medians(rows), rows[0]
    passages = len({row.offset for row in rows})
    title = f"one compaction of {first.document} tokens, {first.positions} positions behind it"
    title += f", medians over {passages} passages" if passages > 1 else ""
    columns = ("policy", "ratio", "slots", "KL", "KL p95", "top-1", "NLL", "ΔNLL", "s compacting")
    delivery.table(title, columns, map(_cells, found))
    if delivery.plot is not None:
        from agentmem.evaluation import pictures

        delivery.pictures(pictures.save({"one-shot": pictures.one_shot_figure(rows)}, delivery.plot))


def _cells(each: Medians) -> tuple[str, ...]:
    return (
        each.policy,
        "" if each.ratio is None else f"1/{each.ratio}",
        str(each.slots),
        f"{each.kl_mean:.4f}",
        f"{each.kl_p95:.4f}",
        f"{each.top1:.3f}",
        f"{each.nll:.4f}",
        f"{each.delta_nll:+.4f}",
        f"{each.compact_seconds:.2f}",
    )
